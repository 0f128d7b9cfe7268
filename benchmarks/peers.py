"""An environment of their own for the libraries that we are compared with: they pin other versions than we do.

    python benchmarks/peers.py              makes it where there is none and prints its Python
    python benchmarks/peers.py saebench     the same for SAEBench, which needs older versions than the others
    python benchmarks/peers.py circuit-tracer   and for circuit-tracer, which wants an older transformers

`make test-parity`, training.py and saebench.py use them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

FOLDER = Path("~/.cache/sae_transformers/benchmark-peers")
VERSIONS = ("sae-lens==6.54.12", "eai-sparsify==1.3.3", "dictionary-learning==0.1.0")
SAEBENCH_FOLDER = Path("~/.cache/sae_transformers/benchmark-saebench")
CIRCUIT_TRACER_FOLDER = Path("~/.cache/sae_transformers/benchmark-circuit-tracer")
CIRCUIT_TRACER_VERSIONS = ("circuit-tracer==0.5.0",)  # transformers up to 4.57.3, huggingface_hub before 1.0
SAEBENCH_VERSIONS = ("sae-bench==0.6.0", "sae-probes==0.4.2", "sae-lens==6.54.12")


def make_environment(folder: Path, say: Callable[[str], object], versions: Sequence[str] = VERSIONS) -> Path:
    """The Python of an environment with the other libraries and the same torch and, where they let it be, transformers
    as here."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    same = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"]
    same = same[:1] if versions is CIRCUIT_TRACER_VERSIONS else same
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text().split() != [*same, *versions]:
        say(f"Installing {', '.join(versions)} into {folder}, once ...")
        if not python.exists():
            venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "-qq", "--disable-pip-version-check"]
        for packages in (same[:1], [*same, *versions]):  # torch first: its build decides what the others get
            subprocess.run([*pip, "install", *packages], check=True)
        # nnsight and SAEBench want torchvision, which may be another build than torch and then breaks its import;
        # nothing uses it.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        stamp.write_text("\n".join([*same, *versions]))
    return python


if __name__ == "__main__":
    others = {
        "saebench": (SAEBENCH_FOLDER, SAEBENCH_VERSIONS),
        "circuit-tracer": (CIRCUIT_TRACER_FOLDER, CIRCUIT_TRACER_VERSIONS),
    }
    place, wanted = others[sys.argv[1]] if sys.argv[1:] else (FOLDER, VERSIONS)
    print(make_environment(place.expanduser(), lambda text: print(text, file=sys.stderr), wanted))
