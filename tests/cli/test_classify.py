"""The verb `classify`, from files to a classifier that anyone loads."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import pipeline
from typer.testing import CliRunner, Result

from sae_transformers import SaeForCausalLM
from sae_transformers.cli import app
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")


def row(draw: random.Random, label: str, group: str = "") -> dict[str, str]:
    words = [*draw.choices(WORDS[10:], k=draw.randint(3, 9)), *(["w0"] * 3 if label == "toxic" else ["w1"] * 3), group]
    return {"text": " ".join(word for word in words if word), "label": label}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("classify"), random.Random(0)
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base().save_pretrained(folder / "base")
    tiny_sae(layer=1, site="resid_post", metadata={"base_model": str(folder / "base")}).save_pretrained(folder / "sae")
    rows = [row(draw, label) for label in ["toxic", "fine"] * 30]
    write(folder / "train.csv", rows)
    write(folder / "test.csv", rows[:20])
    pairs = [(row(draw, "fine", "w5")["text"]) for _ in range(12)]
    write(folder / "original.csv", [{"text": text} for text in pairs])
    write(folder / "swapped.csv", [{"text": text.replace("w5", "w6")} for text in pairs])
    three = [{**row(draw, "toxic" if i % 2 else "fine"), "label": "abc"[i % 3]} for i in range(30)]
    write(folder / "three.csv", three)
    preferences = [
        {"prompt": "w2 w3", "chosen": row(draw, "fine")["text"], "rejected": row(draw, "toxic")["text"]}
        for _ in range(20)
    ]
    write(folder / "pairs.csv", preferences)
    return folder


def classify(folder: Path, out: Path, *options: object, train: str = "train.csv") -> Result:
    arguments = ["classify", folder / "base", folder / train, "--sae", folder / "sae", "--out", out]
    return CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--max-length", 32, *options]])


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_from_texts_to_a_published_classifier(folder: Path, tmp_path: Path) -> None:
    swaps = ["--original", folder / "original.csv", "--swapped", folder / "swapped.csv", "--keep", "selfreg"]
    result = classify(folder, tmp_path, "--test", folder / "test.csv", *swaps, "--seeds", "1,2", "--top", 5)
    assert result.exit_code == 0, result.output
    found = read(tmp_path)
    assert list(found["methods"]) == [
        "plain", "dropout", "l2", "overfit", "focal", "label_smoothing", "spectral_norm",
        "selfreg", "random", "pairing", "projection", "leace",
    ]  # fmt: skip
    assert all(len(rows) == 2 for rows in found["methods"].values())
    assert len(found["facts"]["unintended"]) == 5 and found["facts"]["kept"] == "selfreg"
    assert found["methods"]["overfit"][0]["f1"] > 0.9
    assert found["methods"]["plain"][0]["delta_logit"] > 0
    assert "5 of 64 features are unintended" in result.stdout and "Recommended: " in result.stdout
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["feature_head"]["removal"] == "own" and config["loss_weights"]["unintended"] == 0.3
    scorer = pipeline("text-classification", str(tmp_path / "model"), trust_remote_code=True)
    scores = scorer(["w0 w0 w0 w20 w30", "w1 w1 w1 w20 w30"])
    assert [score["label"] for score in scores] == ["toxic", "toxic"] and 0 < scores[1]["score"] < 1


def test_three_classes_cross_validated_with_a_table_of_features(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "features.txt").write_text("3\n17\n")
    options = ["--unintended", tmp_path / "features.txt", "--methods", "plain,selfreg", "--seeds", "1", "--folds", 3]
    result = classify(folder, tmp_path / "a", *options, "--classes", "a,b", "--keep", "plain", train="three.csv")
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "a")
    assert found["facts"]["labels"] == ["a", "b", "other"] and found["facts"]["unintended"] == [3, 17]
    config = json.loads((tmp_path / "a" / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["feature_head"]["removal"] == "none" and config["id2label"]["2"] == "other"
    judged = (
        "FeatureID\tTask\tVerify\tSummary\tWords\n4\tno|||No.\tyes\tA.\tSpan 1: a\n5\tyes|||Yes.\tyes\tB.\tSpan 1: b\n"
    )
    (tmp_path / "judged.tsv").write_text(judged)
    swap = ["--swap-words", "w0:w1"]
    again = classify(
        folder, tmp_path / "b", "--unintended", tmp_path / "judged.tsv", *options[2:], *swap, train="three.csv"
    )
    assert again.exit_code == 0, again.output
    assert read(tmp_path / "b")["facts"]["unintended"] == [4]
    assert read(tmp_path / "b")["methods"]["plain"][0]["delta_logit"] > 0


def test_pairs_and_lora(folder: Path, tmp_path: Path) -> None:
    options = ["--pairs", "chosen,rejected", "--prompt-column", "prompt", "--methods", "plain", "--seeds", "1"]
    test = ["--test", folder / "pairs.csv", "--lora-epochs", 1, "--template", "{text} w9", "--pooling", "last"]
    result = classify(folder, tmp_path, *options, *test, train="pairs.csv")
    assert result.exit_code == 0, result.output
    assert "after LoRA: accuracy" in result.stdout and "accuracy" in read(tmp_path)["lora"]
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", trust_remote_code=True
    )
    assert model(input_ids=torch.tensor([[4, 5, 6]])).logits.shape == (1, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--methods", "plan"], "Did you mean 'plain'?"),
        (["--label-column", "no"], "column 'no'"),
        (["--original", "x.csv"], "--original with --swapped"),
        (["--swap-words", "he"], "'he'"),
        (["--swap-words", "no:none"], "change three rows or more"),
        (["--pooling", "first"], "pooling='first'"),
        (["--template", "no place"], "{text}"),
        (["--max-length", "0"], "--max-length=0"),
        (["--max-length", "999"], "at most 128"),
        (["--unintended", "nothing.txt"], "nothing.txt"),
        (["--penalty", "-1"], "penalty=-1.0"),
    ],
)
def test_mistakes_end_as_one_line(folder: Path, tmp_path: Path, options: list, told: str) -> None:
    result = classify(folder, tmp_path / "out", "--seeds", "1", *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_old_spellings_and_a_saved_model(folder: Path, tmp_path: Path) -> None:
    SaeForCausalLM.from_base(
        str(folder / "base"), saes=[tiny_sae(layer=1, metadata={"base_model": str(folder / "base")})]
    ).save_pretrained(tmp_path / "model")
    words = ["classify", tmp_path / "model", folder / "three.csv", "--max-length", 32, "--tokens-at-once", 64]
    words += ["--methods", "plain", "--seeds", "1", "--folds", 2, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "--tokens-at-once is now --tokens-per-batch." in result.stderr
    assert read(tmp_path / "out")["facts"]["sae"] == str(tmp_path / "model")
