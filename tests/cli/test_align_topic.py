"""The verb `align-topic`, from texts to a steered model that anyone loads."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from sae_transformers import Steering
from sae_transformers.cli import app
from sae_transformers.training.steering.topic_scores import read_topic_scores
from tests.create_training_data.tiny_embedder import save_tiny_classifier, save_tiny_embedder
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")


def texts(count: int, words: list[str], seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(6, 12))) for _ in range(count)]


def write(path: Path, rows: list[str], column: str = "text") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", column])
        writer.writerows(enumerate(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("align")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(folder / "base")
    tiny_sae(layer=1, site="resid_post", metadata={"base_model": str(folder / "base")}).save_pretrained(folder / "sae")
    save_tiny_embedder(folder)
    write(folder / "reference.csv", texts(24, WORDS, 1), "0")
    write(folder / "topic.csv", texts(4, WORDS[:12], 2), "0")
    write(folder / "test.csv", texts(6, WORDS[:12], 3))
    return folder


def align(folder: Path, out: Path, *options: object, model: str = "base") -> Result:
    arguments = ["align-topic", folder / model, "--out", out]
    defaults = {"reference": folder / "reference.csv", "topic": folder / "topic.csv", "sae": folder / "sae"}
    defaults |= {"embedder": folder / "embedder", "prompt-count": 3, "max-new-tokens": 4, "max-length": 32}
    for name, value in defaults.items():
        if f"--{name}" not in options:
            arguments += [f"--{name}", value]
    return CliRunner().invoke(app, [str(argument) for argument in [*arguments, *options]])


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_from_texts_to_a_steered_model(folder: Path, tmp_path: Path) -> None:
    options = ["--topic-test", folder / "test.csv", "--lora-epochs", 1, "--save-model", "--replace", "--quantile", 0.9]
    result = align(folder, tmp_path, *options)
    assert result.exit_code == 0, result.output
    found = report(tmp_path)
    assert list(found["methods"]) == ["orig", "swap", "SAE", "weight", "clamp", "prompting", "LoRA"]
    assert found["methods"]["orig"]["similarity_change"] == 0
    assert all(row["perplexity"] >= 1 and -1 <= row["similarity"] <= 1 for row in found["methods"].values())
    assert found["methods"]["LoRA"]["preparation_seconds"] > 0 and found["methods"]["SAE"]["preparation_seconds"] == 0
    assert found["texts"] == {"reference": 24, "topic": 4}
    parts = found["uncertainty"]
    above = parts["uncertainty"] > found["threshold"], parts["reconstruction_error"] > found["error_threshold"]
    assert found["warning"] == any(above)
    assert ("Warning:" in result.stdout) == found["warning"]
    scores = read_topic_scores(tmp_path / "scores.csv", 64)
    assert torch.equal(scores.scores, read_topic_scores(tmp_path / "scores.parquet", 64).scores)
    assert scores.coverage == pytest.approx(found["uncertainty"]["coverage"])
    steering = Steering.from_json((tmp_path / "steering.json").read_text(encoding="utf-8"))
    assert steering.keep_error is False and steering.positions == ((1, None),)
    assert steering.reweightings[0].scores == tuple(scores.scores.tolist())
    samples = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert len(samples) == 3 and list(samples[0]) == ["prompt", *found["methods"]]
    # What was saved steers by default, with the code that travels with it.
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    ids = torch.arange(4, 12).view(1, -1)
    with torch.no_grad():
        steered, plain = loaded(ids).logits, loaded(ids, steering=False).logits
    assert torch.equal(steered[:, 0], plain[:, 0]) and not torch.allclose(steered[:, 1:], plain[:, 1:])


def test_the_same_seed_gives_the_same_report(folder: Path, tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        assert align(folder, tmp_path / name, "--compare", "", "--topic-prompt", "w1 w2").exit_code == 0
        found = report(tmp_path / name)
        for row in found["methods"].values():
            rows.append([value for key, value in row.items() if "seconds" not in key])
    assert len(rows) == 6 and rows[:3] == rows[3:]


def test_a_method_with_settings_of_its_own(folder: Path, tmp_path: Path) -> None:
    options = ["--method", "swap:replace:2", "--compare", "swap,swap:keep:1,swap:0,SAE,orig"]
    result = align(folder, tmp_path, *options, "--acceptability", save_tiny_classifier(tmp_path))
    assert result.exit_code == 0, result.output
    assert "P(acceptable)" in result.stdout
    names = ["orig", "swap:replace:2", "swap", "swap:keep:1", "swap:0", "SAE", "prompting"]
    rows = report(tmp_path)["methods"]
    assert list(rows) == names and rows["swap"]["perplexity"] == rows["swap:keep:1"]["perplexity"]
    assert rows["swap:0"]["perplexity"] == rows["orig"]["perplexity"]
    assert all(0 < row["acceptability"] < 1 for row in rows.values())
    steering = Steering.from_json((tmp_path / "steering.json").read_text(encoding="utf-8"))
    scores = read_topic_scores(tmp_path / "scores.csv").scores
    assert steering.keep_error is False and steering.reweightings[0].scores == tuple(scores.square().tolist())


def test_saved_scores_in_place_of_new_ones(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "medical.csv"
    values = ["" if i % 9 == 4 else str((i % 7) / 6) for i in range(64)]
    write(table, values, "med.train_20.csv")
    options = ["--scores", table, "--prompt-count", 0, "--method", "weight", "--strength", 2]
    result = align(folder, tmp_path / "out", *options, "--reference", folder / "topic.csv")
    assert result.exit_code == 0, result.output
    assert "4 reference texts are too few for a threshold" in result.stdout
    found = report(tmp_path / "out")
    assert found["threshold"] is None and found["warning"] is None and found["methods"] == {}
    steering = Steering.from_json((tmp_path / "out" / "steering.json").read_text(encoding="utf-8"))
    expected = [0.0 if value == "" else float(value) ** 2 for value in values]
    assert steering.keep_error and steering.reweightings[0].mode == "weight"
    assert list(steering.reweightings[0].scores) == pytest.approx(expected)
    assert not (tmp_path / "out" / "samples.json").exists()


def test_short_texts_are_left_out_and_long_ones_cut(folder: Path, tmp_path: Path) -> None:
    rows = [*texts(22, WORDS, 5), "w7", " ", " ".join(WORDS * 3)]
    write(tmp_path / "reference.csv", rows)
    result = align(folder, tmp_path / "out", "--reference", tmp_path / "reference.csv", "--prompt-count", 0)
    assert result.exit_code == 0, result.output
    assert "1 reference text(s) of a single token are left out" in result.stdout
    found = report(tmp_path / "out")
    assert found["texts"]["reference"] == 23  # the empty one does not count
    assert found["tokens"]["reference"] == sum(min(32, len(text.split())) - 1 for text in rows[:22]) + 31


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "swop"], "orig, SAE, clamp, weight, swap. Received: 'swop'"),
        (["--compare", "sea"], "Received: 'sea'"),
        (["--compare", "swap:often"], "keep, replace and a strength. Received: 'swap:often'"),
        (["--summary", "mean"], "Received: --summary='mean'"),
        (["--max-length", "999"], "from 2 to 128"),
        (["--max-length", "1"], "Received: --max-length=1"),
        (["--topic-column", "no"], "column 'no'"),
        (["--embedder", "nowhere/at-all"], "nowhere/at-all"),
        (["--long-texts", "drop"], "Received: --long-texts='drop'"),
        (["--quantile", "2"], "quantile=2.0"),
        (["--strength", "-1"], "strength=-1.0"),
        (["--clamp-top", "0"], "top=0"),
        (["--max-new-tokens", "200"], "context of 128"),
        (["--scores", "none.csv"], "none.csv"),
        (["--hook-point", "layers.9.resid_post"], "9"),
        (["--acceptability", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_mistakes_end_as_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list, told: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = align(folder, tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "rows", "told"),
    [
        ("reference", ["w1 w2 w3"], "1 reference texts"),
        ("reference", ["w1", "w2"], "Expected texts of two tokens or more. Received: 2 texts"),
        ("topic", ["w1"], "Expected texts of two tokens or more. Received: 1 texts"),
        ("topic", [" ", ""], "Expected texts with a word. Received: none in column 'text'"),
        ("topic", [], "Expected rows of text. Received: none"),
    ],
)
def test_texts_that_say_nothing(folder: Path, tmp_path: Path, part: str, rows: list[str], told: str) -> None:
    write(tmp_path / "rows.csv", rows)
    result = align(folder, tmp_path / "out", f"--{part}", tmp_path / "rows.csv")
    assert result.exit_code == 2 and told in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "out").exists()


def test_several_columns_need_a_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": "w1 w2", "b": "w3 w4"}\n', encoding="utf-8")
    result = align(folder, tmp_path / "out", "--topic", tmp_path / "rows.jsonl")
    assert result.exit_code == 2 and "Name it. Received: columns ['a', 'b']" in result.stderr


def test_old_spellings_are_taken_with_a_note(folder: Path, tmp_path: Path) -> None:
    result = align(folder, tmp_path / "out", "--new-tokens", 3, "--tokens-at-once", 512, "--compare", "")
    assert result.exit_code == 0, result.output
    assert "--new-tokens is now --max-new-tokens." in result.stderr.splitlines()
    facts = report(tmp_path / "out")["facts"]
    assert (facts["new_tokens"], facts["tokens_at_once"], facts["sae"]) == (3, 512, str(folder / "sae"))


def test_prompts_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """A file, or a prompt as it is: continued, shown, and in report and samples."""
    (tmp_path / "prompts.txt").write_text("\n\n".join(f"w{n} w2" for n in range(5)), encoding="utf-8")
    result = align(folder, tmp_path / "a", "--prompts", tmp_path / "prompts.txt", "--compare", "")
    assert result.exit_code == 0, result.output
    assert "3 of 5 prompts were continued (prompt_count)" in result.stdout
    assert report(tmp_path / "a")["prompts"] == ["w0 w2", "w1 w2", "w2 w2"]
    result = align(folder, tmp_path / "b", "--prompts", "w7 w8 w9", "--compare", "", "--method", "clamp")
    assert result.exit_code == 0, result.output
    (sample,) = json.loads((tmp_path / "b" / "samples.json").read_text(encoding="utf-8"))
    assert sample["prompt"] == "w7 w8 w9" and report(tmp_path / "b")["prompts"] == ["w7 w8 w9"]
    shown = " ".join(result.stdout.split())
    assert sample["clamp"].split()[0] in shown.split("w7 w8 w9")[-1]
    assert "prompts were continued" not in shown
