"""How verbs end that cannot go on: sentences, with options as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import sae_transformers
from sae_transformers.cli import app
from sae_transformers.cli.errors import sentence
from tests.tiny import tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")


def last_line(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    (tmp_path / "labelled.csv").write_text("text,label\n" + "a,0\nb,1\n" * 4)
    return tmp_path / "labelled.csv"


def test_a_file_that_is_not_there_is_told_in_a_sentence(tmp_path: Path, labelled: Path) -> None:
    ask = ["--question", "Even?", "--out", tmp_path / "a.csv"]
    bias = ["reduce-bias", "m", labelled, "--sae", "s", "--out", tmp_path / "out"]
    (tmp_path / "folder").mkdir()
    for arguments, name in (
        (["steer", "m", labelled, "--sae", "s", "--prompts", "nope.txt"], "nope.txt"),
        (["explain", "nothere", "--out", tmp_path / "e"], "nothere"),
        (["ask-features", "nothere", *ask], "nothere"),
        ([*bias, "--winobias", tmp_path / "folder"], str(tmp_path / "folder")),
    ):
        line = last_line(*arguments)
        assert line.startswith("Error: There is no file") and name in line and "Errno" not in line, line
    line = last_line("ask-features", tmp_path / "folder", *ask)
    assert line.startswith(
        "Error: Expected a folder with features.tsv, which spans writes, or words.tsv, which feature"
    )
    assert f"Received: {str(tmp_path / 'folder')!r} with neither" in line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(2, "No such file or directory", "a"), "There is no file or folder 'a'."),
        (IsADirectoryError(21, "Is a directory", Path("a")), "Expected a file. Received: 'a', which is a folder."),
        (NotADirectoryError(20, "?", b"a/b"), "Received: 'a/b', where a part of the path is a file."),
        (PermissionError(13, "Permission denied", "a"), "'a' could not be read or written: Permission denied."),
        (FileNotFoundError("There is no file 'a'."), "There is no file 'a'."),
        (ValueError("`a` must be 1. Received: a=None."), "`a` must be 1. Received: a=None."),
    ],
)
def test_errors_of_the_system_are_sentences(error: Exception, told: str) -> None:
    assert sentence(error).endswith(told)


def test_options_are_named_as_they_are_typed(tmp_path: Path) -> None:
    tiny_sae(layer=1).save_pretrained(tmp_path / "sae")
    given = ["attach", "--sae", tmp_path / "sae", "--out", tmp_path / "m"]
    assert last_line(*given).endswith("The SAEs name 0 base models; give one with --base. Received: no --base.")
    assert "--head must be one of" in (line := last_line(*given, "--base", "x", "--head", "chat")), line
    assert "Received: --head='chat'." in line
    line = last_line("convert", tmp_path / "sae", tmp_path / "out", "--to", "gguf")
    assert "--to must be one of" in line and "Received: --to='gguf'" in line
    (tmp_path / "a.txt").write_text("w1")
    line = last_line("harvest", "m", tmp_path / "a.txt", "--place", "x", "--out", tmp_path / "s", "--max-length", 1)
    assert line.endswith("--max-length must be an integer of 2 or more. Received: --max-length=1.")


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"sae-transformers {sae_transformers.__version__}\n")
