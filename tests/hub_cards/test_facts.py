"""Facts as files have them, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae_transformers.create_training_data.annotation.tables import read_feature_annotations
from sae_transformers.hub_cards.citations import ACTIVATIONS, BIBTEX, bibtex, methods_used
from sae_transformers.hub_cards.facts import AuthorFacts, author_facts, read_author_facts, read_model
from sae_transformers.modeling.configuration_sparse_autoencoder import ACTIVATIONS as KNOWN_ACTIVATIONS
from tests.hub_cards import folders


def test_facts_are_read_from_yaml_and_json_in_both_spellings(tmp_path: Path) -> None:
    expected = AuthorFacts(licence="mit", languages=["en"], authors=["A. B."], repo_id="me/m")
    (tmp_path / "f.yaml").write_text("license: mit\nlanguage: en\nauthors: [A. B.]\nrepo_id: me/m\n")
    (tmp_path / "f.json").write_text(
        json.dumps({"licence": "mit", "languages": ["en"], "author": "A. B.", "repo_id": "me/m"})
    )
    assert read_author_facts(tmp_path / "f.yaml") == read_author_facts(tmp_path / "f.json") == expected
    (tmp_path / "empty.yaml").write_text("")
    assert read_author_facts(tmp_path / "empty.yaml") == read_author_facts(None) == AuthorFacts()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"licnce": "mit"}, "'licnce'"),
        ({"licence": 3}, "licence=3"),
        ({"authors": [1]}, r"authors=\[1\]"),
        (["mit"], "Received: list"),
        ({"repo_id": "mine"}, "repo_id='mine'"),
    ],
)
def test_wrong_facts_are_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        author_facts(given)


def test_a_file_that_is_missing_or_no_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.yaml"):
        read_author_facts(tmp_path / "nothing.yaml")
    (tmp_path / "f.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        read_author_facts(tmp_path / "f.yaml")


def test_a_model_says_where_its_base_is(tmp_path: Path) -> None:
    found = read_model(folders.model(tmp_path / "m"))
    assert (found.base, found.auto_class, found.saes[0].place) == (
        "org/base",
        "AutoModelForCausalLM",
        "layers.1.resid_post",
    )
    local = read_model(folders.model(tmp_path / "l", base_model_name_or_path=str(tmp_path)))
    assert local.base == ""
    sae = {**folders.SAE, "metadata": {"base_model": "org/other"}}
    assert read_model(folders.model(tmp_path / "n", sae, base_model_name_or_path=None)).base == "org/other"


def test_an_sae_alone_is_read_too(tmp_path: Path) -> None:
    folders.write_json(tmp_path / "config.json", {**folders.SAE, "hook": "model.layers.3", "layer": None})
    found = read_model(tmp_path)
    assert (found.auto_class, found.saes[0].place, found.saes[0].activation) == ("", "model.layers.3", "topk, k = 2")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="where there is none"):
        read_model(tmp_path)
    for config in ({"model_type": "llama"}, {"saes": 3}, [1]):
        folders.write_json(tmp_path / "config.json", config)
        with pytest.raises(ValueError, match="must be of a model with SAEs"):
            read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_model(tmp_path)


def test_annotations_are_read_as_the_library_writes_them(tmp_path: Path) -> None:
    from sae_transformers.create_training_data.annotation.tables import read_annotations as read
    from sae_transformers.create_training_data.annotation.tables import write_annotations

    table = tmp_path / "judged.tsv"
    table.write_text(folders.ANNOTATIONS)
    write_annotations(read(table), tmp_path / "judged.parquet")
    found = read_feature_annotations(table)
    assert found == read_feature_annotations(tmp_path / "judged.parquet")
    assert {key: (one.meaning, one.verified, one.judged, one.has_spans) for key, one in found.items()} == {
        3: ("Praise of | films.", "probably", "yes", True),
        5: ("<b>Dates</b>\n---", "yes", "no", True),
        6: ("", "", "", False),
    }


def test_what_is_no_table_of_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_feature_annotations(tmp_path / "x.tsv")
    for name, content in (("a.tsv", b"a\tb\n"), ("b.tsv", b"FeatureID\tWords\nx\ty\n"), ("c.parquet", b"PAR")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_feature_annotations(tmp_path / name)


@pytest.mark.parametrize(
    ("sae", "config", "expected"),
    [
        ({"activation": "relu"}, {}, []),
        ({"activation": "jumprelu"}, {}, ["jumprelu"]),
        ({"concepts": {"x": 0}}, {}, ["scar"]),
        ({"metadata": {"format": "selfreg"}}, {}, ["selfreg"]),
        ({}, {"feature_head": {"sae": 0}}, ["selfreg"]),
        ({}, {"steering": {"edits": [{"op": "shrink"}, {"op": "at_least"}]}}, ["spare"]),
        ({}, {"steering": {"edits": [{"op": "shrink"}]}}, []),
        ({}, {"steering": {"edits": [{"scores": [1.0]}]}}, ["topic-alignment"]),
    ],
)
def test_methods_are_those_that_left_a_trace(sae: dict, config: dict, expected: list[str]) -> None:
    assert methods_used([sae], config) == expected
    assert methods_used([sae], config, ["feature-tables"]) == sorted(
        [*expected, "feature-tables"], key=list(BIBTEX).index
    )


def test_every_entry_is_bibtex_and_every_activation_exists() -> None:
    for name, entry in BIBTEX.items():
        assert entry.startswith("@") and entry.count("{") == entry.count("}"), name
        assert "title" in entry and "author" in entry
    assert set(ACTIVATIONS) <= set(KNOWN_ACTIVATIONS) and set(ACTIVATIONS.values()) <= set(BIBTEX)
    assert bibtex(["scar", "topk"]).count("\n\n") == 1
    with pytest.raises(ValueError, match=r"methods=\['scra'\]"):
        methods_used([], {}, ["scra"])
