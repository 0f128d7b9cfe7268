import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from sae_transformers.create_training_data.spans.files import read_spans
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("spans")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base().save_pretrained(folder / "base")
    tiny_sae(layer=1, site="resid_post").save_pretrained(folder / "sae")
    tiny_sae(layer=1, site="resid_post", d_in=16).save_pretrained(folder / "narrow")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in word_texts(9)))
    return {name: folder / name for name in ("base", "sae", "narrow", "texts.jsonl")}


def spans(folders: dict[str, Path], out: Path, *options: object, sae: str = "sae") -> Result:
    arguments = ["spans", folders["base"], folders["texts.jsonl"], "--sae", folders[sae], "--out", out]
    arguments += ["--text-column", "body", "--max-length", 32, *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_from_a_file_to_tables_and_again(folders: dict[str, Path], tmp_path: Path) -> None:
    options = ["--top-n", 2, "--window", 3, "--rows-per-block", 4, "--template", "w1 {text}"]
    result = spans(folders, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    found = read_spans(tmp_path / "out")
    assert f" {sum(map(len, found.values()))} " in result.stdout and f" {len(found)} " in result.stdout
    assert all(1 <= len(entry.span.split()) <= 3 for entries in found.values() for entry in entries)
    again = spans(folders, tmp_path / "out", *options)
    assert again.exit_code == 0 and again.stdout == result.stdout
    (tmp_path / "template.txt").write_text("w1 {text}")
    from_file = spans(folders, tmp_path / "b", *options[:-2], "--template-file", tmp_path / "template.txt")
    assert from_file.exit_code == 0 and read_spans(tmp_path / "b") == found


def test_a_run_that_failed_before_it_wrote_anything_does_not_refuse_the_right_command(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    wrong = spans(folders, tmp_path / "out", "--text-column", "texte")
    assert wrong.exit_code == 2 and "needs the column 'texte'" in wrong.stderr, wrong.output
    right = spans(folders, tmp_path / "out")
    assert right.exit_code == 0, right.output
    assert json.loads((tmp_path / "out" / "work" / "index.json").read_text())["source"]["column"] == "body"
    other = spans(folders, tmp_path / "out", "--top-n", 3)
    assert other.exit_code == 2 and "Spans go on with what they began with" in other.stderr


def test_the_first_rows_only(folders: dict[str, Path], tmp_path: Path) -> None:
    assert spans(folders, tmp_path, "--max-rows", 2, "--exclude-peak", "--skip-first", 0).exit_code == 0
    assert {entry.text_id for entries in read_spans(tmp_path).values() for entry in entries} == {0, 1}


def test_a_process_that_is_not_the_last_says_so(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = spans(folders, tmp_path, "--rows-per-block", 2)
    assert result.exit_code == 0 and "process 1:" in result.stdout and "still at work" in result.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--top-n", 0], "--top-n=0"),
        (["--activation", "gelu"], "activation='gelu'"),
        (["--template", "none"], "template='none'"),
        (["--template", "{text}", "--template-file", "x"], "Received: both"),
        (["--template-file", "nothing.txt"], "nothing.txt"),
        (["--max-rows", 0], "--max-rows=0"),
        (["--hook-point", "layers.9.resid_post"], "layer=9"),
    ],
)
def test_mistakes_end_as_one_line(folders: dict[str, Path], tmp_path: Path, options: list, told: str) -> None:
    result = spans(folders, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]


def test_an_sae_of_another_width_is_one_line_too(folders: dict[str, Path], tmp_path: Path) -> None:
    result = spans(folders, tmp_path, sae="narrow")
    assert result.exit_code == 2 and "d_in=16" in result.stderr.splitlines()[-1]
