"""What the server's engine costs beside one `generate` batch, without HTTP: greedy, sampled and steered streams.

    python benchmarks/engine.py
    python benchmarks/engine.py HuggingFaceTB/SmolLM2-135M-Instruct --streams 8 --tokens 12

CPU time of the process, one thread; all cases take turns, round by round. Printed is the time of a step of all
streams, and its ratio to a greedy batch of the bare base: of the minima, and the median of the rounds' ratios. Without
a model it is a random Llama of two layers and width 64 with SmolLM2's vocabulary: all but the model shows.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sae_transformers import FeatureEdit, SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig, Steering
from sae_transformers.serving.engine import Answer, Engine
from sae_transformers.serving.sampling import Sampling

SAMPLED = {"temperature": 0.8, "top_p": 0.95}


class NoText:
    """A tokenizer whose tokens have no text: what tokens are turned into is not measured."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""


def load(name: str | None) -> PreTrainedModel:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def generated(model: Any, prompts: torch.Tensor, tokens: int, **options: Any) -> None:
    mask = torch.ones_like(prompts)
    model.generate(
        prompts, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, **{"do_sample": False, **options}
    )


def written(engine: Engine, tokenizer: Any, prompts: torch.Tensor, sampling: Sampling, steered: bool) -> None:
    """All streams together, as the server writes them."""
    over, left = threading.Event(), [len(prompts)]

    def report(answer: Answer, piece: str, reason: str | None) -> None:
        if reason == "error":
            raise RuntimeError(str(answer.error))
        left[0] -= reason is not None
        if not left[0]:
            over.set()

    edits = [[FeatureEdit(feature=7 + n, op="add", value=0.1)] if steered else [] for n in range(len(prompts))]
    answers = [
        Answer(row.tolist(), Steering(edit), sampling, tokenizer, report, n)
        for n, (row, edit) in enumerate(zip(prompts, edits, strict=True))
    ]
    engine.submit(answers)
    over.wait()


def cpu_time(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load(options.model)
    base.generation_config.eos_token_id = None  # answers of one length
    width = base.config.get_text_config().hidden_size
    config = SparseAutoencoderConfig(d_in=width, d_sae=8 * width, activation="topk", k=16, layer=1)
    model = SaeForCausalLM.from_base(base, saes=[SparseAutoencoder(config)]).eval()
    tokenizer = NoText() if options.model is None else AutoTokenizer.from_pretrained(options.model)
    engine = Engine(model, tokenizer, max_concurrent=max(options.streams))
    engine.start()
    greedy = Sampling(options.tokens)
    drawn = Sampling(options.tokens, seed=0, **SAMPLED)
    console = Console(width=110)
    for streams in options.streams:
        prompts = torch.randint(5, base.config.vocab_size, (streams, 16))
        cases = {
            "generate": partial(generated, base, prompts, options.tokens),
            "generate, with SAEs": partial(generated, model, prompts, options.tokens),
            "engine": partial(written, engine, tokenizer, prompts, greedy, False),
            "engine, each steered": partial(written, engine, tokenizer, prompts, greedy, True),
            "generate, sampled": partial(generated, base, prompts, options.tokens, do_sample=True, top_k=0, **SAMPLED),
            "engine, sampled": partial(written, engine, tokenizer, prompts, drawn, False),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(options.rounds + 1):
            for name, case in cases.items():
                seconds = cpu_time(case)
                if turn:  # the first warms up
                    times[name].append(seconds)
        table = Table("", "ms a step", "to generate: minima", "medians", title=f"{streams} streams")
        for name, found in times.items():
            ratios = [a / b for a, b in zip(found, times["generate"], strict=True)]
            least = min(found) / min(times["generate"])
            table.add_row(name, f"{1e3 * min(found) / options.tokens:.1f}", f"{least:.2f}", f"{median(ratios):.2f}")
        console.print(table)
    engine.stop()


if __name__ == "__main__":
    main()
