"""The blocks of a page, run in this process: Python in one namespace, commands by the command line's own parser."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sae_transformers.cli import app
from sae_transformers.serving import listening
from tests.docs.pages import Block

# Options that make a page's command short enough for a test, after its own.
SHORTER = {
    "ask-features": "--max-rows 4",
    "classify": "--seeds 1,2 --folds 2",
    "concept-set": "--positives 4 --negatives 4 --test 2 --hard-negatives 2 --steering 2",
    "evaluate": "--max-new-tokens 4 --resamples 20 --repeats 1 --strengths 0.2,-0.2 --seeds 0 --ks 1 --no-trees",
    "explain": "--max-rows 4",
    "judge": "--max-rows 4",
    "push": "--no-verify",  # by new interpreters; tests/test_whole_way.py and tests/invariants/test_hub.py do
    "reduce-bias": "--counts 0,1 --max-texts 8 --resamples 20 --random-seeds 1",
    "select-knowledge": "--test 4 --dev 2 --pool 8 --shots 1 --seeds 42 --proportions 0.1 --strengths 2",
    "steer": "--max-new-tokens 4 --top 1 --pool 2",
    "train": "--max_steps 2",
}
SMALLER = {"steps=500": "steps=2", "max_new_tokens=40": "max_new_tokens=4"}  # the same for Python
SMALLER |= {" Paris": "P", " London": "L"}  # tokens of the tiny vocabulary


class PageRun:
    """Runs the blocks of one page in order; what they define, write and serve stays for the next ones."""

    def __init__(self, port: int) -> None:
        self.namespace: dict[str, Any] = {"__name__": "page"}
        self.port = port
        self.servers = ExitStack()

    def __enter__(self) -> PageRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.servers.close()

    def block(self, block: Block) -> None:
        if block.language == "python":
            code = "\n" * (block.line - 1) + self._fitted(block.code)  # so that an error names the page's line
            exec(compile(code, block.page, "exec", dont_inherit=True), self.namespace)  # noqa: S102
        for words in block.commands():
            self.command([self._fitted(word) for word in words], block.place)

    def command(self, words: list[str], place: str) -> None:
        verb = words[0]
        if verb == "serve":
            self.servers.enter_context(serving(words if "--port" in words else [*words, "--port", "0"]))
            return
        result = CliRunner().invoke(app, [*words, *SHORTER.get(verb, "").split()])
        if result.exit_code:
            pytest.fail(f"{place}: {' '.join(words)}\n{result.output}\n{result.exception!r}", pytrace=False)

    def _fitted(self, code: str) -> str:
        for long, short in SMALLER.items():
            code = code.replace(long, short)
        return re.sub(r"\b8000\b", str(self.port), code)


@contextmanager
def serving(words: list[str]) -> Iterator[None]:
    """The verb `serve` in a thread, which answers until the block ends."""
    made: list[Any] = []
    thread = threading.Thread(
        target=typer.main.get_command(app).main, args=(words,), kwargs={"standalone_mode": False}
    )
    with pytest.MonkeyPatch.context() as patch:
        original = listening.listener

        def remembered(*arguments: Any) -> Any:
            made.append(original(*arguments))
            return made[-1]

        patch.setattr(listening, "listener", remembered)
        thread.start()
        while thread.is_alive() and not (made and made[0].started):
            time.sleep(0.005)
    try:
        assert made and made[0].started, " ".join(words)
        yield
    finally:
        for server in made:
            server.should_exit = True
        thread.join()
