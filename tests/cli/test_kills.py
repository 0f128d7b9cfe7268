"""`kill -9` at random moments of whole commands: the same command goes on, to the files of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.create_training_data.annotation.tables import write_annotations
from tests.cli.test_align_topic import folder as align_folder
from tests.cli.test_classify import folder as classify_folder
from tests.cli.test_evaluate import SMALL, assert_same_numbers, measured
from tests.cli.test_evaluate import folder as evaluate_folder
from tests.cli.test_reduce_bias import folder as bias_folder
from tests.cli.warm_commands import WarmCommands
from tests.create_training_data.annotation.test_steps import features
from tests.create_training_data.fake_openai import FakeOpenAI
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.hub_cards import folders
from tests.loopback_hub import LoopbackHub
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.slow
# Fixtures, which have one name each there.
aligning, classifying, evaluating, biased = align_folder, classify_folder, evaluate_folder, bias_folder
KILLS, AT_ONCE = 50, 4
# Slower ones, whose every part is stopped by tests of their own.
FEWER = {"align-topic": 10, "feature-table": 10, "reduce-bias": 10}
OF_TIME = "seconds|runtime|per_second|^loss$"

VERBS: dict[str, tuple[str, Callable[[Path], list[Any]]]] = {
    "align-topic": ("aligning", lambda of: [
        of / "base", "--sae", of / "sae", "--reference", of / "reference.csv", "--topic", of / "topic.csv",
        "--embedder", of / "embedder", "--prompt-count", 24,
        "--max-new-tokens", 16, "--temperature", 1, "--max-length", 32,
    ]),
    "classify": ("classifying", lambda of: [
        of / "base", of / "train.csv", "--sae", of / "sae", "--original", of / "original.csv", "--swapped",
        of / "swapped.csv", "--seeds", "1,2", "--folds", 2, "--methods", "plain,dropout,selfreg,leace", "--top", "3",
        "--tokens-per-batch", 64,
    ]),
    "feature-table": ("aligning", lambda of: [
        of / "base", "--sae", of / "sae", "--text", of / "reference.csv", "--text-column", "0",
        "--tokens-per-batch", 32,
    ]),
    "reduce-bias": ("biased", lambda of: [
        of / "base", of / "text.txt", "--sae", of / "sae", "--winobias", of / "winobias",
        "--crows-pairs", of / "crows.csv", "--lambada", of / "last.jsonl",
        "--resamples", 200, "--counts", "0,1,2,4,8,16", "--tokens-per-batch", 64,
    ]),
    "harvest": ("texts", lambda of: [
        of / "base", of / "texts.txt", "--hook-point", "layers.0.mlp_out", "--hook-point", "layers.1.resid_post",
        "--rows-per-shard", 8, "--max-length", 16,
    ]),
    "spans": ("texts", lambda of: [
        of / "base", of / "texts.txt", "--sae", of / "sae", "--rows-per-block", 8, "--top-n", 4, "--max-length", 16,
    ]),
    "train": ("texts", lambda of: [
        "--data", of / "states", "--layer", 1, "--d_sae", 64, "--k", 4, "--max_steps", 120,
        "--save_steps", 10, "--per_device_train_batch_size", 64, "--report_to", "none",
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def commands() -> Iterator[WarmCommands]:
    with WarmCommands() as warm:
        yield warm


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, commands: WarmCommands) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    word_tokenizer().save_pretrained(folder / "base")
    tiny_base().save_pretrained(folder / "base")
    tiny_sae(layer=1, site="resid_post").save_pretrained(folder / "sae")
    (folder / "texts.txt").write_text("\n\n".join(word_texts(400)))
    words = ["harvest", *map(str, VERBS["harvest"][1](folder)), "--out", "states"]
    assert commands.wait(commands.start(words, folder, folder / "log")) == 0, (folder / "log").read_text()
    return folder


class Killing:
    """A command, run whole once, and again in other folders where it is killed at random moments until it has been
    killed often enough; each time it is let go on to its end after a few kills."""

    def __init__(
        self, commands: WarmCommands, words: Callable[[Path], list[Any]], folder: Path, enough: int = KILLS
    ) -> None:
        self.commands, self.words, self.folder, self.enough = commands, words, folder, enough
        self.draw, self.kills = random.Random(0), 0

    def _start(self, here: Path) -> int:
        here.mkdir(exist_ok=True)
        return self.commands.start([str(word) for word in self.words(here)], here, self.folder / f"{here.name}.log")

    def _end(self, here: Path) -> Path:
        code = self.commands.wait(self._start(here))
        assert code == 0, (self.folder / f"{here.name}.log").read_text()[-3000:]
        return here

    def whole(self) -> Path:
        """The folder of an undisturbed run."""
        begun = time.perf_counter()
        here = self._end(self.folder / "whole")
        self.seconds = time.perf_counter() - begun
        return here

    def each(self) -> Iterator[tuple[Path, int]]:
        """Folders of runs that were killed and went on, each with how often it was killed."""
        number = 0
        while self.kills < self.enough:
            here, killed = self.folder / f"killed-{number}", 0
            for _ in range(self.draw.randint(1, 8)):
                process = self._start(here)
                wait = time.perf_counter() + self.draw.uniform(0, self.seconds)
                while time.perf_counter() < wait and not self.commands.ended(process):
                    time.sleep(0.001)
                if not self.commands.ended(process):
                    os.kill(process, signal.SIGKILL)
                if self.commands.wait(process) != -signal.SIGKILL:
                    break  # it was faster
                killed += 1
            self.kills += killed
            yield self._end(here), killed
            number += 1


def files(out: Path) -> dict[str, Any]:
    """All that was written, but for what tells of time, and the loss, which is of the last run. A table as Parquet has
    these within, a picture and a state of Trainer their date."""
    found = {}
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.suffix not in (".png", ".parquet", ".bin", ".pth", ".pt"):
            name, data = str(file.relative_to(out)), file.read_bytes()
            found[name] = _timeless(json.loads(data)) if file.suffix == ".json" else data
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if not re.search(OF_TIME, key)}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_command_goes_on(
    verb: str, request: pytest.FixtureRequest, commands: WarmCommands, tmp_path: Path
) -> None:
    fixture, options = VERBS[verb]
    folder = request.getfixturevalue(fixture)

    def words(here: Path) -> list[Any]:
        begun = verb == "train" and any((here / "out").glob("checkpoint-*/trainer_state.json"))
        return [verb, *options(folder), "--out", "out", *(["--resume"] if begun else [])]

    killing = Killing(commands, words, tmp_path, FEWER.get(verb, KILLS))
    whole = files(killing.whole() / "out")
    for here, _ in killing.each():
        found = files(here / "out")
        assert list(found) == list(whole)
        assert [name for name in found if found[name] != whole[name]] == []


def test_a_killed_evaluation_goes_on(commands: WarmCommands, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue("evaluating")
    words = ["evaluate", folder / "model", *SMALL, "--texts", folder / "texts.txt", "--labelled"]
    words += [folder / "labelled.csv", "--crows-pairs", folder / "crows.csv", "--prompts", folder / "prompts.txt"]
    words += ["--suite", "reconstruction,detection,fairness", "--out", "out"]
    killing = Killing(commands, lambda _: words, tmp_path)
    expected = measured(killing.whole() / "out")
    for here, _ in killing.each():
        found = measured(here / "out")
        assert list(found) == list(expected)
        for suite in expected:
            assert_same_numbers(found[suite], expected[suite])
        assert [file.name for file in (here / "out").iterdir()] == ["results.json"]


def test_a_killed_explanation_pays_no_answer_twice_but_those_under_way(commands: WarmCommands, tmp_path: Path) -> None:
    table = write_annotations(features(), tmp_path / "features.tsv", ("FeatureID", "Words"))
    with FakeOpenAI() as server:
        server.delay_s = 0.02
        words = ["explain", table, "--llm", "m", "--llm-url", server.url, "--concurrency", AT_ONCE, "--out", "out"]
        killing = Killing(commands, lambda _: [*words, "--cache", "cache"], tmp_path)
        whole = (killing.whole() / "out.tsv").read_bytes()
        once = before = len(server.sent)
        for here, killed in killing.each():
            assert (here / "out.tsv").read_bytes() == whole
            assert once <= len(server.sent) - before <= once + AT_ONCE * killed
            before = len(server.sent)


def test_a_killed_push_leaves_nothing_or_all(tmp_path: Path) -> None:
    with LoopbackHub() as hub, WarmCommands(hub.environment(tmp_path / "home")) as commands:
        model = folders.model(tmp_path / "model")
        killing = Killing(commands, lambda here: ["push", model, f"tester/{here.name}", "--no-verify"], tmp_path)
        killing.whole()
        expected = hub.repo("models", "tester/whole").resolve("main").files
        for here, _ in killing.each():
            assert set(hub.repo("models", f"tester/{here.name}").resolve("main").files) == set(expected)
