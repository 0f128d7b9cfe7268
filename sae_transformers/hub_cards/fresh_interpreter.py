"""A new interpreter in which this library cannot be imported: what was saved has to be enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WITHOUT_LIBRARY = """
import json, sys
from importlib.abc import MetaPathFinder

class Refusal(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "sae_transformers":
            raise ModuleNotFoundError(f"No module named {fullname!r}: it is blocked", name=fullname)

sys.meta_path.insert(0, Refusal())
task = json.loads(sys.argv[1])
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
"""


def run_without_library(script: str, task: Mapping[str, Any], folder: Path, **environment: str) -> Any:
    """What a script prints at last, which is JSON.

    Args:
        script: with `task`, `torch` and `transformers`.
        folder: where it runs.
        environment: variables beside those of this process.

    Raises:
        RuntimeError: it failed; the last line of what it said.
    """
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY + script, json.dumps(task)],
        capture_output=True, text=True, check=False, cwd=folder, stdin=subprocess.DEVNULL,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment},
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["no reason was given"])[-1])
    return json.loads(result.stdout.strip().splitlines()[-1])
