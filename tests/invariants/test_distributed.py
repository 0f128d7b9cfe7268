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
from peft import LoraConfig, get_peft_model

from sae_transformers import FeatureEdit, FeaturePenalty, SaeForCausalLM, SaeForSequenceClassification, Steering
from tests.invariants.test_group_penalties import SEVERAL, adapted, rows_of_two_labels
from tests.invariants.test_penalties import DISTRIBUTED
from tests.invariants.test_trainer import CHECKPOINTING, Texts
from tests.tiny import LAYERS, prompt, tiny_base, tiny_sae

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
    if "groups" in flags:
        return adapted(SEVERAL, None)
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
        if "lora" not in flags:
            model.set_penalty_reference(tiny_base(seed=1))
    if "checkpointing" in flags:
        getattr(model, f"{CHECKPOINTING}_enable")()
    return with_lora(model) if "lora" in flags else model


def with_lora(model: Any) -> Any:
    """As after some steps, so that switching it off changes the states."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted


def fsdp_outcome(model: Any) -> dict[str, torch.Tensor]:
    """The same batch in every process, so that the averaged gradient is the gradient."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_classifier = isinstance(inner, SaeForSequenceClassification)
    rows = rows_of_two_labels()[:3] if is_classifier else Texts(3).rows
    batch = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "attention_mask", "labels")}
    targets = {} if is_classifier else {"concept_targets": torch.tensor([[1, 0], [0, -100], [1, 1]])}
    out = model.train()(**batch, **targets)
    out.loss.backward()
    found = {"loss": out.loss.detach()} | {f"term {n}": value.detach() for n, value in out.sae_losses.items()}
    found |= {f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    if is_classifier:
        return found
    with torch.no_grad():
        found["unsteered"] = model(prompt()).logits
        for name, steering in STEERINGS.items():
            found[name] = model(prompt(), steering=steering).logits
            with inner.steered(steering):
                found[f"{name} in a block"] = model(prompt()).logits
        out = model(prompt(), output_features=True, output_sae_inputs=True)
        for number in range(2):
            found[f"features {number}"] = out.sae_features[number].to_dense()
            # The public methods gather the shards too.
            found[f"encoded {number}"] = inner.saes[number].encode(out.sae_inputs[number])
            found[f"decoded {number}"] = inner.saes[number].decode(found[f"encoded {number}"])
    return found


@pytest.mark.parametrize(
    ("site", "flags"), [("mlp_out", ()), ("resid_post", ("full",)), ("mlp_out", ("full", "checkpointing")),
     ("mlp_out", ("full", "penalties")), ("resid_post", ("penalties", "lora")),
     ("mlp_out", ("penalties", "lora", "checkpointing"))],
    ids=lambda one: one if isinstance(one, str) else "-".join(one) or "plain",
)  # fmt: skip
def test_fsdp2_equals_one_process(tmp_path, site, flags):
    """Sharding changes no arithmetic of the forward pass; gradients are summed over processes, so to 1e-6."""
    start("fsdp_forward.py", tmp_path / "found.pt", site, *flags, processes=2)
    saved = torch.load(tmp_path / "found.pt")
    found, expected = saved["outcome"], fsdp_outcome(fsdp_model(site, *flags))
    assert saved["world"] == 2 and saved["sharded"] == len(list(fsdp_model(site, *flags).parameters()))
    assert found.keys() == expected.keys()
    assert "penalties" not in flags or found["term penalty_2"] > 1e-2  # towards the reference
    trained = [name for name in found if name.startswith("grad of ") and found[name].any()]
    assert sum("lora_" in n if "lora" in flags else n.startswith("grad of saes.") for n in trained) == (
        2 * 2 * LAYERS if "lora" in flags else 8
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for name in STEERINGS:
        assert not torch.allclose(found[name], found["unsteered"], atol=1e-2)
        torch.testing.assert_close(found[name], found[f"{name} in a block"], **EXACT)


def test_group_penalties_over_two_processes(tmp_path):
    """Of a classifier through a LoRA, with another pass for each group before the backward one: DDP with `Trainer`,
    and FSDP2."""
    two, one = tmp_path / "two", tmp_path / "one"
    for folder, processes in ((two, 2), (one, 1)):
        folder.mkdir()
        start("ddp_trainer.py", folder, 4 // processes, "groups", "accumulate", processes=processes)
    first, alone = torch.load(two / "rank0.pt"), torch.load(one / "rank0.pt")
    assert (first["world"], alone["world"]) == (2, 1)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for name, value in alone["parameters"].items():
        torch.testing.assert_close(first["parameters"][name], value, rtol=1e-6, atol=1e-6)
    start("fsdp_forward.py", tmp_path / "found.pt", "none", "groups", processes=2)
    saved = torch.load(tmp_path / "found.pt")
    found, expected = saved["outcome"], fsdp_outcome(fsdp_model("none", "groups"))
    assert saved["world"] == 2 and found.keys() == expected.keys()
    assert expected["term group_a"] > 1e-3 and sum("lora_" in name for name in found) == 2 * 2 * LAYERS
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
