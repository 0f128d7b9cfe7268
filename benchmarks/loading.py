"""What opening a published SAE costs: memory and time, in a fresh process each.

    python benchmarks/loading.py --d-in 2304 --d-sae 65536

The checkpoint is made here, random, in SAELens' format, float32. Memory is the growth of the process's peak resident
set over what it was after imports, as a share of the file's size; a mapped file's pages count while they are resident.

    open            `from_pretrained`, every weight checked
    open lazily     `check_values=False`
    10 directions   that, and the decoder rows of 10 latents, which adding a direction reads
    10 latents      that, and their encoder columns too, which setting or scaling a latent reads: in SAELens' layout a
                    column is spread over the whole matrix
    sae-lens        `SAE.load_from_disk`, where `--peer` names a Python that has it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

MEASURE = """
import sys, time
from pathlib import Path

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

{imports}
folder = sys.argv[1]
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, start = resident("VmRSS:"), time.perf_counter()
{work}
seconds = time.perf_counter() - start
print(resident("VmHWM:") - before, resident("VmRSS:") - before, seconds)
"""
OURS = "import torch\nfrom sae_transformers import SparseAutoencoder\nfrom sae_transformers.modeling import conversion"
LAZY = "sae = SparseAutoencoder.from_pretrained(folder, check_values=False)"
CASES = {
    "open": (OURS, "sae = SparseAutoencoder.from_pretrained(folder)"),
    "open lazily": (OURS, "sae = SparseAutoencoder.from_pretrained(folder, check_values=False)"),
    "10 directions": (OURS, f"{LAZY}\nrows = sae.W_dec[torch.arange(10) * 997]"),
    "10 latents": (OURS, f"{LAZY}\ncolumns = sae.W_enc[:, torch.arange(10) * 997]"),
    "sae-lens": ("import torch\nfrom sae_lens import SAE", "sae = SAE.load_from_disk(folder)"),
}


def make(folder: Path, d_in: int, d_sae: int) -> int:
    """A SAELens checkpoint of random weights; returns the bytes of its weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.randn(d_in, d_sae, generator=generator) / d_in**0.5,
        "W_dec": torch.randn(d_sae, d_in, generator=generator) / d_in**0.5,
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
        "threshold": torch.full((d_sae,), 0.1),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
    metadata = {"model_name": "gemma-2-2b", "hook_name": "blocks.12.hook_resid_post", "sae_lens_version": "6.54.12"}
    (folder / "cfg.json").write_text(json.dumps({**config, "metadata": metadata}))
    return (folder / "sae_weights.safetensors").stat().st_size


def measure(case: str, python: str, folder: Path) -> tuple[float, float, float]:
    """Peak and final growth of the resident set, in bytes, and seconds."""
    imports, work = CASES[case]
    script = MEASURE.format(imports=imports, work=work)
    run = subprocess.run([python, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{case} failed: {run.stderr.strip().splitlines()[-1]}")
    peak, final, seconds = run.stdout.split()[-3:]
    return float(peak), float(final), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="a Python with sae-lens")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size = make(Path(name), args.d_in, args.d_sae)
        table = Table("case", "peak / file", "at the end / file", "peak MB", "seconds, min", "median")
        for case in CASES:
            python = args.peer if case == "sae-lens" else sys.executable
            if python is None:
                continue
            peaks, finals, times = zip(*(measure(case, python, Path(name)) for _ in range(args.rounds)), strict=True)
            shares = f"{max(peaks) / size:.3f}", f"{max(finals) / size:.3f}"
            table.add_row(case, *shares, f"{max(peaks) / 1e6:,.0f}", f"{min(times):.2f}", f"{median(times):.2f}")
    table.title = f"{args.d_sae} x {args.d_in}, {size / 1e6:,.0f} MB"
    Console().print(table)


if __name__ == "__main__":
    main()
