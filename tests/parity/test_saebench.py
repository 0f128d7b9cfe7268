"""SAEBench, sae-probes and SAELens measure our SAEs, and find what we find.

Needs an interpreter with sae-bench, sae-probes and sae-lens, named by SAE_TRANSFORMERS_SAEBENCH:

    SAE_TRANSFORMERS_SAEBENCH=$(python benchmarks/peers.py saebench) pytest -m parity tests/parity/test_saebench.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import r2_score, roc_auc_score

from sae_transformers import SaeForCausalLM
from sae_transformers.evaluation.detection.sparse_probing import fit_sparse_probe, rank_latents
from sae_transformers.evaluation.reconstruction.metrics import ReconstructionMeter, replaced_losses, site_means
from sae_transformers.latents.sparse_codes import SparseCodes
from tests.create_training_data.words import word_tokenizer
from tests.tiny import WIDTH, prompt, tiny_base, tiny_sae

PYTHON = os.environ.get("SAE_TRANSFORMERS_SAEBENCH", "")
ROOT = Path(__file__).parents[2]
ROWS, LENGTH, BEGIN = 12, 16, 1
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PYTHON, reason="SAE_TRANSFORMERS_SAEBENCH names no interpreter with SAEBench"),
]

SAES: dict[str, dict[str, Any]] = {
    "topk": {},
    "relu before the block": {"activation": "relu", "site": "resid_pre"},
    "jumprelu of the MLP": {"activation": "jumprelu", "site": "mlp_out"},
    "gated": {"activation": "gated"},
    "batch topk of a constant norm": {"activation": "batch_topk", "k": 8, "normalization": "constant_norm"},
    "topk of a layer norm": {"normalization": "layer_norm"},
}
PROBED = ["147_disease_class_nervous system diseases", "89_glue_mrpc"]  # two of the smallest of sae-probes


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[Any, dict[str, Any], Path]]:
    """Of each SAE: it, what they found, and the folder; all in one process, for importing them takes long."""
    root, jobs, saes = tmp_path_factory.mktemp("saebench"), [], {}
    tiny_base().save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    save_file({"tokens": tokens()}, root / "tokens.safetensors")
    for name, settings in SAES.items():
        saes[name] = tiny_sae(**{"layer": 1, "site": "resid_post", **settings})
        saes[name].save_pretrained(root / name / "sae")
        common = {"base": str(root / "base"), "sae": str(root / name / "sae"), "model_name": "tiny"}
        read = {"tokens": str(root / "tokens.safetensors"), "rows_at_once": 4}
        for kind, ignore in {"all": [], "without the first": [BEGIN]}.items():
            jobs.append({**common, **read, "ignore": ignore, "out": str(root / name / f"{kind}.json")})
    made = {"datasets": PROBED, "ks": [1, 5], "penalty": "l2", "cache": str(root / "cache"), "made_up": True}
    topk = {**jobs[0], **made, "out": str(root / "probing" / "out.json")}
    (root / "probing").mkdir()
    jobs.append({key: value for key, value in topk.items() if key not in ("tokens", "rows_at_once", "ignore")})
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [str(Path(PYTHON).expanduser()), str(Path(__file__).with_name("measure_with_saebench.py")), "jobs.json"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    read = {name: {file.stem: json.loads(file.read_text()) for file in (root / name).glob("*.json")} for name in SAES}
    read["probing"] = json.loads((root / "probing" / "out.json").read_text())
    saes["probing"] = saes["topk"]
    return {name: (saes[name], theirs, root / name) for name, theirs in read.items()}


def tokens() -> torch.Tensor:
    ids = prompt(ROWS, LENGTH)
    ids[:, 0] = BEGIN
    return ids.contiguous()


def flat(theirs: dict[str, Any]) -> dict[str, float]:
    return {name: value for group in theirs.values() for name, value in group.items()}


@pytest.mark.parametrize("library", ["saebench", "saelens"])
@pytest.mark.parametrize("name", SAES)
def test_losses_are_theirs(name, library, found) -> None:
    """Cross-entropy and KL with the SAE, with zeros and without either; all positions, or without the first."""
    sae, theirs, _ = found[name]
    model = SaeForCausalLM.from_base(tiny_base(), saes=[sae])
    batches = [{"input_ids": tokens()}]
    # KL counts what the last token predicts too; with one more column behind, so do we.
    longer = [{"input_ids": torch.cat([tokens(), tokens()[:, :1]], 1)}]
    for kind, skip in (("all", 0), ("without the first", 1)):
        said = flat(theirs[kind][library])
        means = site_means(model, batches, [0], skip)
        [ours] = replaced_losses(model, batches, [[0]], means, skip_first=skip, count_first=False)
        count = float(ours.tokens.sum())
        assert count == ROWS * (LENGTH - 1 - skip)
        assert said["ce_loss_without_sae"] == pytest.approx(float(ours.ce["base"].sum()) / count, rel=1e-5)
        assert said["ce_loss_with_sae"] == pytest.approx(float(ours.ce["sae"].sum()) / count, rel=1e-5)
        [further] = replaced_losses(model, longer, [[0]], means, skip_first=skip, count_first=False, kl=True)
        kl = {method: float(sums.sum() / further.tokens.sum()) for method, sums in further.kl.items()}
        assert said["kl_div_with_sae"] == pytest.approx(kl["sae"], rel=1e-4)
        if not skip:  # theirs puts zeros at tokens that are left out, ours does not
            zero = float(ours.ce["zero"].sum()) / count
            assert said["ce_loss_with_ablation"] == pytest.approx(zero, rel=1e-5)
            assert said["kl_div_with_ablation"] == pytest.approx(kl["zero"], rel=1e-4)
            recovered = (zero - said["ce_loss_with_sae"]) / (zero - said["ce_loss_without_sae"])
            assert said["ce_loss_score"] == pytest.approx(recovered, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", SAES)
def test_reconstruction_is_theirs(name, found) -> None:
    """L0, cosine, dead latents and variance. SAEBench's `explained_variance` takes its squares from the mean square in
    place of the mean, which the test pins, so that a repaired one is noticed."""
    sae, theirs, _ = found[name]
    model = SaeForCausalLM.from_base(tiny_base(), saes=[sae])
    states = model(tokens(), output_sae_inputs=True, steering=False).sae_inputs[0]
    for kind, skip in (("all", 0), ("without the first", 1)):
        x = states[:, skip:].reshape(-1, WIDTH)
        out = sae(x)
        meter = ReconstructionMeter(sae.config.d_sae)
        meter.update(x, out.reconstruction, out.latents)
        ours, latents = meter.result(), out.latents
        for library in ("saebench", "saelens"):
            said = flat(theirs[kind][library])
            assert said["l0"] == pytest.approx(ours["l0"], rel=1e-5)
            assert said["l1"] == pytest.approx(float(latents.sum(-1).mean()), rel=1e-4)
            assert said["cossim"] == pytest.approx(ours["cosine_similarity"], abs=1e-5)
        density = torch.tensor(theirs[kind]["features"]["feature_density"])
        torch.testing.assert_close(density, (latents > 0).float().mean(0), rtol=0, atol=1e-6)
        assert float((density == 0).float().mean()) == pytest.approx(ours["dead_share"])
        explained = flat(theirs[kind]["saelens"])["explained_variance"]
        assert explained == pytest.approx(1 - ours["fvu"], rel=1e-4, abs=1e-5)
        other = r2_score(x.numpy(), out.reconstruction.numpy(), multioutput="variance_weighted")
        assert explained == pytest.approx(other, rel=1e-4, abs=1e-5)
        error, square = (x - out.reconstruction).square().sum(-1).mean(), x.square()
        broken = float(1 - error / (square.sum(-1).mean() - square.mean() ** 2))
        assert flat(theirs[kind]["saebench"])["explained_variance"] == pytest.approx(broken, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", SAES)
def test_weights_are_theirs(name, found) -> None:
    sae, theirs, _ = found[name]
    features = theirs["all"]["features"]
    norms = torch.tensor(features["encoder_norm"])
    torch.testing.assert_close(norms, sae.W_enc.detach().norm(dim=0), rtol=1e-5, atol=1e-6)
    cosine = torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1).detach()
    torch.testing.assert_close(torch.tensor(features["encoder_decoder_cosine_sim"]), cosine, rtol=1e-4, atol=1e-5)
    bias = sae.b_mag if sae.config.activation == "gated" else sae.b_enc
    torch.testing.assert_close(torch.tensor(features["encoder_bias"]), bias.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dataset", PROBED)
def test_probing_runs_whole_and_chooses_our_latents(dataset, found) -> None:
    """The evaluation that the audit of SAEBench found the most reliable, from its entry point to its summary."""
    sae, theirs, folder = found["probing"]
    data = load_file(folder / f"{dataset}.safetensors")
    labels = data["y_train"]
    size = data["X_train"].abs().sum(0) / ((data["X_train"] != 0).sum(0) + 1e-6) + 1e-6  # sae-probes divides by it
    ranked = rank_latents(SparseCodes.from_dense(data["X_train"] / size), labels)
    for entry in theirs["probing_details"][dataset]:
        k = entry["k"]
        assert ranked[:k].tolist() == entry["indices"]
        probe = fit_sparse_probe(SparseCodes.from_dense(data["X_train"]), labels, ranked[:k])
        area = roc_auc_score(data["y_test"], probe.score(SparseCodes.from_dense(data["X_test"])))
        assert area == pytest.approx(entry["test_auc"], abs=0.02)  # their penalty is chosen, ours is 1
    summary = theirs["probing"]["sae"]
    mean = sum(theirs["probing_details"][name][0]["test_auc"] for name in PROBED) / len(PROBED)
    assert summary["sae_top_1_test_auc"] == pytest.approx(mean)
    assert theirs["probing"]["llm"]["llm_test_auc"] > 0.9
