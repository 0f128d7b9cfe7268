"""SAEBench, sae-probes and SAELens on one of our SAEs, beside our own numbers on the same tokens.

    python benchmarks/saebench.py --base MODEL --sae FOLDER --text TEXT [--datasets 141_news_class_Entertainment]

They run in an environment of their own (peers.py makes it, once), offline: SAEBench's core evaluation reads `--text`
in place of a data set of the Hub; the probing evaluation reads the data that sae-probes ships. The base is a folder or
what `find_base_model` finds. Each row begins with the token that begins texts; it is neither replaced nor counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from peers import SAEBENCH_FOLDER, SAEBENCH_VERSIONS, make_environment
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer

from sae_transformers import SaeForCausalLM, SparseAutoencoder
from sae_transformers.create_training_data.base_model import find_base_model
from sae_transformers.evaluation.detection.sparse_probing import fit_sparse_probe, rank_latents
from sae_transformers.evaluation.generation.log_likelihood import start_token
from sae_transformers.evaluation.reconstruction.metrics import ReconstructionMeter, replaced_losses, site_means
from sae_transformers.latents.sparse_codes import SparseCodes
from sae_transformers.latents.texts import open_text

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "parity" / "measure_with_saebench.py"


def rows_of(tokenizer: Any, text: str, rows: int, length: int) -> torch.Tensor:
    """(rows, length) token ids, each row after the token that begins texts."""
    ids: list[int] = []
    texts = open_text(text).read(0, 50_000).texts
    while len(ids) < rows * (length - 1) and texts:
        ids += tokenizer(texts.pop(0), add_special_tokens=False)["input_ids"]
    whole = len(ids) // (length - 1)
    if whole < rows:
        raise SystemExit(f"Expected {rows} rows of {length} tokens in --text. Received: {whole}.")
    packed = torch.tensor(ids[: rows * (length - 1)]).view(rows, -1)
    return torch.cat([torch.full((rows, 1), start_token(tokenizer)), packed], 1).contiguous()


@torch.no_grad()
def our_numbers(model: Any, ids: torch.Tensor, rows_at_once: int) -> dict[str, float]:
    batches = [{"input_ids": rows} for rows in ids.split(rows_at_once)]
    meter = ReconstructionMeter(model.saes[0].config.d_sae)
    for batch in batches:
        read = model(**batch, steering=False, output_sae_inputs=True, stop_at_last_sae=True).sae_inputs[0][:, 1:]
        out = model.saes[0](read.flatten(0, 1))
        meter.update(read.flatten(0, 1), out.reconstruction, out.latents)
    found = meter.result()
    [losses] = replaced_losses(model, batches, [[0]], site_means(model, batches, [0], 1), count_first=False, kl=True)
    tokens = losses.tokens.sum()
    ce = {name: float(sums.sum() / tokens) for name, sums in losses.ce.items()}
    return {
        "explained_variance": 1 - found["fvu"], "cossim": found["cosine_similarity"], "l0": found["l0"],
        "dead": found["dead_share"], "ce_loss_without_sae": ce["base"], "ce_loss_with_sae": ce["sae"],
        "ce_loss_with_ablation": ce["zero"], "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["base"]),
        "kl_div_with_sae": float(losses.kl["sae"].sum() / tokens),
    }  # fmt: skip


def probing_table(found: dict[str, Any], out: Path) -> Table:
    table = Table("data set", "k", "their latents", "ours", "their AUROC", "ours")
    for dataset, entries in found["probing_details"].items():
        data = load_file(out / f"{dataset}.safetensors")
        train, test = data["X_train"], SparseCodes.from_dense(data["X_test"])
        size = train.abs().sum(0) / ((train != 0).sum(0) + 1e-6) + 1e-6  # sae-probes compares multiples of it
        ranked = rank_latents(SparseCodes.from_dense(train / size), data["y_train"])
        for entry in entries:
            probe = fit_sparse_probe(SparseCodes.from_dense(train), data["y_train"], ranked[: entry["k"]])
            area = roc_auc_score(data["y_test"], probe.score(test))
            theirs, ours = entry["indices"], ranked[: entry["k"]].tolist()
            same = "the same" if set(ours) == set(theirs) else str(ours[:5])
            table.add_row(dataset, str(entry["k"]), str(theirs[:5]), same, f"{entry['test_auc']:.3f}", f"{area:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--sae", required=True, help="folder or Hub id of an SAE of ours")
    parser.add_argument("--text", required=True, help="what the SAE was not trained on")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows-at-once", type=int, default=4)
    parser.add_argument("--datasets", nargs="*", default=[], help="of sae-probes, such as 113_movie_sent")
    parser.add_argument("--ks", type=int, nargs="*", default=[1, 2, 5])
    parser.add_argument("--penalty", default="l1", help="of the probes: l1 (SAEBench's) or l2, which is quicker")
    parser.add_argument("--out", type=Path, default=Path("outputs/saebench"))
    args = parser.parse_args()
    console = Console()
    python = make_environment(SAEBENCH_FOLDER.expanduser(), console.print, SAEBENCH_VERSIONS)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    base = find_base_model(args.base, say=console.print).name
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = rows_of(tokenizer, args.text, args.rows, args.length)
    save_file({"tokens": ids}, out / "tokens.safetensors")
    job = {"base": base, "sae": str(Path(args.sae).resolve()), "model_name": Path(base).name}
    read = {"tokens": str(out / "tokens.safetensors"), "rows_at_once": args.rows_at_once}
    ignore = sorted({start_token(tokenizer), tokenizer.eos_token_id})
    jobs = [{**job, **read, "ignore": ignore, "out": str(out / "core.json")}]
    if args.datasets:
        made = {"datasets": args.datasets, "ks": args.ks, "penalty": args.penalty, "made_up": False}
        jobs.append({**job, **made, "cache": str(out / "cache"), "out": str(out / "probing.json")})
    (out / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (out / "log.txt").open("w") as log:
        subprocess.run([python, SCRIPT, out / "jobs.json"], check=True, env=environment, stdout=log, stderr=log)

    model = SaeForCausalLM.from_base(base, saes=[SparseAutoencoder.from_pretrained(args.sae)], dtype=torch.float32)
    ours, found = our_numbers(model.eval(), ids, args.rows_at_once), json.loads((out / "core.json").read_text())
    density = torch.tensor(found["features"]["feature_density"])
    table = Table("number", "SAEBench", "SAELens", "ours")
    sides = [{k: v for group in found[name].values() for k, v in group.items()} for name in ("saebench", "saelens")]
    for side in sides:
        side["dead"] = float((density == 0).double().mean())
    for name, value in ours.items():
        table.add_row(name, *(f"{side[name]:.4f}" for side in sides), f"{value:.4f}")
    console.print(f"{ids.numel() - len(ids)} tokens counted", table)
    if args.datasets:
        console.print(probing_table(json.loads((out / "probing.json").read_text()), out))


if __name__ == "__main__":
    main()
