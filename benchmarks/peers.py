"""An environment of their own for the libraries that we are compared with: they pin other versions than we do.

    python benchmarks/peers.py              makes it where there is none and prints its Python
    python benchmarks/peers.py saebench     the same for SAEBench, which needs older versions than the others
    python benchmarks/peers.py circuit-tracer   and for circuit-tracer, which wants an older transformers
    python benchmarks/peers.py inspect      and for Inspect AI, which wants an older fsspec; this library is in it too
    python benchmarks/peers.py annotations  a folder of packages that read annotations, to stand beside the first
    python benchmarks/peers.py trl          a folder with TRL, to stand beside this environment's own packages
    python benchmarks/peers.py llama.cpp    the same for llama.cpp, as the wheel that holds it in one library

`make test-parity`, training.py and saebench.py use them.
"""

from __future__ import annotations

import functools
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
TRL_FOLDER = Path("~/.cache/sae_transformers/benchmark-trl")
TRL_VERSIONS = ("trl==1.16.0",)  # what it wants is here already
LLAMA_CPP_FOLDER = Path("~/.cache/sae_transformers/benchmark-llama-cpp")
LLAMA_CPP = "xllamacpp==2026.10.11549"
SAEBENCH_VERSIONS = ("sae-bench==0.6.0", "sae-probes==0.4.2", "sae-lens==6.54.12")
INSPECT_FOLDER = Path("~/.cache/sae_transformers/benchmark-inspect")
INSPECT_VERSIONS = (
    "inspect-ai==0.3.285", "pytest", "pytest-xdist", "hypothesis", "-e", f"{Path(__file__).parents[1]}[serve,inspect]",
)  # fmt: skip

# delphi wants vLLM, some 10 GB that take no part in reading: these are installed without what they want.
ANNOTATIONS_FOLDER = Path("~/.cache/sae_transformers/benchmark-annotations")
ANNOTATIONS_VERSIONS = (
    "eai-delphi==0.1.3", "neuronpedia==1.2.1", "aiofiles==25.1.0", "asyncer==0.0.18", "blobfile==3.3.0",
    "docstring-parser==0.18.0", "faiss-cpu==1.15.1", "joblib==1.6.0", "lxml", "orjson==3.13.0", "pycryptodomex",
    "scikit-learn==1.9.1", "scipy==1.17.1", "sentence-transformers==6.2.0", "simple-parsing==0.1.9",
    "threadpoolctl==3.8.0",
)  # fmt: skip


def make_packages(
    python: Path, folder: Path, say: Callable[[str], object], versions: Sequence[str] = ANNOTATIONS_VERSIONS
) -> Path:
    """A folder with packages for the interpreter `python`, none of what they want beside them."""
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text().split() != list(versions):
        say(f"Installing {', '.join(versions[:2])} into {folder}, once ...")
        pip = [python, "-m", "pip", "-qq", "--disable-pip-version-check"]
        options = ["install", "--no-deps", "--upgrade", "--target", folder]
        subprocess.run([*pip, *options, *versions], check=True)
        stamp.write_text("\n".join(versions))
    return folder


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


def llama_cpp_python() -> Path:
    """The Python of an environment with llama.cpp; nothing else is in it."""
    folder = LLAMA_CPP_FOLDER.expanduser()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "-qq", "--disable-pip-version-check", "install", LLAMA_CPP], check=True)
    return python


if __name__ == "__main__":
    if sys.argv[1:] == ["llama.cpp"]:
        print(llama_cpp_python())
        raise SystemExit
    asked, to_stderr = sys.argv[1:2], functools.partial(print, file=sys.stderr)
    if asked == ["trl"]:
        print(make_packages(Path(sys.executable), TRL_FOLDER.expanduser(), to_stderr, TRL_VERSIONS))
        raise SystemExit
    others = {
        "saebench": (SAEBENCH_FOLDER, SAEBENCH_VERSIONS),
        "circuit-tracer": (CIRCUIT_TRACER_FOLDER, CIRCUIT_TRACER_VERSIONS),
        "inspect": (INSPECT_FOLDER, INSPECT_VERSIONS),
    }
    place, wanted = others.get("".join(asked), (FOLDER, VERSIONS))
    made = make_environment(place.expanduser(), to_stderr, wanted)
    print(make_packages(made, ANNOTATIONS_FOLDER.expanduser(), to_stderr) if asked == ["annotations"] else made)
