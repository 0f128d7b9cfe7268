"""Two processes on the CPU (gloo) train what one trains with the doubled batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from tests.invariants.test_distributed import start
from tests.training.runs import PLACES, D, tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo"
    ),
]
AUX = {"aux_k": 6, "dead_after_tokens": 128, "window_tokens": 2000}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "topk with AuxK": ([{"d_sae": 128}], AUX),
    "two places": ([{"normalization": "layer_norm"}, {"layer": 1, "site": "mlp_out", "activation": "gated"}], AUX),
    "jumprelu": (
        [{"activation": "jumprelu", "tied": True}],
        {"sparsity_coefficient": 0.02, "jumprelu_bandwidth": 0.2, "window_tokens": 2000},
    ),
    "fine-tuning": (
        [{}], {"finetune_dead": True, "weight_init": "keep", "bias_init": "keep", "window_tokens": 2000},
    ),
    "concepts": ([{"concepts": {"second": 3}}], {"concept_init": "diffmean", **AUX}),
    "batch_topk": ([{"activation": "batch_topk"}], AUX),
    "stream": ([{"normalization": "scalar"}], {"window_tokens": 2000}),
}  # fmt: skip
EVALUATION_TOKENS = 333


class StreamOfRank(IterableDataset):
    """Each process has its own half of the tokens, and its own unit."""

    widths, label_names = {PLACES[0]: D}, []

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rank = int(os.environ.get("RANK", "0"))
        batches = tokens(1280).tensors[PLACES[0]].view(2, 10, 64, D)[rank] * (1 + rank)
        for number in range(self.position, 10):
            self.position += 1
            yield {PLACES[0]: batches[number]}
        self.position = 0


def run(folder: Path, case: str, processes: int, *resume: int) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    start("sae_trainer.py", folder, 128 // processes, case, *resume, processes=processes)
    suffix = "-resumed" if resume else ""
    return [torch.load(folder / f"rank{rank}{suffix}.pt") for rank in range(processes)]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, wanted[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", ["topk with AuxK", "two places", "jumprelu", "fine-tuning", "concepts"])
def test_two_processes_equal_one(tmp_path, case):
    two, (one,) = run(tmp_path / "two", case, 2), run(tmp_path / "one", case, 1)
    assert [outcome["world"] for outcome in (*two, one)] == [2, 2, 1]
    assert_same(two[0]["state"], two[1]["state"], 0.0)
    assert_same(two[0]["state"], one["state"], 1e-6)
    since = [name for name in one["state"] if name.endswith("tokens_since_fired")]
    assert since and all(torch.equal(two[0]["state"][name], one["state"][name]) for name in since)
    if case == "topk with AuxK":
        assert one["logs"][-1]["aux"] > 0
    # Logs and evaluation are over all tokens, whoever read them; loss is Trainer's own mean over processes.
    for mine, alone in zip(two[0]["logs"], one["logs"], strict=True):
        assert {n: v for n, v in mine.items() if n != "grad_norm"} == pytest.approx(
            {n: v for n, v in alone.items() if n != "grad_norm"}, rel=1e-4, abs=2e-6
        )
    assert two[0]["metrics"] == two[1]["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("case", ["topk with AuxK", "batch_topk", "stream"])
def test_two_processes_agree_and_resume(tmp_path, case):
    """BatchTopK picks from each process's own part, so that two processes differ from one."""
    whole = run(tmp_path, case, 2)
    assert_same(whole[0]["state"], whole[1]["state"], 0.0)
    assert whole[0]["scales"] == whole[1]["scales"]
    resumed = run(tmp_path, case, 2, 4)
    for outcome in resumed:
        assert_same(outcome["state"], whole[0]["state"], 0.0)
        assert outcome["scales"] == whole[0]["scales"]
