"""Everything that needs a GPU to be measured, in one run of some ten minutes.

    python benchmarks/on_gpu.py --out FOLDER             on a machine with CUDA and triton
    python benchmarks/on_gpu.py --out FOLDER --interpret  without: the kernels in Triton's interpreter, small sizes

Each part is a process with a limit of its own, so that one that fails or hangs takes nothing from the others. What it
prints goes to FOLDER/PART.txt, and a line about each part to the screen: seconds, exit status, last line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(HERE.parent / "tests/training/sae")]
CASES = ["--cases", "idle", "direction", "set 1", "gate per token"]


def parts(device: str, small: bool) -> dict[str, tuple[int, list[str]]]:
    """Name -> the seconds that it may take, and the arguments of Python."""

    def script(name: str, *arguments: str) -> list[str]:
        return [str(HERE / name), "--device", device, *arguments]

    step = ["--parts", "steps", "--others", "ours", "ours, objective", "--threads", "1"]
    step += ["--rounds", "1", "--steps", "1", "--batch", "256", "--d-sae", "2048"] if small else ["--rounds", "3"]
    overhead = ["--activations", "jumprelu", *CASES]
    overhead += ["--rounds", "1", "--tokens", "4", "--prefill", "16"] if small else ["--rounds", "15"]
    found = {
        "kernels": (120, KERNELS),
        "training step": (150, script("training.py", *step)),
        "steering": (90, script("steering_overhead.py", *overhead)),
    }
    if not small:
        wide = ["--d-in", "2304", "--d-sae", "65536", "--batch", "4096"]
        found["training step, half dead"] = (60, script("training.py", *step, "--dead", "0.5"))
        found["training step, 2304 -> 65536"] = (90, script("training.py", *step[:-2], *wide, "--rounds", "2"))
        found["steering, compiled"] = (150, script("steering_overhead.py", *overhead, "--compile"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
    if args.interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    failed = []
    for name, (limit, command) in parts("cpu" if args.interpret else "cuda", args.interpret).items():
        file = args.out / f"{name}.txt"
        started = time.monotonic()
        with file.open("w") as out:
            try:
                status = subprocess.run(
                    [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=environment, timeout=limit
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"ended after {limit} s"
        lines = file.read_text().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "nothing printed")
        print(f"{name}: {time.monotonic() - started:.0f} s, exit {status}: {last}", flush=True)
        if status:
            failed.append(name)
    sys.exit(f"not whole: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
