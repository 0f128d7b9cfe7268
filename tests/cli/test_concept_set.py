"""The verb `concept-set`, with a server that answers by rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from sae_transformers.create_training_data.concept_sets import read_concept_sets
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text

pytestmark = pytest.mark.usefixtures("command_line")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(body: dict[str, Any]) -> str:
    text = last_user_text(body)
    if "other meaning" in text:
        return "wave: to greet\nbow: of a violin"
    if "short instructions" in text:
        return "\n".join(f"Write a line {i} please" for i in range(20))
    return "w1 w2 w3 with" if "Let this concept" in text else "w5 w6 w7 without"


def test_concept_sets_are_made_and_read(tmp_path: Path) -> None:
    (tmp_path / "concepts.txt").write_text("the sea\n\nloops\n", encoding="utf-8")
    small = ["--positives", 4, "--negatives", 5, "--test", 2, "--hard-negatives", 2, "--steering", 3, "--words", 9]
    with FakeOpenAI(answer) as server:
        given = ["concept-set", tmp_path / "concepts.txt", "--out", tmp_path / "sets", "--llm", "m"]
        given += ["--llm-url", server.url, "--cache", tmp_path / "cache", *small]
        dry = run(*given, "--dry-run", "--price-in", 1, "--price-out", 2)
        assert dry.exit_code == 0 and not server.sent and not (tmp_path / "sets").exists(), dry.output
        result = run(*given)
        assert result.exit_code == 0, result.output
        n = len(server.sent)
        again = run(*given)
        assert again.exit_code == 0 and len(server.sent) == n
    sets = read_concept_sets(tmp_path / "sets")
    assert [one.concept for one in sets] == ["the sea", "loops"]
    assert len(sets[0].train["positive"]) == 4 and len(sets[1].test["hard negative"]) == 2
    assert len(sets[0].steering_instructions) == 3


def test_missing_answers_end_as_an_error_and_are_asked_again(tmp_path: Path) -> None:
    (tmp_path / "concepts.txt").write_text("the sea\n", encoding="utf-8")
    (tmp_path / "asked.txt").write_text("".join(f"say something {i}\n" for i in range(9)), encoding="utf-8")
    small = ["--positives", 2, "--negatives", 2, "--test", 0, "--hard-negatives", 0, "--steering", 0]
    with FakeOpenAI(answer) as server:
        given = ["concept-set", tmp_path / "concepts.txt", "--out", tmp_path / "sets", "--llm", "m", *small]
        given += ["--llm-url", server.url, "--cache", tmp_path / "cache", "--instructions", tmp_path / "asked.txt"]
        server.next("400")
        failed = run(*given)
        assert failed.exit_code == 2 and "1 rejected" in failed.stderr and not (tmp_path / "sets").exists()
        assert run(*given).exit_code == 0 and len(server.sent) == 5
        few = run(*given, "--positives", 50)
        assert few.exit_code == 2 and "needs 50 different instructions. Received: 9" in few.stderr


def test_old_spellings_are_taken_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "concepts.txt").write_text("the sea\n", encoding="utf-8")
    given = ["concept-set", tmp_path / "concepts.txt", "--out", tmp_path / "sets", "--dry-run", "--max-tokens", 9]
    result = run(*given, "--model", "m", "--base-url", "http://127.0.0.1:9")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "--max-tokens is now --max-answer-tokens.", "--model is now --llm.", "--base-url is now --llm-url."
    ]  # fmt: skip
    none = run(*given)
    assert none.exit_code == 2 and "--llm" in none.stderr
    wrong = run(*given, "--llm", "m", "--positives", 0)
    assert wrong.exit_code == 2 and "--positives must be an integer of 1 or more." in wrong.stderr
