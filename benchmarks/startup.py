"""What a command waits for before it works: CPU seconds of fresh processes, in turns.

    python benchmarks/startup.py --rounds 5

`python -c pass` and `import typer` with rich, which any command line of this kind imports for its help, are the
baseline; `import torch` and `import transformers` are what help does without.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from statistics import median

from rich.console import Console
from rich.table import Table

from sae_transformers.cli import VERBS

TYPER = "import typer, typer.rich_utils"
BASELINES = {"pass": "pass", "import typer": "import typer", "import typer with rich": TYPER}
OTHERS = {"import torch": "import torch", "import transformers' models": "from transformers import LlamaForCausalLM"}


def cpu_seconds(words: list[str]) -> float:
    """User and system time of a process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as shown:
        # Wide lines and no terminal: what is measured is the same everywhere.
        subprocess.run(words, check=True, stdout=shown, env={**os.environ, "COLUMNS": "120"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--verbs", help="comma-separated; all by default")
    args = parser.parse_args()
    verbs = args.verbs.split(",") if args.verbs else " ".join(VERBS.values()).replace("_", "-").split()
    module = [sys.executable, "-m", "sae_transformers"]
    cases = {name: [sys.executable, "-c", code] for name, code in (BASELINES | OTHERS).items()}
    cases["import sae_transformers"] = [sys.executable, "-c", "import sae_transformers"]
    cases["--help"] = [*module, "--help"]
    cases |= {f"{verb} --help": [*module, verb, "--help"] for verb in verbs}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, words in cases.items():
            times[name].append(cpu_seconds(words))
    table = Table("", "CPU seconds, least", "median", "to typer with rich, least", "median of the ratios")
    base = times["import typer with rich"]
    for name, found in times.items():
        ratio = median(one / other for one, other in zip(found, base, strict=True))
        shares = f"{min(found) / min(base):.2f}", f"{ratio:.2f}"
        table.add_row(name, f"{min(found):.3f}", f"{median(found):.3f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
