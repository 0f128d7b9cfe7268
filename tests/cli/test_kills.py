"""`kill -9` at random moments: the same command goes on to the files of an undisturbed one."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_align_topic import folder as align_folder
from tests.cli.test_align_topic import texts, write
from tests.cli.test_classify import folder as classify_folder
from tests.cli.test_reduce_bias import folder as bias_folder
from tests.create_training_data.words import WORDS

pytestmark = pytest.mark.slow
aligning, classifying, biased = align_folder, classify_folder, bias_folder  # fixtures, which have one name each there
KILLS, LATEST = 6, 0.6  # seconds after the first part

VERBS: dict[str, tuple[str, Callable[[Path], list[Any]], str]] = {
    "align-topic": ("aligning", lambda of: [
        of / "base", "--sae", of / "sae", "--reference", of / "reference.csv", "--topic", of / "topic.csv",
        "--embedder", of / "embedder", "--prompt-count", 24,
        "--max-new-tokens", 16, "--temperature", 1, "--max-length", 32,
    ], "topic.partial.jsonl"),
    "classify": ("classifying", lambda of: [
        of / "base", of / "train.csv", "--sae", of / "sae", "--original", of / "original.csv", "--swapped",
        of / "swapped.csv", "--seeds", "1,2", "--folds", 2, "--methods", "plain,dropout,selfreg,leace", "--top", "3",
        "--tokens-per-batch", 64,
    ], "classify.partial.jsonl"),
    "feature-table": ("aligning", lambda of: [
        of / "base", "--sae", of / "sae", "--text", of / "long.csv", "--text-column", "0",
        "--tokens-per-batch", 32,
    ], "features.partial.jsonl"),
    "reduce-bias": ("biased", lambda of: [
        of / "base", of / "text.txt", "--sae", of / "sae", "--winobias", of / "winobias",
        "--crows-pairs", of / "crows.csv", "--lambada", of / "last.jsonl",
        "--resamples", 200, "--counts", "0,1,2,4,8,16", "--tokens-per-batch", 64,
    ], "bias.partial.jsonl"),
}  # fmt: skip


def start(verb: str, folder: Path, here: Path) -> subprocess.Popen[str]:
    here.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "sae_transformers", verb, *map(str, VERBS[verb][1](folder)), "--out", "out"]
    return subprocess.Popen(words, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def killed(process: subprocess.Popen[str], journal: Path, parts: int, wait: float) -> bool:
    """Whether the process was killed, some time after its first new part; it may have ended before."""
    while process.poll() is None and len(journal.read_bytes().splitlines() if journal.exists() else ()) <= parts:
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def files(out: Path) -> dict[str, Any]:
    """All that was written, but for seconds. The table as Parquet has these within, a picture its date."""
    found = {}
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.suffix not in (".png", ".parquet"):
            text = file.read_bytes()
            if file.suffix == ".json":
                text = re.sub(rb'"\w*seconds\w*": [-\d.e]+', b"", text)
            found[str(file.relative_to(out))] = text
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_command_goes_on(verb: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    fixture, _, name = VERBS[verb]
    if fixture == "aligning":
        write(request.getfixturevalue(fixture) / "long.csv", texts(3000, WORDS, 4), "0")  # 24 blocks
    folder, draw = request.getfixturevalue(fixture), random.Random(0)
    whole = start(verb, folder, tmp_path / "whole")
    said, _ = whole.communicate()
    assert whole.returncode == 0, said
    journal, kills = tmp_path / "killed" / "out" / name, 0
    for _ in range(KILLS):
        parts = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        kills += killed(start(verb, folder, tmp_path / "killed"), journal, parts, draw.uniform(0, LATEST))
        if not journal.exists():
            break
    assert kills >= 2
    last = start(verb, folder, tmp_path / "killed")
    said, _ = last.communicate()
    assert last.returncode == 0, said
    assert files(tmp_path / "killed" / "out") == files(tmp_path / "whole" / "out")
