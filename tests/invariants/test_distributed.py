"""Two processes on the CPU (gloo) give what one gives: DDP with `Trainer`, and FSDP2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sae_transformers import FeatureEdit, FeaturePenalty, SaeForCausalLM, Steering
from tests.invariants.test_penalties import DISTRIBUTED
from tests.invariants.test_trainer import CHECKPOINTING, Texts
from tests.tiny import prompt, tiny_base, tiny_sae

SCRIPTS = Path(__file__).parents[1] / "scripts"
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}
STEERINGS = {
    "add and scale": Steering([FeatureEdit(0, "anger", "add", 6.0), FeatureEdit(1, 7, "scale", -2.0)]),
    "replace": Steering([FeatureEdit(0, 7, "set", 2.0)], keep_error=False),
    "norm": Steering([FeatureEdit(1, 5, "direction", 0.5, unit="norm")], positions="last_prompt"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo"
    ),
]


def start(script: str, *arguments: object, processes: int) -> None:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # On a machine with a GPU too: this is about the CPU.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [*command, str(SCRIPTS / script), *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        raise
    assert process.returncode == 0, errors[-4000:]


@pytest.mark.parametrize(
    "flags",
    [(), ("full", "checkpointing"), ("accumulate",), ("full", "accumulate", "penalties")],
    ids=lambda f: "-".join(f) or "plain",
)
def test_ddp_equals_one_process_with_the_doubled_batch(tmp_path, flags):
    """SGD, two steps. The order of summation differs, so to 1e-6; the two processes agree bit for bit."""
    two, one = tmp_path / "two", tmp_path / "one"
    for folder in (two, one):
        folder.mkdir()
    start("ddp_trainer.py", two, 2, *flags, processes=2)
    start("ddp_trainer.py", one, 4, *flags, processes=1)
    first, second = (torch.load(two / f"rank{rank}.pt") for rank in range(2))
    alone = torch.load(one / "rank0.pt")
    assert (first["world"], alone["world"]) == (2, 1)
    moved = 0
    for name, value in alone["parameters"].items():
        torch.testing.assert_close(first["parameters"][name], second["parameters"][name], **EXACT)
        torch.testing.assert_close(
            first["parameters"][name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved += name.startswith("saes.")
    assert moved and first["losses"] == pytest.approx(alone["losses"], rel=2e-6)


def fsdp_model(site: str, *flags: str) -> Any:
    saes = [
        tiny_sae(layer=1, site=site, concepts={"anger": 3, "joy": 40}),
        tiny_sae(2, layer=2, site="resid_pre", activation="relu"),
    ]
    model = SaeForCausalLM.from_base(
        tiny_base(), saes, weights_scope="full" if "full" in flags else "sae", detach_hidden=False,
        loss_weights={"lm": 1.0, "reconstruction": 0.5, "sparsity": 0.1, "conditioning": 0.8},
    )  # fmt: skip
    if "penalties" in flags:
        model.feature_penalties = [*DISTRIBUTED, FeaturePenalty([2, 9], over="all", goal="reference")]
        model.set_penalty_reference(tiny_base(seed=1))
    if "checkpointing" in flags:
        getattr(model, f"{CHECKPOINTING}_enable")()
    return model


def fsdp_outcome(model: Any) -> dict[str, torch.Tensor]:
    """The same batch in every process, so that the averaged gradient is the gradient."""
    rows = Texts(3).rows
    batch = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "attention_mask", "labels")}
    model.train()
    loss = model(**batch, concept_targets=torch.tensor([[1, 0], [0, -100], [1, 1]])).loss
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        found["unsteered"] = model(prompt()).logits
        for name, steering in STEERINGS.items():
            found[name] = model(prompt(), steering=steering).logits
            with model.steered(steering):
                found[f"{name} in a block"] = model(prompt()).logits
        out = model(prompt(), output_features=True, output_sae_inputs=True)
        for number in range(2):
            found[f"features {number}"] = out.sae_features[number].to_dense()
            # The public methods gather the shards too.
            found[f"encoded {number}"] = model.saes[number].encode(out.sae_inputs[number])
            found[f"decoded {number}"] = model.saes[number].decode(found[f"encoded {number}"])
    return found


@pytest.mark.parametrize(
    ("site", "flags"), [("mlp_out", ()), ("resid_post", ("full",)), ("mlp_out", ("full", "checkpointing")),
     ("mlp_out", ("full", "penalties"))],
    ids=["mlp_out", "resid_post-full", "mlp_out-full-checkpointing", "mlp_out-full-penalties"],
)  # fmt: skip
def test_fsdp2_equals_one_process(tmp_path, site, flags):
    """Sharding changes no arithmetic of the forward pass; gradients are summed over processes, so to 1e-6."""
    start("fsdp_forward.py", tmp_path / "found.pt", site, *flags, processes=2)
    saved = torch.load(tmp_path / "found.pt")
    found, expected = saved["outcome"], fsdp_outcome(fsdp_model(site, *flags))
    assert saved["world"] == 2 and saved["sharded"] == len(list(fsdp_model(site).parameters()))
    assert found.keys() == expected.keys()
    assert sum(n.startswith("grad of saes.") for n in found) == 8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for name in STEERINGS:
        assert not torch.allclose(found[name], found["unsteered"], atol=1e-2)
        torch.testing.assert_close(found[name], found[f"{name} in a block"], **EXACT)
