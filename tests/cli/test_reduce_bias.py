"""The verb `reduce-bias` on a tiny model whose words are he, she and some occupations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from sae_transformers import SaeForCausalLM, Steering
from sae_transformers.cli import app
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")

WORDS = [
    *("<pad>", "<s>", "</s>", "<unk>", "he", "she", "him", "her", "his", "the", "nurse", "clerk", "guard", "saw"),
    *("met", "and", "then", "left", "because", "of", "work", ".", "A", "B"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("bias"), random.Random(0)
    tokenizer().save_pretrained(folder / "base")
    tiny_base(vocab_size=len(WORDS)).save_pretrained(folder / "base")
    tiny_sae(layer=1).save_pretrained(folder / "sae")
    texts = [" ".join(draw.choices(WORDS[4:21], k=10)) for _ in range(40)]
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "dull.txt").write_text("the clerk left\n\nthe guard met\n", encoding="utf-8")
    (folder / "winobias").mkdir()
    for part in ("dev", "test"):
        for number in (1, 2):
            lines: dict[str, list[str]] = {"pro": [], "anti": []}
            for i in range(6):
                start = f"{i + 1} [the {draw.choice(WORDS[10:13])}] {draw.choice(WORDS[13:15])} the clerk because"
                for side, word in (("pro", "she"), ("anti", "he")):
                    lines[side].append(f"{start} [{word}] left the work .")
            for side, rows in lines.items():
                (folder / "winobias" / f"{side}_stereotyped_type{number}_{part}.txt").write_text(
                    "\n".join(rows) + "\n"
                )
    kinds = ["gender", "age"] * 4
    rows = [f'{i},"she {w} of work","he {w} of work",stereo,{kinds[i]}' for i, w in enumerate(WORDS[9:17])]
    (folder / "crows.csv").write_text(",sent_more,sent_less,stereo_antistereo,bias_type\n" + "\n".join(rows) + "\n")
    (folder / "last.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:12]))
    return folder


def reduce(folder: Path, out: Path, *options: object, text: str = "text.txt") -> Result:
    arguments = ["reduce-bias", folder / "base", folder / text, "--sae", folder / "sae", "--out", out]
    counts = [] if "--counts" in options else ["--counts", "0,1,4"]
    arguments += ["--winobias", folder / "winobias", "--resamples", 20, *counts, *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("find", ["swaps", "tokens", "contrast"])
def test_from_texts_to_a_steering(folder: Path, tmp_path: Path, find: str) -> None:
    options = ["--crows-pairs", folder / "crows.csv", "--lambada", folder / "last.jsonl", "--random-counts", "4"]
    result = reduce(folder, tmp_path, "--find", find, *options, "--max-loss", 99)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert list(found["runs"]) == [f"0 {find}", f"1 {find}", f"4 {find}", "4 random, draw 1"]
    plain, four = found["runs"][f"0 {find}"], found["runs"][f"4 {find}"]
    assert list(plain) == [
        "WinoBias 1 choose", "WinoBias 2 choose", "WinoBias 1 test", "WinoBias 2 test", "CrowS gender", "CrowS other",
        "LAMBADA choose", "LAMBADA",
    ]  # fmt: skip
    assert plain["CrowS gender"]["sentence"]["pairs"]["value"] == 4
    assert plain["WinoBias 1 test"]["sentence"]["change"]["value"] == 0 == plain["LAMBADA"]["lost"]["value"]
    assert four["WinoBias 1 test"]["sentence"]["change"]["value"] != 0 != four["LAMBADA"]["lost"]["value"]
    gaps = [run["WinoBias 1 test"]["sentence"]["gap"]["value"] for run in (plain, four)]
    assert gaps[1] - gaps[0] == pytest.approx(four["WinoBias 1 test"]["sentence"]["change"]["value"])
    chosen = found["facts"]["chosen"]
    judged = {
        n: sum(abs(found["runs"][f"{n} {find}"][f"WinoBias {t} choose"]["sentence"]["gap"]["value"]) for t in (1, 2))
        for n in (0, 1, 4)
    }
    assert chosen == min(judged, key=lambda n: (judged[n], n))
    steering = Steering.from_dict(json.loads((tmp_path / "steering.json").read_text()))
    assert [edit.feature for edit in steering.feature_edits] == found["facts"]["features"][:chosen]
    SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=1)]).prepare_steering(steering)


def test_a_loss_that_is_not_allowed_chooses_nothing(folder: Path, tmp_path: Path) -> None:
    options = ["--lambada", folder / "last.jsonl", "--max-loss", -0.001, "--random-seeds", 0, "--op", "clamp"]
    result = reduce(folder, tmp_path, *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    runs = {key: run["LAMBADA choose"]["lost"]["value"] for key, run in found["runs"].items()}
    allowed = [int(key.split()[0]) for key, lost in runs.items() if lost <= -0.001]
    assert found["facts"]["chosen"] in [0, *allowed]
    assert found["facts"]["random_features"] == []


def test_old_spellings_are_taken_with_a_note(folder: Path, tmp_path: Path) -> None:
    options = ["--tokens-at-once", 256, "--place", "layers.0.resid_post", "--random-seeds", 0, "--counts", "0"]
    result = reduce(folder, tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "--tokens-at-once is now --tokens-per-batch." in result.stderr.splitlines()
    assert "--place is now --hook-point." in result.stderr.splitlines()
    assert "layers.0.resid_post" in result.stdout


@pytest.mark.parametrize(
    ("options", "text", "told"),
    [
        (["--find", "words"], "text.txt", "'words'"),
        (["--op", "scale"], "text.txt", "'scale'"),
        (["--counts", "1,x"], "text.txt", "'1,x'"),
        (["--counts", "-1"], "text.txt", "--counts=(-1,)"),
        ([], "dull.txt", "rows with gendered words"),
        (["--max-length", 999], "text.txt", "from 2 to 128"),
        (["--words", "he"], "text.txt", "'he'"),
        (["--crows-pairs", "nowhere.csv"], "text.txt", "nowhere.csv"),
        (["--winobias", "nowhere"], "text.txt", "nowhere"),
    ],
)
def test_mistakes_end_as_one_line(folder: Path, tmp_path: Path, options: list, text: str, told: str) -> None:
    result = reduce(folder, tmp_path / "out", *options, text=text)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and told in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
