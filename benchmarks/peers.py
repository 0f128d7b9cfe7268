"""An environment of their own for the libraries that we are compared with: they pin other versions than we do.

    python benchmarks/peers.py      makes it where there is none and prints its Python

`make test-parity` and training.py use it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

FOLDER = Path("~/.cache/sae_transformers/benchmark-peers")
VERSIONS = ("sae-lens==6.54.12", "eai-sparsify==1.3.3", "dictionary-learning==0.1.0")


def make_environment(folder: Path, say: Callable[[str], object]) -> Path:
    """The Python of an environment with the other libraries and the same torch and transformers as here."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    same = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"]
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text().split() != [*same, *VERSIONS]:
        say(f"Installing {', '.join(VERSIONS)} into {folder}, once ...")
        if not python.exists():
            venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "-qq", "--disable-pip-version-check"]
        for packages in (same[:1], [*same, *VERSIONS]):  # torch first: its build decides what the others get
            subprocess.run([*pip, "install", *packages], check=True)
        # nnsight wants torchvision, which may be another build than torch and then breaks its import; nothing uses it.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        stamp.write_text("\n".join([*same, *VERSIONS]))
    return python


if __name__ == "__main__":
    print(make_environment(FOLDER.expanduser(), lambda text: print(text, file=sys.stderr)))
