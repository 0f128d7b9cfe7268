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

    python benchmarks/loading.py --ways

The ways in which a published SAE gets into memory, one process each, beside a bare `load_file` of its weights that
reads them all: the peak of what is resident, as a share of the weights' file, and what of it is anonymous: no pages of
a mapped file, which the kernel drops where memory is short. What loading the base alone takes is subtracted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
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

PARTS = """
import threading, time
from pathlib import Path
{imports}
folder, base = Path(sys.argv[1]), sys.argv[2]

def now():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {{line[0][:-1]: 1024 * int(line[1]) for line in lines if line[0] in ("VmHWM:", "VmRSS:", "RssAnon:")}}

def watch():
    while True:
        peaks.append(now()["RssAnon"])
        time.sleep(0.002)

warm = AutoModelForCausalLM.from_pretrained(base)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, peaks = now(), []
threading.Thread(target=watch, daemon=True).start()
start = time.process_time()
{work}
seconds = time.process_time() - start
time.sleep(0.01)
print(now()["VmHWM"] - before["VmRSS"], max(peaks) - before["RssAnon"], seconds)
"""
REMOTE = "import sys\nfrom transformers import AutoModelForCausalLM"
LIBRARY = f"{REMOTE}\nfrom sae_transformers import SaeForCausalLM, SparseAutoencoder, attach"
LIBRARY += "\nfrom sae_transformers.modeling import conversion"
PLACED = "SparseAutoencoder.from_pretrained(folder / {!r}, layer=1, site='resid_post')"
WAYS = {
    "the base alone": (REMOTE, "model = AutoModelForCausalLM.from_pretrained(base)"),
    "load_file": (
        f"{REMOTE}\nfrom safetensors.torch import load_file",
        "sums = [tensor.sum() for tensor in load_file(folder / 'sae' / 'model.safetensors').values()]",
    ),
    "repository, library": (LIBRARY, "model = SaeForCausalLM.from_pretrained(folder / 'adapter')"),
    "repository, remote code": (
        REMOTE,
        "model = AutoModelForCausalLM.from_pretrained(folder / 'adapter', trust_remote_code=True)",
    ),
    "in full, library": (LIBRARY, "model = SaeForCausalLM.from_pretrained(folder / 'full')"),
    "in full, remote code": (
        REMOTE,
        "model = AutoModelForCausalLM.from_pretrained(folder / 'full', trust_remote_code=True)",
    ),
    "from_base": (LIBRARY, f"model = SaeForCausalLM.from_base(base, saes=[{PLACED.format('sae')}])"),
    "attach": (LIBRARY, f"model = attach(base, [{PLACED.format('sae')}], folder / 'attached')"),
    "own format": (LIBRARY, f"sae = {PLACED.format('sae')}"),
    "saelens": (LIBRARY, f"sae = {PLACED.format('saelens')}"),
    "sparsify": (LIBRARY, f"sae = {PLACED.format('sparsify/layers.1')}"),
    "dictionary_learning": (LIBRARY, f"sae = {PLACED.format('dictionary_learning')}"),
    "Gemma Scope": (LIBRARY, f"sae = {PLACED.format('gemma')}"),
}


def make_ways(root: Path, d_in: int, d_sae: int) -> int:
    """A base of few layers, and one SAE in every form that is opened; returns the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae_transformers import SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig
    from sae_transformers.modeling.conversion import FORMATS

    small: Any = {"vocab_size": 300, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(hidden_size=d_in, **small)).save_pretrained(root / "base")
    place: Any = {"d_in": d_in, "d_sae": d_sae, "layer": 1, "site": "resid_post"}
    sae = SparseAutoencoder(SparseAutoencoderConfig(**place, activation="topk", k=32))
    sae.save_pretrained(root / "sae")
    tensors = {name: tensor for name, tensor in sae.state_dict().items() if name != "feature_max"}
    for form in FORMATS:
        if form.name in WAYS and form.write is not None:
            form.write(sae.config, tensors, root / form.name)
    (root / "gemma").mkdir()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(root / "gemma" / "params.npz", **arrays, threshold=np.ones(d_sae, dtype=np.float32))
    model = SaeForCausalLM.from_base(str(root / "base"), saes=[sae])
    model.save_pretrained(root / "adapter")
    model.config.weights_scope = "full"
    model.save_pretrained(root / "full")
    return (root / "sae" / "model.safetensors").stat().st_size


def show_ways(d_in: int, d_sae: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        size = make_ways(Path(name), d_in, d_sae)
        table = Table("way", "peak / file", "anonymous", "CPU seconds, least", "median")
        table.title = f"{d_sae} x {d_in}, {size / 1e6:,.0f} MB"
        base = 0.0, 0.0
        for way, (imports, work) in WAYS.items():
            runs = [run(PARTS.format(imports=imports, work=work), name, f"{name}/base") for _ in range(rounds)]
            peak, anonymous = (max(each) for each in list(zip(*runs, strict=True))[:2])
            if way == "the base alone":
                base = peak, anonymous
            elif "base" in work or "folder / 'adapter'" in work or "folder / 'full'" in work:
                peak, anonymous = peak - base[0], anonymous - base[1]
            times = [seconds for *_, seconds in runs]
            shares = f"{peak / size:.3f}", f"{anonymous / size:.3f}"
            table.add_row(way, *shares, f"{min(times):.2f}", f"{median(times):.2f}")
        Console().print(table)


def run(script: str, *arguments: str, python: str = sys.executable) -> tuple[float, float, float]:
    """Three numbers that a script prints last."""
    done = subprocess.run([python, "-c", script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"it failed: {done.stderr.strip().splitlines()[-1]}")
    first, second, third = map(float, done.stdout.split()[-3:])
    return first, second, third


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
    return run(MEASURE.format(imports=imports, work=work), str(folder), python=python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="a Python with sae-lens")
    parser.add_argument("--ways", action="store_true", help="the ways in which an SAE gets into memory, instead")
    args = parser.parse_args()
    if args.ways:
        show_ways(args.d_in, args.d_sae, args.rounds)
        return
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
