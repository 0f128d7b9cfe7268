"""Tiny published repositories, requests for them, and what `generate` answers: what vLLM must answer too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from tests.tiny import VOCAB, tiny_base, tiny_sae

WIDTH, NEW_TOKENS = 64, 12
# Attention on CPUs wants heads of 32.
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 96, "moe_intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
NEAR_TIE = 1e-4  # between the two largest logits
LENGTHS = (5, 9, 17, 30, 50, 70, 90, 130)
STEERINGS: dict[str, Steering | None] = {
    "none": None,
    "direction": Steering([FeatureEdit(feature=3, op="direction", value=6.0)]),
    "set on JumpReLU": Steering([FeatureEdit(feature=5, op="set", value=8.0)]),
    "set on top-k": Steering([FeatureEdit(sae=1, feature=7, op="set", value=8.0)]),
    "add on the prompt": Steering([FeatureEdit(feature=9, op="add", value=6.0)], positions="prompt"),
    "scale and at_least in ranges": Steering(
        [FeatureEdit(feature=2, op="scale", value=-3.0), FeatureEdit(feature=4, op="at_least", value=4.0)],
        positions=[(1, 5), (-2, None)],
    ),
    "ablate without error": Steering([FeatureEdit(feature=6, op="ablate")], positions="last_prompt", keep_error=False),
    "unit max": Steering([FeatureEdit(feature=8, op="set", value=2.0, unit="max")]),
}


class Job(NamedTuple):
    """A request. steering: as `extra_args` carry it; None: nothing is given."""

    prompt: list[int]
    steering: Any


class Answer(NamedTuple):
    """tokens: (n,). gaps: between the two largest logits at each of them."""

    tokens: list[int]
    gaps: list[float]


def two_saes() -> list[Any]:
    """One of each kind of encoder, at two sites of one block."""
    return [
        tiny_sae(d_in=WIDTH, activation="jumprelu", layer=1, site="resid_post"),
        tiny_sae(d_in=WIDTH, seed=2, activation="topk", layer=1, site="mlp_out"),
    ]


def published(folder: Path, architecture: str = "llama", scope: str = "sae", **options: Any) -> SaeForCausalLM:
    """A model in `folder/repository`, with its base in `folder/base`."""
    tiny_base(architecture, **SIZES).save_pretrained(folder / "base")
    # transformers' default drops Gemma 2's soft cap of attention scores, which vLLM has.
    attention = "eager" if architecture == "gemma2" else "sdpa"
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation=attention)
    model = SaeForCausalLM.from_base(base, two_saes(), weights_scope=scope, **options).eval()
    model.save_pretrained(folder / "repository")
    return model


def mixed_jobs(seed: int = 0) -> list[Job]:
    """Every prompt with every steering, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    jobs = [Job(prompt, False if s is None else s.to_dict()) for prompt in prompts for s in STEERINGS.values()]
    return [jobs[place] for place in torch.randperm(len(jobs), generator=generator).tolist()]


@torch.no_grad()
def answers(model: SaeForCausalLM, jobs: Sequence[Job]) -> list[Answer]:
    """What `generate` writes, greedily."""
    found = []
    for prompt, steering in jobs:
        ids = torch.tensor([prompt])
        out: Any = model.generate(
            ids, attention_mask=torch.ones_like(ids), steering=steering, do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        largest = torch.cat(out.logits).topk(3).values  # a token that ends texts may be among them
        gaps = (largest[:, :-1] - largest[:, 1:]).amin(-1)
        found.append(Answer(out.sequences[0, len(prompt) :].tolist(), gaps.tolist()))
    return found


def differing(got: Sequence[Sequence[int]], wanted: Sequence[Answer]) -> list[int]:
    """Which answers are others, up to a position where two tokens are nearly as likely."""
    return [
        place
        for place, (tokens, answer) in enumerate(zip(got, wanted, strict=True))
        if any(
            token != expected and min(answer.gaps[: position + 1]) > NEAR_TIE
            for position, (token, expected) in enumerate(zip(tokens, answer.tokens, strict=True))
        )
    ]


class Round(NamedTuple):
    """What an engine did. tokens: of each request. cached: prompt tokens that came from the prefix cache, and
    preemptions so far."""

    tokens: list[list[int]]
    cached: int
    preemptions: int


def run_engine(
    folder: Path, jobs: Sequence[Job], *, rounds: int = 1, without_key: bool = False, **engine: Any
) -> list[Round]:
    """Run vLLM's engine in a process of its own, which it changes for all that is in it.

    Args:
        folder: of the repository.
        rounds: how often all requests are sent.
        without_key: leave steering out of the key of the prefix cache.
        engine: options of `vllm.LLM`.
    """
    asked = {
        "repository": str(folder / "repository"), "jobs": [job._asdict() for job in jobs], "rounds": rounds,
        "without_key": without_key, "engine": engine, "new_tokens": NEW_TOKENS,
    }  # fmt: skip
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps(asked))
    command = [sys.executable, "-m", "tests.vllm.engine_process", str(request), str(answer)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return [Round(**found) for found in json.loads(answer.read_text())]


ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of a process with an engine on a small machine that others use too."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
