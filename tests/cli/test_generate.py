"""The verb `generate`: a prompt, a file of prompts, or typed lines, with steering and without."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sae_transformers import SaeForCausalLM, Steering
from sae_transformers.cli import app
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")
SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base().save_pretrained(folder / "base")
    sae = tiny_sae(layer=1, k=4, feature_names={"5": "rivers"}, concepts={"joy": 0})
    model = SaeForCausalLM.from_base(str(folder / "base"), saes=[sae])
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "away.json").write_text('{"edits": [{"feature": "rivers", "op": "direction", "value": -40}]}')
    return folder / "model"


def invoke(*arguments: object, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments), *SHORT], input=typed)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_prompt(model: Path, tmp_path: Path) -> None:
    result = invoke(model, "w1 w2 w3", "--feature", "rivers=-40/40", "--out", tmp_path / "texts.csv")
    assert result.exit_code == 0, result.output
    rows = table(tmp_path / "texts.csv")
    assert [row["steering"] for row in rows] == ["unsteered", "direction rivers=-40", "direction rivers=40"]
    shown = result.stdout.splitlines()
    for row in rows:
        assert shown[shown.index(row["steering"]) + 1].strip() == row["text"]
    named = invoke(model, "w1 w2 w3", "--steering", "away", "--out", tmp_path / "named.csv")
    assert named.exit_code == 0 and "\naway\n" in named.stdout
    alike = Steering([{"feature": 5, "op": "direction", "value": -40}])  # pyright: ignore[reportArgumentType]
    invoke(model, "w1 w2 w3", "--steering", alike.to_json(), "--no-unsteered", "--out", tmp_path / "json.csv")
    (one,) = table(tmp_path / "json.csv")
    assert one["text"] == table(tmp_path / "named.csv")[1]["text"]


def test_a_file_of_prompts_is_a_table(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw9 [w8] w7\n")
    options = ["--prompts", tmp_path / "prompts.txt", "--scale", "joy=-100", "--drop-error"]
    result = invoke(model, *options, "--out", tmp_path / "texts.csv")
    assert result.exit_code == 0, result.output
    rows = table(tmp_path / "texts.csv")
    assert [row["prompt"] for row in rows] == ["w1 w2"] * 2 + ["w9 [w8] w7"] * 2
    assert "[w8]" in result.stdout and "scale joy=-100" in result.stdout
    again = invoke(model, *options, "--samples-per-prompt", 2, "--temperature", 1)
    assert again.exit_code == 0 and again.stdout.count("[w8]") >= 2


def test_typed_lines(model: Path, tmp_path: Path) -> None:
    result = invoke(model, "--ablate", 9, "--out", tmp_path / "texts.csv", typed=f"w1 w2\n\n{'w1 ' * 300}\nw3\n")
    assert result.exit_code == 0, result.output
    assert [row["prompt"] for row in table(tmp_path / "texts.csv")] == ["w1 w2", "w1 w2", "w3", "w3"]
    assert "must fit the model's context of 128 tokens" in " ".join(result.stderr.split())  # and the next line came


def test_a_model_that_steers_nothing_says_so(model: Path) -> None:
    result = invoke(model, "w1")
    assert result.exit_code == 0 and "Nothing is steered" in result.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["w1", "--prompts", "p.txt"], "Give a prompt or --prompts. Received: both"),
        (["w1", "--scale", "lakes=3"], "No concept or feature of that name in this SAE"),
        (["w1", "--scale", "0"], "FEATURE=VALUE"),
        (["w1", "--strengths", "1,2"], "--strengths multiply a --steering"),
        (["w1", "--steering", "towards"], "neither a file, nor one of"),
        (["w1", "--scale", "1:0=3"], "1 SAE"),
        (["--prompts", "none.txt"], "none.txt"),
    ],
)
def test_what_is_refused(model: Path, options: list[str], told: str) -> None:
    result = invoke(model, *options)
    assert result.exit_code == 2 and told in " ".join(result.stderr.split()), result.output
    assert "unsteered" not in result.stdout
