"""Whether vLLM on this machine steers as `generate` does: `python -m sae_transformers.vllm.check REPO`.

Prompts, steered in several ways and not, are answered greedily by `generate` and by vLLM in the ways that a server
runs it: eager, compiled with piecewise graphs, and on all GPUs by tensor parallelism. An answer is equal where every
token is the same, up to a position whose two likeliest tokens are closer than the precision can tell.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

NEW_TOKENS = 16
LENGTHS = (4, 7, 12, 20, 33, 54, 88, 130)
# Between the two largest logits: what rounding may turn round, by dtype.
NEAR_TIES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


class Mode(NamedTuple):
    """A way to run vLLM, with the options of `vllm.LLM` that make it."""

    name: str
    options: dict[str, Any]


class Result(NamedTuple):
    """mode: its name. equal, total: answers. cached: prompt tokens from the prefix cache. error: what came instead."""

    mode: str
    equal: int
    total: int
    cached: int
    error: str


def modes(n_gpus: int) -> list[Mode]:
    """The ways that this machine can run."""
    found = [Mode("eager", {"enforce_eager": True}), Mode("compiled", {"enforce_eager": False})]
    if n_gpus > 1:
        found.append(Mode(f"tensor parallel {n_gpus}", {"enforce_eager": False, "tensor_parallel_size": n_gpus}))
    return found


def requests(model: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of random tokens, each steered in some way that this model has, and each plain."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    made = []
    for place, length in enumerate(LENGTHS):
        prompt = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        made.append({"prompt": prompt, "steering": False})
        made.append({"prompt": prompt, "steering": _steering(model, place, prompt)})
    return made


@torch.no_grad()
def _steering(model: Any, place: int, prompt: Sequence[int]) -> dict[str, Any]:
    """A strong edit of the prompt's strongest latent, of a kind for each place."""
    sae = place % len(model.saes)
    ids = torch.tensor([prompt], device=model.device)
    top = model.top_features(ids, k=1, sae=sae, skip_first=0)
    row = top.values[0, :, 0].abs().argmax()
    feature, value = int(top.features[0, row, 0]), 4.0 * float(top.values[0, row, 0]) or 4.0
    positions = ("all", "prompt", "generated", [[1, None]])[place % 4]
    op = ("set", "direction", "scale")[place % 3]
    edit = {"sae": sae, "feature": max(feature, 0), "op": op, "value": value if op != "scale" else 3.0}
    return {"edits": [edit], "positions": positions}


@torch.no_grad()
def expected(model: Any, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `generate` writes, and how close the second token was."""
    found = []
    for request in asked:
        ids = torch.tensor([request["prompt"]], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), steering=request["steering"], do_sample=False,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        largest = torch.cat(out.logits).float().topk(3).values
        gaps = (largest[:, :-1] - largest[:, 1:]).amin(-1)
        found.append({"tokens": out.sequences[0, ids.shape[1] :].tolist(), "gaps": gaps.tolist()})
    return found


def same(tokens: Sequence[int], wanted: dict[str, Any], near_tie: float) -> bool:
    """Whether an answer is the expected one, up to a near tie."""
    for token, expected_token, gap in zip(tokens, wanted["tokens"], wanted["gaps"], strict=True):
        if gap < near_tie:
            return True
        if token != expected_token:
            return False
    return True


def run_mode(repository: str, options: dict[str, Any], asked: Sequence[dict[str, Any]]) -> tuple[list[Any], int]:
    """Answers of an engine in a process of its own, which gives all memory back when it ends: tokens of each request,
    and how many prompt tokens came from the prefix cache.

    Raises:
        RuntimeError: the engine did not start or ended; with the last lines that it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"repository": repository, "options": options, "requests": asked}))
        command = [sys.executable, "-m", f"{__package__}.check_process", str(request), str(answer)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode or not answer.exists():
            lines = [line for line in done.stdout.splitlines() if "Error" in line]
            raise RuntimeError(lines[-1] if lines else done.stdout[-500:])
        found = json.loads(answer.read_text())
        return found["tokens"], found["cached"]


def check(repository: str, dtype: str = "float32", **options: Any) -> list[Result]:
    """Compare vLLM with `generate` in every mode that this machine has.

    Args:
        repository: of a model with SAEs: a folder or Hub id.
        dtype: of both; SAEs are in float32 in any case.
        options: of `vllm.LLM` in all modes, such as `gpu_memory_utilization`.
    """
    from ..modeling import SaeForCausalLM

    model = SaeForCausalLM.from_pretrained(repository, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
    asked = requests(model)
    wanted = expected(model, asked)
    del model
    torch.cuda.empty_cache()
    results = []
    for mode in modes(torch.cuda.device_count()):
        try:
            tokens, cached = run_mode(repository, {"dtype": dtype, **options, **mode.options}, asked)
        except RuntimeError as error:
            results.append(Result(mode.name, 0, len(asked), 0, str(error)))
            continue
        equal = sum(same(one, other, NEAR_TIES[dtype]) for one, other in zip(tokens, wanted, strict=True))
        results.append(Result(mode.name, equal, len(asked), cached, ""))
    return results


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = ["| vLLM | answers equal to `generate` | prompt tokens from the cache |", "|---|---|---|"]
    lines += [f"| {r.mode} | {r.error or f'{r.equal} of {r.total}'} | {r.cached} |" for r in results]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 where every answer is equal."""
    parser = argparse.ArgumentParser(description="Whether vLLM steers as `generate` does on this machine.")
    parser.add_argument("repository", help="a model with SAEs: a folder or Hub id")
    parser.add_argument("--dtype", choices=list(NEAR_TIES), default="float32")
    parser.add_argument("--options", type=json.loads, default={}, help="of vllm.LLM, as JSON")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results = check(chosen.repository, chosen.dtype, **chosen.options)
    sys.stdout.write(table(results) + "\n")
    return 0 if all(r.equal == r.total for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
