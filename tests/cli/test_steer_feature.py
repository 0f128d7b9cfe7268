"""The verb `steer-feature`: the same prompt with steering and without."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base().save_pretrained(folder / "base")
    tiny_sae(layer=1, k=4, feature_names={"5": "rivers"}).save_pretrained(folder / "sae")
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def steer(folder: Path, *options: object) -> Result:
    return invoke("steer-feature", folder / "base", "w1 w2 w3", "--sae", folder / "sae", *options)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:3]] for line in table.splitlines() if line.startswith("│")]


def test_steering_side_by_side(folder: Path) -> None:
    options = ["--feature", 5, "--samples-per-prompt", 2, "--max-new-tokens", 4, "--layer", 1]
    result = steer(folder, *options, "--strength", 40)
    assert result.exit_code == 0, result.output
    assert "feature 5, 40 absolute" in result.stdout and "unsteered" in result.stdout
    assert steer(folder, *options, "--strength", 40).stdout == result.stdout
    named = steer(folder, "--feature", "rivers", *options[2:], "--strength", 40)
    assert "feature rivers, 40 absolute" in named.stdout, named.output
    assert cells(named.stdout) == cells(result.stdout)
    old = steer(folder, "--feature", 5, "--samples", 2, "--max-new-tokens", 4, "--coefficient", 40)
    assert cells(old.stdout) == cells(result.stdout)
    assert "--coefficient is now --strength." in old.stderr and "--samples is now --samples-per-prompt." in old.stderr
    nothing = steer(folder, *options, "--strength", 0, "--legacy").stdout
    rows = cells(nothing)
    assert rows and all(steered == unsteered for steered, unsteered in rows)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--feature", 5, "--strength", 1, "--layer", 2], "layers.1.resid_post"),
        (["--feature", 64, "--strength", 1], "feature=64"),
        (["--feature", 5, "--strength", "nan"], "value=nan"),
        (["--feature", 5, "--strength", 1, "--max-new-tokens", 200], "context of 128"),
    ],
)
def test_steering_mistakes(folder: Path, options: list, told: str) -> None:
    result = steer(folder, *options)
    assert result.exit_code == 2 and told in result.stderr, result.output


def test_the_texts_as_a_table(folder: Path, tmp_path: Path) -> None:
    result = steer(folder, "--feature", 5, "--strength", 40, "--max-new-tokens", 4, "--out", tmp_path / "texts.csv")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "texts.csv").read_text().splitlines()[0] == "steered,unsteered"


def test_a_strength_is_needed(folder: Path) -> None:
    result = steer(folder, "--feature", 5)
    assert result.exit_code == 2 and "Missing option '--strength'" in result.stderr
