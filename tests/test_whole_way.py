"""docs/whole-way.md, line by line, with a tiny base and the loopback Hub: train, measure, show, push, load, serve."""

from __future__ import annotations

import json
import random
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.create_training_data.words import WORDS, word_tokenizer
from tests.loopback_hub import USER, LoopbackHub, Repo
from tests.tiny import tiny_base

PAGE = Path(__file__).parents[1] / "docs" / "whole-way.md"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMAND_LINE = [sys.executable, "-m", "sae_transformers"]
BLOCKED = "import sys; sys.modules['sae_transformers'] = None; exec(compile(open(sys.argv[1]).read(), 'page', 'exec'))"


def blocks() -> list[tuple[str, str]]:
    """Language and code of every block, in order."""
    text = PAGE.read_text(encoding="utf-8").replace("you/sentiment", f"{USER}/sentiment")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def put_base(hub: LoopbackHub, folder: Path) -> None:
    """A tiny model under the base's name: the page runs as it is written."""
    tiny_base(vocab_size=len(word_tokenizer()), max_position_embeddings=512).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repo = hub.repos["models", BASE] = Repo("models", BASE)
    repo.commit("main", files, "a tiny base")


def write_data(folder: Path) -> None:
    draw = random.Random(0)

    def words(label: int) -> str:
        return " ".join([*draw.choices(WORDS[:5] if label else WORDS[5:10], k=6), *draw.choices(WORDS[20:], k=4)])

    for name, count in (("reviews", 300), ("held_out", 60)):
        rows = [f"{words(i % 2)},{i % 2}" for i in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    (folder / "held_out.txt").write_text("\n\n".join(words(i % 2) for i in range(40)), encoding="utf-8")
    (folder / "prompts.txt").write_text("".join(f"{words(i % 2)[:12]}\n" for i in range(4)), encoding="utf-8")
    (facts,) = [text for language, text in blocks() if language == "yaml"]
    (folder / "facts.yaml").write_text(facts, encoding="utf-8")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def listening(command: list[str], port: int, log: Path, **options: Any) -> Iterator[None]:
    """A server that answers at `port` until the block ends."""
    with log.open("w+") as file, subprocess.Popen(command, stdout=file, stderr=file, **options) as server:
        try:
            until = time.monotonic() + 300
            while not answers(port):
                file.seek(0)
                assert server.poll() is None and time.monotonic() < until, file.read()
                time.sleep(0.5)
            yield
        finally:
            server.terminate()


def test_the_page_has_every_step() -> None:
    verbs = [words[1] for language, text in blocks() if language == "bash" for words in commands(text)]
    assert verbs == ["quickstart", "evaluate", "feature-table", "spans", "dashboard", "card", "push", "serve"]
    assert [language for language, _ in blocks()] == [
        "bash", "bash", "bash", "bash", "yaml", "bash", "python", "bash", "python",
    ]  # fmt: skip


@pytest.mark.hub
def test_every_line_of_the_page(hub: LoopbackHub, tmp_path: Path) -> None:
    home, work, port = tmp_path / "home", tmp_path / "work", free_port()
    work.mkdir()
    put_base(hub, tmp_path / "base")
    write_data(work)
    environment = {**hub.environment(home), "SAE_TRANSFORMERS_CACHE": str(home)}

    def run(command: list[str]) -> str:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def run_python(text: str) -> str:
        (work / "page.py").write_text(text, encoding="utf-8")
        return run([sys.executable, "-c", BLOCKED, "page.py"])

    *before, (_, serving), (_, asking) = blocks()
    printed, again = [], []
    for language, text in before:
        if language == "python":
            printed.append(run_python(text))
        for _, verb, *words in commands(text) if language == "bash" else ():
            run([*COMMAND_LINE, verb, *words, *(["--small"] if verb == "quickstart" else [])])
            if verb == "push":
                again = [*COMMAND_LINE, verb, *words]

    record = json.loads((work / "measured" / "results.json").read_text(encoding="utf-8"))
    assert list(record["suites"]) == ["reconstruction", "detection", "steering", "speed"]
    repo = hub.repos["models", f"{USER}/sentiment"]
    files = repo.resolve("main").files
    assert len(list(repo.history("main"))) == 2  # the Hub's own first commit, and one with everything
    assert {"config.json", "README.md", "modeling_sae_causal_lm.py", "dashboard/dashboard.html"} <= set(files)
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card and "Film reviews with their sentiment." in card and BASE in card
    assert str(tmp_path) not in card and json.loads(files["config.json"])["base_model_name_or_path"] == BASE
    run(again)  # nothing is new
    assert len(list(repo.history("main"))) == 2
    assert printed[0].split()[:3] == ["<unk>"] * 3 and len(printed[0].split()) > 3

    ((_, *words),) = commands(serving)
    words[words.index("--port") + 1] = str(port)
    with listening([*COMMAND_LINE, *words], port, tmp_path / "server.log", cwd=work, env=environment):
        assert run_python(asking.replace(":8000/", f":{port}/")).split()
