"""The verb `ask-features`, from a table to a table."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from sae_transformers.create_training_data.annotation.questions import annotation_rows
from sae_transformers.create_training_data.annotation.tables import write_annotations
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text

pytestmark = pytest.mark.usefixtures("command_line")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def yes_to_even(body: dict[str, Any]) -> str:
    numbers = map(int, re.findall(r"^Feature (\d+)", last_user_text(body), flags=re.MULTILINE))
    return json.dumps({"answers": [{"feature": n, "reason": "", "answer": "no" if n % 2 else "yes"} for n in numbers]})


def test_a_question(tmp_path: Path) -> None:
    rows = annotation_rows([["w1", "w2"]] * 64)
    (tmp_path / "out").mkdir()
    write_annotations(rows, tmp_path / "out" / "words.tsv", ("FeatureID", "Words"))
    arguments = ["ask-features", tmp_path / "out" / "words.tsv", "--question", "Even?", "--out", tmp_path / "even.csv"]
    with FakeOpenAI(yes_to_even) as server:
        options = [
            "--llm",
            "m",
            "--llm-url",
            server.url,
            "--cache",
            tmp_path / "cache",
            "--max-rows",
            7,
            "--features-per-request",
            4,
        ]
        dry = invoke(*arguments, *options, "--dry-run")
        assert dry.exit_code == 0 and not server.sent and not (tmp_path / "even.csv").exists()
        result = invoke(*arguments, *options)
        assert result.exit_code == 0, result.output
        assert len(server.sent) == 2
        folder_given = invoke("ask-features", tmp_path / "out", *arguments[2:], *options)
        assert folder_given.exit_code == 0 and len(server.sent) == 2  # the same features: all answered
        server.always = "500"
        again = invoke(*arguments, *options[:-4], "--max-rows", 9, "--features-per-request", 9, "--max-attempts", 1)
    assert "yes: 4, no: 3" in result.stdout and "yes: features 0, 2, 4, 6" in result.stdout
    with (tmp_path / "even.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9
    assert again.exit_code == 1 and "9 of 9 features have no answer" in again.stderr
    assert invoke(*arguments).exit_code == 2  # which model?
