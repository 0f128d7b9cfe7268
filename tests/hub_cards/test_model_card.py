"""A whole card, compared byte by byte; its metadata read back; nothing invented."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from sae_transformers.create_training_data.annotation.tables import read_feature_annotations
from sae_transformers.evaluation.results import DataFile, Measurement, Results, SuiteResult
from sae_transformers.hub_cards.card_file import is_ours
from sae_transformers.hub_cards.facts import AuthorFacts, author_facts, read_model
from sae_transformers.hub_cards.model_card import eval_results, model_card
from tests.hub_cards import folders

GOLDEN = Path(__file__).parent / "golden"
NASTY = "po|s\n---\n<b>`*"


def compare(text: str, name: str) -> None:
    """With a golden file; UPDATE_GOLDEN=1 writes it anew, to be read before it is kept."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8", newline="\n")
    assert text.encode() == path.read_bytes()


def results() -> Results:
    detection = SuiteResult(
        "detection",
        {"seeds": [0, 1]},
        [
            Measurement(
                "auroc", 0.912345, "praise of SAE 0", 0.9, 0.93, "bootstrap over texts", 300, 3, better="higher"
            ),
            Measurement("f1", 0.81, "latent 5 of SAE 0", 0.7, 0.9, "bootstrap over texts", 300, 3, better="higher"),
            Measurement("auroc", 0.95, "DiffMean at layers.1.resid_post", n=300, better="higher"),
            Measurement("tree_depth", None, "trees of SAE 0", note="one label only"),
        ],
        [DataFile("test|set.csv", "ab" * 32, 300, "test", "somewhere <org>", "cc0-1.0")],
        notes=["The first token of a text is left out."],
    )
    steered = "praise (raise)"
    samples = [
        {"prompt": "The film", "method": "praise", "goal": goal, "setting": f"praise direction {sign}0.1",
         "unsteered": " was\n---\nshown | twice", "steered": f" was <i>{word}</i>"}
        for goal, sign, word in (("raise", "+", "great"), ("lower", "-", "bad"))
    ]  # fmt: skip
    numbers = {"none": (0.1, 20.0, 0.01), steered: (0.6, 35.5, 0.04), "praise (lower)": (-0.4, 41.0, 0.2)}
    steering = SuiteResult(
        "steering",
        {},
        [
            Measurement(metric, value, method, n=8, data="prompts.txt")
            for method, row in numbers.items()
            for metric, value in zip(("concept_score", "perplexity", "repetition"), row, strict=True)
        ],
        samples=samples,
    )
    speed = SuiteResult("speed", {}, [Measurement("ms_per_token", 3.0, "steered", data="prompts.txt")])
    suites = {suite.name: suite for suite in (detection, steering, speed)}
    command = "sae-transformers evaluate /home/me/outputs/model --out results.json"
    return Results(
        {"base": "org/base"}, command, "2026-01-02T03:04:05Z", suites, {"python": "3.11.7", "torch": "2.13.0"}
    )


FACTS = {
    "repo_id": "me/praise", "summary": "Finds and steers *praise*.", "licence": "apache-2.0", "languages": ["en"],
    "datasets": ["org/films"], "training_data": "Film reviews.\n\n# not a heading", "authors": ["A. Author"],
    "intended_use": "Research.", "limits": "English only.", "methods": ["feature-tables"],
}  # fmt: skip


def full_model(folder: Path) -> Path:
    first = {
        **folders.SAE, "concepts": {"praise": 3}, "feature_names": {"3": "praise", "7": NASTY},
        "metadata": {"training_data": "films", "training_texts": 800},
    }  # fmt: skip
    second = {"d_in": 8, "d_sae": 32, "activation": "jumprelu", "hook": "model.layers.0.mlp"}
    steering = {"edits": [{"sae": 0, "feature": "praise", "op": "direction", "value": 0.1, "unit": "norm"}],
                "positions": "generated"}  # fmt: skip
    return folders.model(folder, first, second, steering=steering, base_model_revision="abc123")


def test_a_card_with_every_fact(tmp_path: Path) -> None:
    (tmp_path / "judged.tsv").write_text(folders.ANNOTATIONS)
    (full_model(tmp_path / "model") / "dashboard").mkdir()
    annotations = read_feature_annotations(tmp_path / "judged.tsv")
    facts = author_facts(FACTS)
    card = model_card(read_model(tmp_path / "model"), facts, results(), annotations=annotations)
    compare(card, "model.md")
    assert is_ours(card)


def test_a_card_without_facts_says_what_is_not_known(tmp_path: Path) -> None:
    card = model_card(read_model(folders.model(tmp_path / "bare", base_model_name_or_path="/home/me/base")))
    compare(card, "model_bare.md")
    for line in (
        "It is not said what",
        "No licence is stated",
        "Nothing has been measured",
        "is not known",
        "No example",
    ):
        assert line in card
    assert "license" not in card.split("---")[1] and "/home" not in card


def test_a_card_of_an_sae_alone(tmp_path: Path) -> None:
    folders.write_json(tmp_path / "one" / "config.json", {**folders.SAE, "metadata": {"base_model": "org/base"}})
    compare(model_card(read_model(tmp_path / "one")), "sae.md")


def test_a_card_of_a_classifier(tmp_path: Path) -> None:
    head = {"sae": 0, "pooling": "mean"}
    architectures = ["SaeForSequenceClassification"]
    labels = {"0": "fine", "1": "toxic|bad"}
    folder = folders.model(tmp_path / "classifier", architectures=architectures, feature_head=head, id2label=labels)
    compare(model_card(read_model(folder)), "classifier.md")


def test_the_metadata_goes_there_and_back(tmp_path: Path) -> None:
    model = read_model(full_model(tmp_path / "model"))
    card = ModelCard(model_card(model, author_facts(FACTS), results()))
    data: Any = card.data
    assert data.eval_results == eval_results(model, results())
    assert [one.metric_value for one in data.eval_results] == [0.912345, 0.81, 0.6, 35.5, 0.04, -0.4, 41.0, 0.2]
    assert data.license == "apache-2.0" and data.base_model == "org/base" and data.language == ["en"]
    assert str(card) == card.content and ModelCard(str(card)).data.to_dict() == data.to_dict()
    # Nothing of a baseline, of a machine, or without a value.
    described = " ".join(one.metric_name or "" for one in data.eval_results)
    assert not any(word in described for word in ("DiffMean", "none", "ms_per_token", "tree_depth"))


@pytest.mark.parametrize(
    "name", [NASTY, "---", "a: b\n---\nc", "\r\n---\r\n", "</td></tr></table>", "<!--", "```", "x" * 5000]
)
def test_no_text_from_data_breaks_a_card(tmp_path: Path, name: str) -> None:
    """The same headings and tables as with a harmless text, and the same metadata but for that text."""

    def rendered(text: str, folder: Path) -> str:
        sae = {**folders.SAE, "concepts": {text: 3}, "feature_names": {"5": text}, "metadata": {"training_data": text}}
        one = Measurement("auroc", 0.5, f"{text} of SAE 0", note=text, data=text)
        suites = {
            "detection": SuiteResult("detection", {}, [one], [DataFile(text, "", 1, text, text, text)], notes=[text]),
            "steering": SuiteResult("steering", {}, [], samples=[{"prompt": text, "unsteered": text, "steered": text,
                                                                  "method": text, "goal": text, "setting": text}]),
        }  # fmt: skip
        made = Results({}, text.replace("\n", " "), text, suites, {text: text})
        facts = AuthorFacts(authors=[text], tags=[text], licence=text, datasets=[text], languages=[text])
        return model_card(read_model(folders.model(folder, sae)), facts, made)

    def shape(card: str) -> list[tuple[str, str]]:
        tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
        return [(token.type, token.tag) for token in tokens if token.type != "inline"]

    nasty, plain = rendered(name, tmp_path / "a"), rendered("harmless", tmp_path / "a")
    assert shape(nasty) == shape(plain)
    assert set(ModelCard(nasty).data.to_dict()) == set(ModelCard(plain).data.to_dict())
    assert "<script" not in nasty and "</td>" not in ModelCard(nasty).text.replace("`", "") or "</td>" in name


def test_results_of_another_model_and_annotations_of_another_sae_are_refused(tmp_path: Path) -> None:
    model = read_model(folders.model(tmp_path / "m"))
    other = Results({"base": "org/other"}, "", "")
    with pytest.raises(ValueError, match="base='org/other'"):
        model_card(model, None, other)
    table = tmp_path / "t.tsv"
    table.write_text("FeatureID\tSummary\tWords\n16\tX.\tSpan 1: x\n")
    with pytest.raises(ValueError, match="feature 16"):
        model_card(model, annotations=read_feature_annotations(table))
    with pytest.raises(ValueError, match="annotated_sae=1"):
        model_card(model, annotations=read_feature_annotations(table), annotated_sae=1)


def test_the_table_of_features_is_cut_and_says_so(tmp_path: Path) -> None:
    sae = {**folders.SAE, "concepts": {"kept": 9}, "feature_names": {str(i): f"name {i}" for i in range(8)}}
    card = model_card(read_model(folders.model(tmp_path / "m", sae)), max_features=3)
    assert card.count("| not measured |") == 3 and "6 more features" in card


def test_examples_show_the_first_prompts_of_each_direction(tmp_path: Path) -> None:
    card = model_card(read_model(full_model(tmp_path / "m")), None, results(), max_examples=0)
    assert "&lt;i&gt;great" not in card and "goal: raise" in card and "| 35.5 |" in card


def test_the_wheel_carries_the_templates() -> None:
    builders = pytest.importorskip("hatchling.builders.wheel")
    included = {
        one.relative_path for one in builders.WheelBuilder(str(Path(__file__).parents[2])).recurse_included_files()
    }
    names = {f"sae_transformers/hub_cards/templates/{name}.md.jinja" for name in ("model", "dataset", "metric")}
    assert names <= included
