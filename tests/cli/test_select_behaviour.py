"""The verb `select-behaviour`, on a tiny model and prompts that end differently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from sae_transformers import Steering
from sae_transformers.cli import app
from tests.conflict_questions import write_selection_files

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_selection_files(tmp_path_factory.mktemp("select"), with_questions=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def behaviour(folder: Path, out: Path, *options: object) -> Result:
    start = ["select-behaviour", folder / "base", folder / "a.txt", folder / "b.txt", "--sae", folder / "sae1"]
    return run(*start, "--out", out, *options)


def test_behaviour(folder: Path, tmp_path: Path) -> None:
    result = behaviour(folder, tmp_path, "--count", 6, "--strength", 3, "--save-model", "b", "--activation", "relu")
    assert result.exit_code == 0, result.output
    told = re.search(r"what tells A from B.*?(\d\.\d{3})", result.output, re.DOTALL)
    assert told and float(told[1]) > 0.8  # the last word tells the groups apart, so features do
    steering = {s: Steering.from_dict(json.loads((tmp_path / f"towards-{s}.json").read_text())) for s in "ab"}
    assert {edit.feature for edit in steering["a"].feature_edits} == {e.feature for e in steering["b"].feature_edits}
    assert len(steering["a"].edits) == 6
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert len(model.steering.edits) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", 0], "count=0"),
        (["--proportion", 2], "proportion=2.0"),
        (["--positions", "first"], "positions='first'"),
        (["--hook-point", "layers.1.mlp_up"], "mlp_up"),
    ],
)
def test_behaviour_refuses(folder: Path, tmp_path: Path, options: list[object], message: str) -> None:
    result = behaviour(folder, tmp_path, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_behaviour_needs_two_groups(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("w1\n\n", encoding="utf-8")
    result = run(
        "select-behaviour", folder / "base", folder / "a.txt", tmp_path / "empty.txt", "--sae", folder / "sae1"
    )
    assert result.exit_code == 2
    assert "Received: 1 in" in " ".join(result.output.split())
    long = "\n".join(["w1 " * 400] * 6)
    (tmp_path / "long.txt").write_text(long, encoding="utf-8")
    result = run(
        "select-behaviour", folder / "base", folder / "a.txt", tmp_path / "long.txt", "--sae", folder / "sae1"
    )
    assert result.exit_code == 2
    assert "at most 256 tokens" in " ".join(result.output.split())


def test_a_table_and_old_spellings(folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        lines = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        (tmp_path / f"{name}.csv").write_text("\n".join(["said", *lines]), encoding="utf-8")
    new = behaviour(folder, tmp_path / "new", "--count", 6, "--strength", 3)
    start = ["select-behaviour", folder / "base", tmp_path / "a.csv", tmp_path / "b.csv", "--sae", folder / "sae1"]
    old = run(*start, "--out", tmp_path / "old", "--count", 6, "--degree", 3, "--column", "said")
    assert new.exit_code == old.exit_code == 0, old.output
    assert old.stderr == "--degree is now --strength.\n--column is now --text-column.\n"
    assert (tmp_path / "new" / "towards-a.json").read_bytes() == (tmp_path / "old" / "towards-a.json").read_bytes()


def test_what_is_wrong_is_said_before_a_model_is_read(folder: Path, tmp_path: Path) -> None:
    start = ["select-behaviour", tmp_path / "nowhere", folder / "a.txt"]
    missing = run(*start, tmp_path / "b.txt")
    assert missing.exit_code == 2 and "There is no file" in missing.stderr and "b.txt" in missing.stderr
    both = run(*start, folder / "b.txt", "--count", 3, "--proportion", 0.1)
    assert both.exit_code == 2 and "Give --proportion or --count." in both.stderr
