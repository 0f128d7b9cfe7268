"""`classify` from Python: data as people have them, its result, and the classifier that it makes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pytest
import torch
from datasets import Dataset

from sae_transformers import (
    ClassifySettings,
    ComparisonSettings,
    LabelSettings,
    SaeForCausalLM,
    classify,
    load_classifier_base,
    read_labelled,
)
from sae_transformers.workflows.unintended import make_swaps, read_unintended
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

TWO = ComparisonSettings(methods=("plain", "selfreg"), seeds=(1, 2), folds=2, top=(5,), keep="selfreg")


def rows_of(count: int = 40) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"text": " ".join([*draw.choices(WORDS[10:], k=5), "w0 w0 w0" if i % 2 else "w1 w1 w1"]), "label": i % 2}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classify")
    tiny_base().save_pretrained(path / "base")
    word_tokenizer().save_pretrained(path / "base")
    tiny_sae(layer=1).save_pretrained(path / "sae")
    SaeForCausalLM.from_base(str(path / "base"), saes=[tiny_sae(layer=1)]).save_pretrained(path / "model")
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows_of())))
    return path


@pytest.mark.parametrize("form", ["path", "rows", "frame", "dataset"])
def test_tasks_come_as_people_have_them(folder: Path, form: str) -> None:
    given: Any = {
        "path": str(folder / "train.jsonl"), "rows": rows_of(), "frame": pandas.DataFrame(rows_of()),
        "dataset": Dataset.from_list(rows_of()),
    }[form]  # fmt: skip
    data = read_labelled(given, rows_of(6))
    assert data.names == ["0", "1"] and len(data.texts["test"]) == 6
    assert data.texts["train"] == [row["text"] for row in rows_of()] and data.labels["train"] is not None
    with pytest.raises(ValueError, match="'train' needs a column 'no'|jsonl' needs a column 'no'"):
        read_labelled(given, columns=LabelSettings(label_column="no"))


def test_the_result_as_tables_and_a_classifier(folder: Path, tmp_path: Path) -> None:
    data = read_labelled(rows_of())
    model, tokenizer, sae, name = load_classifier_base(folder / "base", data, str(folder / "sae"))
    assert name == str(folder / "base")
    reports: list[tuple[int, int]] = []
    swaps = make_swaps(data.texts["train"], "w0:w1")
    found = classify(
        model, tokenizer, data, ClassifySettings(comparison=TWO), sae=sae, swaps=swaps,
        progress=lambda *at: reports.append(at),
    )  # fmt: skip
    # Of 40 changed texts 13 find features; both sides of the rest are read with the training rows; 2 ways learn.
    assert reports[-1] == (40 + 2 * 13 + 2 * 14 + 2 * 40,) * 2
    assert len(found.facts["unintended"]) == 5 and found.facts["kept"] == "selfreg"
    assert [(row["method"], row["seed"]) for row in found.rows()] == [
        ("plain", 1), ("plain", 2), ("selfreg", 1), ("selfreg", 2)
    ]  # fmt: skip
    assert len(found.to_frame()) == 4 and found.measured_on == "2-fold cross-validation"
    assert [row["method"] for row in found.table()] == ["plain", "selfreg (5 features)"]
    assert "<table>" in found._repr_html_() and all(len(group) <= 4 for group in found.columns())
    assert "nan" not in str(found.table()) and "On validation the swap moves plain's score" in found.summary()[0]
    ids = torch.tensor([tokenizer(data.texts["train"][0])["input_ids"]])
    found.save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["methods"] == found.methods
    loaded = type(found.model).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(ids).logits, found.model(ids).logits)


def test_a_list_of_features_and_one_seed(folder: Path) -> None:
    data = read_labelled(rows_of(), rows_of(10))
    model, tokenizer, sae, _ = load_classifier_base(folder / "model", data)  # its base and its SAE
    plan = ComparisonSettings(methods=("plain",), seeds=(3,))
    found = classify(model, tokenizer, data, ClassifySettings(comparison=plan), sae=sae, unintended=[3, 17])
    assert found.facts["unintended"] == [3, 17] and found.facts["kept"] == "plain" and found.measured_on == "test rows"
    assert "±" not in str(found.table())
    with pytest.raises(ValueError, match=r"integers in \[0, 64\)"):
        classify(model, tokenizer, data, ClassifySettings(comparison=plan), sae=sae, unintended=[64])
    with pytest.raises(ValueError, match="has no SAE"):
        load_classifier_base(folder / "base", data)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"methods": ("plan",)}, "Did you mean 'plain'"),
        ({"seeds": ()}, "one seed or more"),
        ({"pooling": "first"}, "pooling='first'"),
        ({"removal": "all"}, "removal='all'"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"folds": 1}, "folds=1"),
        ({"top": ()}, "`top` must be numbers of 1 or more"),
        ({"directions": (0, 2)}, r"directions=\(0, 2\)"),
        ({"keep": "leace", "methods": ("plain",)}, "keep='leace'"),
        ({"max_f1_loss": -0.1}, "max_f1_loss=-0.1"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ComparisonSettings(**wrong)


def test_a_table_of_unintended_features_may_be_a_url(folder: Path) -> None:
    sae, text = tiny_sae(layer=1), "FeatureID\tTask\tVerify\tSummary\tWords\n"
    for number, label in enumerate(("no", "yes", "maybe")):
        text += f"{number}\t{label}|||it is\tyes\tWords.\tSpan 1: w1\n"
    (folder / "judged.tsv").write_text(text)
    fsspec.filesystem("memory").pipe_file("/theirs/judged.tsv", text.encode())
    for name in ("memory://theirs/judged.tsv", folder / "judged.tsv"):
        assert read_unintended(name, sae) == [0, 2]
    for name in ("memory://theirs/no.tsv", folder / "no.tsv"):
        with pytest.raises(FileNotFoundError, match="no.tsv"):
            read_unintended(name, sae)


def test_what_is_taken_out_is_chosen_on_validation_and_recommended(folder: Path, tmp_path: Path) -> None:
    """A word that is swapped goes with the label in training and not in the test: plain heads lean on it."""
    draw = random.Random(1)

    def row(label: int, word: str) -> dict[str, Any]:
        return {"text": " ".join([*draw.choices(WORDS[10:], k=3), *["w0" if label else "w1"] * 2, word, word, word]),
                "label": label}  # fmt: skip

    rows = [row(i % 2, "w2" if i % 2 else "w3") for i in range(60)]
    fair = [row(i % 2, draw.choice(["w2", "w3"])) for i in range(60)]
    data = read_labelled(rows, fair)
    model, tokenizer, sae, _ = load_classifier_base(folder / "base", data, str(folder / "sae"))
    plan = ComparisonSettings(
        methods=("plain", "selfreg", "random", "pairing", "projection", "leace"), seeds=(1, 2), top=(5, 20),
        directions=(1, 3), pairing=(1.0,), learning_rate=0.03, max_f1_loss=1.0,
    )  # fmt: skip
    swaps = make_swaps([one["text"] for one in rows], "w2:w3")
    found = classify(model, tokenizer, data, ClassifySettings(comparison=plan), sae=sae, swaps=swaps)
    assert [(row["method"], row["strength"]) for row in found.curve()] == [
        ("plain", None), ("selfreg", 5), ("selfreg", 20), ("random", 5), ("random", 20), ("pairing", 1.0),
        ("projection", 1), ("projection", 3), ("leace", 1), ("leace", 3),
    ]  # fmt: skip
    chosen, verdict = found.verdict.chosen, found.verdict
    assert chosen["random"].strength == chosen["selfreg"].strength
    for name in ("selfreg", "pairing", "projection", "leace"):
        own = {way: one.delta for way, one in verdict.compared.items() if way.method == name}
        assert min(own, key=own.__getitem__) == chosen[name]
    best = verdict.recommended
    assert best is not None and verdict.compared[best].delta == min(
        one.delta for way, one in verdict.compared.items() if way.method != "random"
    )
    assert verdict.compared[best].delta < -0.5 and f"Recommended: {best}." in verdict.sentence
    plain, kept = found.methods["plain"], found.methods[best.method]
    assert max(row["delta_in_std"] for row in kept) < 0.5 * min(row["delta_in_std"] for row in plain)
    assert found.facts["kept"] == best.method and found.facts["recommended"] == str(best)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in data.texts["test"][:3]]
    found.save(tmp_path)
    loaded = type(found.model).from_pretrained(tmp_path / "model")
    for one in ids:
        torch.testing.assert_close(loaded(one).logits, found.model(one).logits)
    assert "curve" in json.loads((tmp_path / "results.json").read_text())


def test_a_kept_erasure_scores_as_its_head_did(folder: Path) -> None:
    data = read_labelled(rows_of(), rows_of(12))
    model, tokenizer, sae, _ = load_classifier_base(folder / "base", data, str(folder / "sae"))
    plan = ComparisonSettings(methods=("plain", "leace"), seeds=(3,), directions=(2,), keep="leace")
    swaps = make_swaps(data.texts["train"], "w0:w1")
    found = classify(model, tokenizer, data, ClassifySettings(comparison=plan), sae=sae, swaps=swaps)
    config: Any = found.model.config.feature_head
    assert config["removal"] == "none" and found.facts["kept"] == "leace"
    logits = torch.cat(
        [found.model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in data.texts["test"]]
    )
    accuracy = float(((logits[:, 0] > 0).long() == data.labels["test"]).double().mean())
    assert accuracy == pytest.approx(found.methods["leace"][0]["accuracy"])
    for wrong in (("plain", "leace"), ("projection",)):
        alone = ClassifySettings(comparison=ComparisonSettings(methods=wrong))
        with pytest.raises(ValueError, match=f"{wrong[-1]} needs texts with an attribute swapped"):
            classify(model, tokenizer, data, alone, sae=sae)
