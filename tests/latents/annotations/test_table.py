"""Annotations as columns: what they say of a feature, and the file that they are kept in."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from sae_transformers import FeatureAnnotations
from sae_transformers.latents.annotations.columns import MOST_FEATURES, Columns
from tests.tiny import tiny_sae

ROWS: list[dict[str, Any]] = [
    {"feature": 5, "description": "rivers", "explainer": "m1", "method": "tokens", "score": 0.25, "maximum": 4.0},
    {"feature": 3, "description": " remarks that mean the opposite ", "embedding": [3.0, 4.0]},
    {"feature": 5, "description": "fresh water", "explainer": "m2", "score": 0.75},
    {"feature": 9, "frequency": 0.125, "neighbours": [9, 5, 3]},
    {"feature": 5, "description": "boats", "frequency": 0.5},
]


@pytest.fixture
def notes() -> FeatureAnnotations:
    return FeatureAnnotations.from_rows(ROWS, n_features=12, facts={"source": "made up", "embedder": "e"})


def test_what_is_said_of_a_feature_best_first(notes: FeatureAnnotations) -> None:
    found = notes.of(5)
    assert [(one.text, one.explainer, one.method, one.score) for one in found] == [
        ("fresh water", "m2", None, 0.75), ("rivers", "m1", "tokens", 0.25), ("boats", None, None, None),
    ]  # fmt: skip
    assert notes.description(5) == "fresh water" and notes.description(3) == "remarks that mean the opposite"
    assert [notes.description(n) for n in (-1, 9, 12, 10**9)] == [""] * 4 and notes.of(12) == notes.of(-1) == []
    assert notes.names([3, 4, 5]) == {3: "remarks that mean the opposite", 5: "fresh water"}
    assert len(notes) == 12 and notes.described.tolist() == [3, 5]
    assert notes.number("frequency", 9) == 0.125 and notes.number("maximum", 5) == 4.0
    assert notes.number("maximum", 9) is notes.number("output_score", 5) is notes.number("maximum", 99) is None
    assert notes.neighbours is not None and notes.neighbours[9, :3].tolist() == [5, 3, -1]


def test_a_whole_description_names_its_features(notes: FeatureAnnotations) -> None:
    assert notes.latents_of("  Fresh Water\n") == [5] and notes.latents_of("fresh") == []
    twice = FeatureAnnotations.from_rows([{"feature": n, "description": "same"} for n in (4, 2, 4)])
    assert twice.latents_of("same") == [2, 4]
    assert FeatureAnnotations.from_rows([]).latents_of("same") == []


def test_a_file_gives_the_same_back(notes: FeatureAnnotations, tmp_path: Path) -> None:
    file = notes.save(tmp_path / "annotations.parquet")
    back = FeatureAnnotations.load(file)
    assert back.descriptions.equals(notes.descriptions) and back.facts == notes.facts and len(back) == 12
    for name in ("maximum", "frequency", "neighbours", "embeddings"):
        np.testing.assert_array_equal(getattr(back, name), getattr(notes, name))
    assert back.output_score is None
    again = FeatureAnnotations.load(back.save(tmp_path / "again.parquet"))
    np.testing.assert_array_equal(again.embeddings, notes.embeddings)
    columns = pyarrow.parquet.read_table(file).to_pydict()  # as others read it
    assert columns["feature"] == [3, 5, 5, 5, 9] and columns["frequency"] == [None, 0.5, 0.5, 0.5, 0.125]


def test_nothing_is_known_of_an_empty_file(tmp_path: Path) -> None:
    back = FeatureAnnotations.load(FeatureAnnotations.from_rows([]).save(tmp_path / "a.parquet"))
    assert len(back) == 0 and back.described.tolist() == [] and back.like("rivers") == [] and back.to_frame().empty


def test_files_that_are_something_else(notes: FeatureAnnotations, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pa.table({"feature": [1]}), other)
    with pytest.raises(ValueError, match=r"Expected annotations that `save` wrote.*other\.parquet"):
        FeatureAnnotations.load(other)
    file = notes.save(tmp_path / "a.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is no Parquet file, or damaged"):
        FeatureAnnotations.load(file)


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        ({"n_features": 10**12}, "n_features"), ({"n_features": "12"}, "n_features"), ({"facts": []}, "facts"),
        ({"version": 9}, "'version': 9"), ({"n_features": 4}, "row 2: The SAE has 4 latents.*Received: 5"),
        ({"embedding": 7}, "row 1: an embedding of 2 numbers. Expected 7"),
    ],
)  # fmt: skip
def test_false_claims_of_a_file(notes: FeatureAnnotations, tmp_path: Path, claim: dict[str, Any], told: str) -> None:
    table = pyarrow.parquet.read_table(notes.save(tmp_path / "a.parquet"))
    about = json.loads(table.schema.metadata[b"sae_transformers"]) | claim
    file = tmp_path / "lies.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"sae_transformers": json.dumps(about)}), file)
    with pytest.raises(ValueError, match=told):
        FeatureAnnotations.load(file)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"feature": -1}, r"rows, row 0: the number of a latent must be whole, from 0. Received: -1"),
        ({"feature": "1e3"}, "Received: '1e3'"), ({"feature": True}, "Received: True"), ({}, "Received: None"),
        ({"feature": 12}, "The SAE has 12 latents, numbered from 0. Received: 12"),
        ({"feature": 1, "description": 7}, "`description` must be a text. Received: 7"),
        ({"feature": 1, "description": "x", "explainer": ["m"]}, "`explainer` must be a text"),
        ({"feature": 1, "description": "x", "score": "high"}, "`score` must be a finite number. Received: 'high'"),
        ({"feature": 1, "maximum": float("inf")}, "`maximum` must be a finite number. Received: inf"),
        ({"feature": 1, "frequency": True}, "`frequency` must be"), ({"feature": 1, "neighbours": 4}, "neighbours"),
        ({"feature": 1, "neighbours": [99]}, "The SAE has 12 latents"),
        ({"feature": 1, "description": "x", "embedding": "[1, 'a']"}, "`embedding` must be a list of numbers"),
        ({"feature": 1, "description": "x", "embedding": [[1.0]]}, "`embedding` must be a list of finite numbers"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_named(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told) if "(" in told else told):
        FeatureAnnotations.from_rows([row], n_features=12)


def test_a_large_number_takes_no_memory_of_its_size() -> None:
    with pytest.raises(ValueError, match="At most 16,777,216 latents"):
        FeatureAnnotations.from_rows([{"feature": MOST_FEATURES, "maximum": 1.0}])
    with pytest.raises(ValueError, match=r"Received: 'x{70,80}\.\.\.$|Received: 'x"):
        Columns().feature("x" * 10**6, "row 1")


def rewritten(notes: FeatureAnnotations, folder: Path, **columns: pa.Array) -> Path:
    """The file of `notes` with other columns."""
    table = pyarrow.parquet.read_table(notes.save(folder / "a.parquet"))
    about = table.schema.metadata
    for name, column in columns.items():
        place = table.schema.names.index(name)
        table = table.set_column(place, name, column)
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), folder / "large.parquet")
    return folder / "large.parquet"


def test_small_files_that_unpack_to_much(notes: FeatureAnnotations, tmp_path: Path) -> None:
    rows = 5
    long = pa.array(["x" * 2**20] * rows, pa.large_string())
    near = pa.array([[1] * 1000] * rows, pa.list_(pa.int32()))
    wide = pa.array([b"x" * 2**16] * rows, pa.binary(2**16))
    for column, told in (
        ({"description": long}, "`description` must have at most 65,536 characters"),
        ({"neighbours": near}, "64 values in one.*up to 1000 values"),
        ({"embedding": wide}, "32,768 numbers"),
    ):
        with pytest.raises(ValueError, match=told):
            FeatureAnnotations.load(rewritten(notes, tmp_path, **column))


def test_more_rows_than_there_can_be(
    notes: FeatureAnnotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = notes.save(tmp_path / "a.parquet")
    monkeypatch.setattr("sae_transformers.latents.annotations.stored.MOST_ROWS", 4)
    with pytest.raises(ValueError, match="at most 4 rows.*Received: 5 rows"):
        FeatureAnnotations.load(file)


def test_a_description_of_a_book(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 0: `description` must have at most 65,536 characters. Received: 65,537"):
        FeatureAnnotations.from_rows([{"feature": 0, "description": "x" * 65_537}])
    whole = FeatureAnnotations.from_rows([{"feature": 0, "description": "漢" * 65_536}])
    assert FeatureAnnotations.load(whole.save(tmp_path / "a.parquet")).description(0) == "漢" * 65_536


def test_embeddings_of_different_lengths() -> None:
    rows = [
        {"feature": 0, "description": "a", "embedding": [1, 2]},
        {"feature": 1, "description": "b", "embedding": [1]},
    ]
    with pytest.raises(ValueError, match="row 1: `embedding` must be a list of finite numbers, 2 as in other rows"):
        FeatureAnnotations.from_rows(rows)


def test_joined_descriptions_add_up_and_numbers_fill_gaps(notes: FeatureAnnotations) -> None:
    other = FeatureAnnotations.from_rows(
        [{"feature": 3, "description": "irony", "score": 0.5, "maximum": 9.0}, {"feature": 5, "maximum": 8.0}],
        n_features=14, facts={"source": "others", "licence": "mit"},
    )  # fmt: skip
    both = notes.joined(other)
    assert len(both) == 14 and [one.text for one in both.of(3)] == ["irony", "remarks that mean the opposite"]
    assert (
        both.number("maximum", 5) == 4.0 and both.number("maximum", 3) == 9.0 and both.number("frequency", 9) == 0.125
    )
    assert both.facts["source"] == "made up; others" and both.facts["licence"] == "mit"
    assert both.embeddings is not None and both.width == 2
    row = both.descriptions["description"].to_pylist().index("remarks that mean the opposite")
    np.testing.assert_allclose(both.embeddings[row], [0.6, 0.8], atol=1e-3)
    assert not both.embeddings[both.descriptions["description"].to_pylist().index("irony")].any()
    reverse = other.joined(notes)
    assert reverse.number("maximum", 5) == 8.0 and reverse.facts["source"] == "others; made up"


def test_joined_maxima_of_two_units_are_not_mixed(notes: FeatureAnnotations) -> None:
    folded = FeatureAnnotations.from_rows([{"feature": 3, "maximum": 9.0}], facts={"maxima": "folded"})
    both = notes.joined(folded)
    assert both.number("maximum", 3) is None and both.number("maximum", 5) == 4.0 and "maxima" not in both.facts
    bare = FeatureAnnotations.from_rows([{"feature": 3, "description": "x"}])
    assert bare.joined(folded).facts["maxima"] == "folded"


def test_maxima_that_an_sae_does_not_know_are_filled_in_its_own_unit() -> None:
    sae = tiny_sae(layer=1, k=4)
    sae.feature_max.zero_()
    sae.feature_max[1] = 2.0
    notes = FeatureAnnotations.from_rows([{"feature": n, "maximum": 6.0} for n in (1, 7)])
    assert notes.fill_maxima(sae) == 1
    assert sae.feature_max.nonzero()[:, 0].tolist() == [1, 7] and sae.feature_max[[1, 7]].tolist() == [2.0, 6.0]
    sae.feature_max.zero_()
    folded = FeatureAnnotations.from_rows([{"feature": 7, "maximum": 6.0}], facts={"maxima": "folded"})
    folded.fill_maxima(sae)
    torch.testing.assert_close(sae.feature_max[7], 6.0 / sae.W_dec[7].detach().norm())
    with pytest.raises(ValueError, match="an SAE with 65 latents or more. Expected those of one with 64"):
        FeatureAnnotations.from_rows([{"feature": 64, "maximum": 1.0}]).fill_maxima(sae)


HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>", "=HYPERLINK('http://x')", "+1+1", "@SUM(A1)", "-2+3",
    "\x1b[31mred\x1b[0m \x07", "**bold** [link](javascript:alert(1)) | cell", "\u202eright to left\u2066",
    "a\nb\tc\r\nd", "{{ 7 * 7 }} {% raw %}", "é" * 5000, "\U0001f600",
]  # fmt: skip


def test_hostile_texts_stay_as_they_are_and_are_shown_as_text(tmp_path: Path) -> None:
    notes = FeatureAnnotations.from_rows([{"feature": n, "description": text} for n, text in enumerate(HOSTILE)])
    back = FeatureAnnotations.load(notes.save(tmp_path / "a.parquet"))
    assert [back.description(n) for n in range(len(HOSTILE))] == [text.strip() for text in HOSTILE]
    shown = back._repr_html_()
    assert "<script" not in shown and "<img" not in shown and "&lt;script&gt;" in shown
    assert back.latents_of(HOSTILE[0]) == [0] and back.latents_of(HOSTILE[5]) == [5]


def test_it_is_not_copied_with_what_holds_it(notes: FeatureAnnotations) -> None:
    assert copy.deepcopy({"a": [notes]})["a"][0] is notes
    assert "2 of 12 features described, 2 further descriptions" in repr(notes)
    assert notes.to_dict() == {"features": 12, "described": 2, "facts": {"source": "made up", "embedder": "e"}}
    assert notes.to_frame()["frequency"].tolist()[1:] == [0.5, 0.5, 0.5]
