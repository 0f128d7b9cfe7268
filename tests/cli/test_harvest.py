"""The verb `harvest`, from a file to a store."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from sae_transformers.cli import app
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import WIDTH, tiny_base

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    word_tokenizer().save_pretrained(folder)
    tiny_base().save_pretrained(folder)
    return folder


def harvest(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["harvest", *map(str, arguments), "--max-length", "16"])


def test_from_a_file_to_a_store_and_again(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts.jsonl"
    rows = [{"body": t, "toxic": i % 2} for i, t in enumerate(word_texts(9))]
    text.write_text("\n".join(map(json.dumps, rows)))
    options = ["--hook-point", "layers.0.mlp_out", "--hook-point", "layers.1.resid_post", "--out", tmp_path / "store"]
    options += ["--text-column", "body", "--label", "toxic", "--rows-per-shard", 4, "--dtype", "float16"]
    result = harvest(model_folder, text, *options)
    assert result.exit_code == 0, result.output
    total = json.loads((tmp_path / "store" / "complete.json").read_text())["n_tokens"]
    assert f" {total} " in result.stdout and "tokens/s" in result.stdout
    index = json.loads((tmp_path / "store" / "index.json").read_text())
    assert index["model"] == str(model_folder) and index["dtype"] == "float16" and index["labels"] == ["toxic"]
    assert index["places"] == {"layers.0.mlp_out": WIDTH, "layers.1.resid_post": WIDTH}
    shard = load_file(tmp_path / "store" / "shard-000001.safetensors")
    assert shard["labels"][:, 0].tolist() == (shard["row"] % 2).tolist()
    again = harvest(model_folder, text, *options)
    assert again.exit_code == 0 and "- " in again.stdout


def test_the_first_rows_only(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts.txt"
    text.write_text("\n\n".join(word_texts(9)))
    place = ["--hook-point", "layers.1.resid_post", "--rows-per-shard", 2, "--no-pack"]
    assert harvest(model_folder, text, *place, "--out", tmp_path / "a", "--max-rows", 3).exit_code == 0
    assert load_file(tmp_path / "a" / "shard-000001.safetensors")["row"].unique().tolist() == [2]
    assert harvest(model_folder, text, *place, "--out", tmp_path / "b", "--max-tokens", 1).exit_code == 0
    assert json.loads((tmp_path / "b" / "index.json").read_text())["settings"]["source"]["max_rows"] == 2


def test_a_process_that_is_not_the_last_says_so(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "texts.txt"
    text.write_text("\n\n".join(word_texts(9)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    options = ["--hook-point", "layers.1.resid_post", "--rows-per-shard", 2, "--out", tmp_path / "store"]
    result = harvest(model_folder, text, *options)
    assert result.exit_code == 0 and "process 1:" in result.stdout and "still at work" in result.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook-point": "layers.9.resid_post"}, "layer=9"),
        ({"hook-point": "layers.1.nowhere"}, "hook='layers.1.nowhere'"),
        ({"text": "nothing.txt"}, "There is no file 'nothing.txt'"),
        ({"model": "."}, "holds no config.json"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"model-dtype": "int8"}, "--model-dtype='int8'"),
        ({"txt-rows": "page"}, "--txt-rows='page'"),
        ({"text-column": "body"}, "needs the column 'body'"),
        ({"label": "toxic"}, "needs the column 'toxic'"),
        ({"max-rows": 0}, "--max-rows=0"),
        ({"out": "{file}"}, "cannot be written"),
    ],
)
def test_mistakes_end_as_one_line(
    changes: dict, message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "texts.txt"
    file.write_text("w1 w2 w3")
    options = {"hook-point": "layers.1.resid_post", "out": tmp_path / "store", **changes}
    model, text = options.pop("model", model_folder), options.pop("text", file)
    if options["out"] == "{file}":
        options["out"] = file
    result = harvest(model, text, *(part for name, value in options.items() for part in (f"--{name}", value)))
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and message in result.stderr.splitlines()[-1]


def test_a_run_that_failed_before_it_wrote_anything_does_not_refuse_the_right_command(
    model_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text("\n".join(json.dumps({"body": t, "toxic": 1}) for t in word_texts(9)))
    options = [model_folder, text, "--out", tmp_path / "store", "--hook-point", "layers.1.resid_post"]
    wrong = harvest(*options, "--text-column", "texte")
    assert wrong.exit_code == 2 and "needs the column 'texte'" in wrong.stderr
    assert not (tmp_path / "store").exists()
    right = harvest(*options, "--text-column", "body", "--label", "toxic")
    assert right.exit_code == 0, right.output
    index = json.loads((tmp_path / "store" / "index.json").read_text())
    assert index["labels"] == ["toxic"] and index["settings"]["source"]["column"] == "body"


def test_a_store_with_other_settings_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("w1 w2 w3")
    options = [model_folder, tmp_path / "texts.txt", "--out", tmp_path / "store", "--hook-point"]
    assert harvest(*options, "layers.1.resid_post").exit_code == 0
    result = harvest(*options, "layers.0.resid_post")
    assert result.exit_code == 2 and "continues with the settings it began with" in result.stderr


def test_old_spellings_are_still_taken(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"body": "w1 w2 w3"}')
    old = ["--place", "layers.1.resid_post", "--column", "body", "--keep-first", "--tokens-at-once", 8]
    result = harvest(model_folder, tmp_path / "texts.jsonl", *old, "--drop-special", "--out", tmp_path / "store")
    assert result.exit_code == 0, result.output
    for note in ("--place is now --hook-point.", "--keep-first is now --skip-first 0."):
        assert note in result.stderr
    settings = json.loads((tmp_path / "store" / "index.json").read_text())["settings"]
    assert settings["skip_first"] is False and settings["drop_special_tokens"] is True
    switch = ["--hook-point", "layers.1.resid_post", "--text-column", "body", "--skip-first"]
    result = harvest(model_folder, tmp_path / "texts.jsonl", *switch, "--out", tmp_path / "other")
    assert result.exit_code == 0 and "--skip-first is now --skip-first 1." in result.stderr, result.output
    assert json.loads((tmp_path / "other" / "index.json").read_text())["settings"]["skip_first"] is True
