"""Loading in a process of its own that may take little time and memory: what came of it, crashes included.

    python -m tests.modeling.loader_process    reads one JSON task a line, answers with one line

A task names `kind` ("sae" or "model") and `path`. The process is used for many tasks and made anew when it has died.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 10  # of processor time for a load
TIMES = 3  # memory of a load, in sizes of its files ...
# ... beyond what any load takes: a model's modules, torch's and Python's own pools.
ALLOWANCE = {"sae": 2**26, "model": 2**28}
ADDRESSES = 2**31  # of address space: an allocation beyond it fails instead of hurting the machine
WAIT = 180.0  # seconds of the wall's clock, with a busy machine in mind
CLEAR = (ValueError, TypeError, OSError)


class Outcome(NamedTuple):
    """kind: loaded, refused, unclear (an exception that is none of `CLEAR`), crashed, slow or large. text: the
    error's. seconds: of processor time. memory: bytes at most beyond what the process had."""

    kind: str
    text: str = ""
    seconds: float = 0.0
    memory: int = 0


# -- the process -----------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS + 2, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESSES, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _load(kind: str, path: str) -> None:
    import torch

    from sae_transformers import SaeForCausalLM, SparseAutoencoder

    if kind == "model":
        SaeForCausalLM.from_pretrained(path)
        return
    sae = SparseAutoencoder.from_pretrained(path, dtype=torch.float32)
    output = sae(torch.ones(2, sae.config.d_in))
    if not all(bool(value.isfinite().all()) for value in sae.state_dict().values()):
        raise RuntimeError("weights that are no numbers were loaded")
    # Finite weights may still be as large as float32 goes, so the output may overflow; it must be there.
    if output.latents.shape != (2, sae.config.d_sae):
        raise RuntimeError(f"latents have the shape {tuple(output.latents.shape)}")


def _answer(kind: str, path: str) -> dict[str, Any]:
    gc.collect()  # of the load before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = _status("VmRSS"), time.process_time()
    said = "loaded", ""
    with _limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _load(kind, path)
        except CLEAR as error:
            said = "refused", str(error)
        except BaseException as error:  # whatever else comes out
            said = "unclear", repr(error)
    return {
        "kind": said[0], "text": said[1], "seconds": time.process_time() - start, "memory": _status("VmHWM") - before,
    }  # fmt: skip


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(_answer(**json.loads(line))) + "\n")
        answers.flush()
        gc.freeze()  # what the first load imported is walked no more


# -- who asks it -----------------------------------------------------------------------------------------------------


class Loader:
    """A process that loads, made anew when it has died. Used in a `with` block.

    Args:
        kind: `sae` or `model`.
        whole: a checkpoint that is in order: it is loaded first, so that later loads find everything imported.
    """

    def __init__(self, kind: str, whole: Path) -> None:
        self.kind, self.whole = kind, whole
        self._process: subprocess.Popen[str] | None = None

    def load(self, path: Path, files: Path) -> Outcome:
        """What came of loading `path`, whose files are all of those in the folder `files`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.modeling.loader_process"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            first = self._ask(self.whole)
            if first.kind != "loaded":
                raise RuntimeError(f"A checkpoint that is in order was not loaded: {first}.")
        found = self._ask(path)
        size = sum(file.stat().st_size for file in files.rglob("*") if file.is_file())
        if found.kind in ("loaded", "refused"):
            if found.seconds > SECONDS:
                return found._replace(kind="slow")
            if found.memory > TIMES * size + ALLOWANCE[self.kind]:
                return found._replace(kind="large")
        return found

    def _ask(self, path: Path) -> Outcome:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"kind": self.kind, "path": str(path)}) + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                line = process.stdout.readline() if ready.select(WAIT) else None
        except BrokenPipeError:
            line = ""
        if line:
            return Outcome(**json.loads(line))
        self.close()
        if line is None:
            return Outcome("slow", f"no answer after {WAIT:g} s")
        code = process.returncode
        return Outcome("slow" if code == -signal.SIGXCPU else "crashed", f"the process ended with {code}")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


if __name__ == "__main__":
    main()
