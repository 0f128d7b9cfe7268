"""Commands as processes of their own that begin with the library imported, so that many can be started and killed.

    with WarmCommands() as commands:
        running = commands.start(["harvest", ...], here, log)
        os.kill(running, signal.SIGKILL)
        commands.wait(running)  # -9

One process imports everything and forks each command from itself; this file is its program too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULES = ("datasets", "openai", "pyarrow.parquet", "transformers.models.llama.modeling_llama", "transformers.trainer")
READY = "ready\n"
ROOMS = "workflows create_training_data evaluation training hub_cards modeling cli"


class WarmCommands:
    """env: added to the environment, before anything is imported."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        words = [sys.executable, "-m", __name__]
        self._first = subprocess.Popen(words, text=True, env={**os.environ, **(env or {})}, **pipes)

    def __enter__(self) -> WarmCommands:
        assert self._first.stdout is not None and self._first.stdout.readline() == READY
        return self

    def __exit__(self, *_: object) -> None:
        self._first.kill()
        self._first.communicate()

    def _ask(self, **question: Any) -> int:
        assert self._first.stdin is not None and self._first.stdout is not None
        self._first.stdin.write(json.dumps(question) + "\n")
        self._first.stdin.flush()
        return int(self._first.stdout.readline())

    def start(self, words: list[str], here: Path, log: Path) -> int:
        """The id of the process that runs `sae-transformers` with these words in a folder."""
        return self._ask(words=words, here=str(here), log=str(log))

    def ended(self, process: int) -> bool:
        return bool(self._ask(ended=process))

    def wait(self, process: int) -> int:
        """Its exit code, or minus the signal that ended it."""
        return self._ask(wait=process)


def _run(words: list[str], here: str, log: str) -> int:
    from sae_transformers.cli import app

    os.setpgid(0, 0)
    with open(os.devnull) as nothing, open(log, "a") as told:  # noqa: PTH123
        for stream, number in ((nothing, 0), (told, 1), (told, 2)):
            os.dup2(stream.fileno(), number)
    os.chdir(here)
    sys.argv = ["sae-transformers", *words]
    try:
        app(prog_name="sae-transformers")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def _serve() -> None:
    from importlib import import_module

    for name in MODULES:
        import_module(name)
    package = Path(import_module("sae_transformers").__file__ or "").parent
    for room in ROOMS.split():
        for file in sorted((package / room).rglob("*.py")):
            if file.stem not in ("triton_ops", "__init__"):
                import_module(".".join(file.relative_to(package.parent).with_suffix("").parts))
    print(READY, end="", flush=True)
    states: dict[int, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "words" in asked:
            process = os.fork()
            if process == 0:
                code = 1
                try:
                    code = _run(asked["words"], asked["here"], asked["log"])
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            answer = process
        else:
            process, how = next((asked[name], name) for name in ("ended", "wait") if name in asked)
            if process not in states:
                found, state = os.waitpid(process, os.WNOHANG if how == "ended" else 0)
                if found:
                    states[process] = os.waitstatus_to_exitcode(state)
            answer = int(process in states) if how == "ended" else states[process]
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
