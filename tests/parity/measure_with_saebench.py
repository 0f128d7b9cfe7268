"""Measure one of our SAEs with SAEBench, sae-probes and SAELens. Run by an interpreter that has them, offline.

    PYTHONPATH=. PEERS_PYTHON tests/parity/measure_with_saebench.py jobs.json

`jobs.json`: a list of objects with `base` (folder of the model), `sae` (folder of ours), `model_name`, `out` (JSON
that is written), and

- for reconstruction: `tokens` (a safetensors file with `tokens` (n, length)), `rows_at_once`, and `ignore`, token ids
  that are neither replaced nor counted;
- for probing: `datasets` of sae-probes, `ks`, `penalty`, `cache` (a folder for activations), and `made_up`: random
  activations that the label moves, in place of the base's; what the probes are fitted to is written beside `out`.

SAEBench's core evaluation loads models by TransformerLens' list of names; its `run_evals` takes any model, and gets
the base through a `TransformerBridge`. The probing evaluation is run whole, with activations of that bridge in its
cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sae_transformers.evaluation.saebench import for_saebench
from sae_transformers.modeling import SparseAutoencoder


def measure_core(job, sae):
    from datasets import Dataset
    from sae_bench.evals.core.eval_config import CoreEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.core.main import run_evals  # pyright: ignore[reportMissingImports]
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import ActivationsStore  # pyright: ignore[reportMissingImports]
    from sae_lens.evals import EvalConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.evals import run_evals as run_lens_evals  # pyright: ignore[reportMissingImports]
    from sae_lens.training.activation_scaler import ActivationScaler  # pyright: ignore[reportMissingImports]

    model = load_model(job["base"])
    tokens = load_file(job["tokens"])["tokens"]
    rows, size = tokens.shape[0], job["rows_at_once"]
    _, sae, _ = load_and_format_sae("ours", sae, "cpu")

    def store():
        data = Dataset.from_dict({"tokens": tokens.tolist()}).with_format("torch")
        return ActivationsStore.from_sae(model, sae, data, context_size=tokens.shape[1], store_batch_size_prompts=size)

    what = {name: True for name in (
        "compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics",
        "compute_featurewise_density_statistics", "compute_featurewise_weight_based_metrics",
    )}  # fmt: skip
    counts = {"n_eval_reconstruction_batches": rows // size, "n_eval_sparsity_variance_batches": rows // size}
    config = CoreEvalConfig(batch_size_prompts=size, exclude_special_tokens_from_reconstruction=True, **counts, **what)
    found, features = run_evals(sae, store(), model, config, ignore_tokens=set(job["ignore"]))
    lens, _ = run_lens_evals(
        sae, store(), model, ActivationScaler(), EvalConfig(batch_size_prompts=size, **counts, **what),
        exclude_special_tokens=job["ignore"] or False,
    )  # fmt: skip
    return {"saebench": found, "features": features, "saelens": lens}


def load_model(folder):
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

    return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)


def measure_probes(job, sae):
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import (  # pyright: ignore[reportMissingImports]
        SparseProbingSaeProbesEvalConfig,
    )
    from sae_bench.evals.sparse_probing_sae_probes.main import run_eval  # pyright: ignore[reportMissingImports]
    from sae_probes.generate_model_activations import (  # pyright: ignore[reportMissingImports]
        ensure_dataset_activations,
    )
    from sae_probes.generate_sae_activations import generate_sae_activations  # pyright: ignore[reportMissingImports]

    folder, name, hook, cache = Path(job["out"]).parent, sae.cfg.model_name, sae.cfg.hook_name, job["cache"]
    if job["made_up"]:
        make_up_activations(job, sae)
    else:
        ensure_dataset_activations(name, job["datasets"], [hook], cache, device="cpu", model=load_model(job["base"]))
    config = SparseProbingSaeProbesEvalConfig(
        model_name=name, dataset_names=job["datasets"], ks=job["ks"], reg_type=job["penalty"], model_cache_path=cache,
        results_path=str(folder / "probes"), include_llm_baseline=True,
    )  # fmt: skip
    found = run_eval(config, [("ours", sae)], "cpu", str(folder / "results"), force_rerun=True)
    details = {}
    for dataset in job["datasets"]:
        (file,) = (folder / "probes" / "ours_custom_sae").rglob(f"{dataset}_{hook}_*.json")
        details[dataset] = json.loads(file.read_text())
        fitted = generate_sae_activations(
            sae, "normal", dataset, hook, name, "cpu", None, None, cache, seed=config.random_seed
        )
        save_file(
            {key: value.contiguous() for key, value in fitted._asdict().items()}, folder / f"{dataset}.safetensors"
        )
    return {"probing": next(iter(found.values()))["eval_result_metrics"], "probing_details": details}


def make_up_activations(job, sae):
    from sae_probes.utils_data import get_yvals  # pyright: ignore[reportMissingImports]

    folder = Path(job["cache"]) / f"model_activations_{sae.cfg.model_name}"
    folder.mkdir(parents=True)
    for seed, dataset in enumerate(job["datasets"]):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.from_numpy(get_yvals(dataset)).float()[:, None]
        x = torch.randn(len(labels), sae.cfg.d_in, generator=generator)
        x += labels * torch.randn(sae.cfg.d_in, generator=generator) / 2
        torch.save(x, folder / f"{dataset}_{sae.cfg.hook_name}.pt")


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        sae = for_saebench(SparseAutoencoder.from_pretrained(job["sae"]), job["model_name"])
        found = measure_core(job, sae) if "tokens" in job else {}
        if "datasets" in job:
            found |= measure_probes(job, sae)
        Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
