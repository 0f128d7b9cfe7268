"""How often a receipt's intervals hold what is measured on fresh prompts: many steerings of a tiny random model.

    python benchmarks/receipts.py

Each steering (a random latent, op, strength, gate) gets a receipt on some prompts and neutral texts. The same is then
measured on others, drawn in the same way; each number of the receipt either holds the new value or does not. Prompts,
texts, steerings and draws are random words of the model's vocabulary, so that there is no end of fresh ones. Prints
the share that held, of the first fresh measurement of each steering and of all, and writes them to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_transformers import (
    FeatureEdit,
    Gate,
    GenerationSettings,
    Receipt,
    ReceiptSettings,
    ReceiptTexts,
    SaeForCausalLM,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    Steering,
    measure_receipt,
)

WORDS = [f"w{number}" for number in range(96)]
WIDTH, LATENTS = 32, 64
OPS = {"direction": (0.05, 0.6), "add": (0.5, 6.0), "set": (0.0, 6.0), "scale": (-3.0, 3.0)}


def tiny_model(seed: int) -> tuple[Any, Any]:
    """A random Llama of two layers with a random SAE after the first, and a tokenizer of whole words."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(d_in=WIDTH, d_sae=LATENTS, activation="topk", k=8, layer=0, site="resid_post")
    )
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip
    return SaeForCausalLM.from_base(base, saes=[sae]).eval(), tokenizer


def texts(count: int, shortest: int, draw: random.Random) -> list[str]:
    return [" ".join(draw.choices(WORDS, k=draw.randint(shortest, 12))) for _ in range(count)]


def even_words(given: Sequence[str]) -> list[float]:
    """Share of the words with an even number: what the steering is said to be about."""
    words = [[word for word in text.split() if word in WORDS] for text in given]
    return [sum(int(word[1:]) % 2 == 0 for word in row) / max(1, len(row)) for row in words]


def a_steering(draw: random.Random) -> Steering:
    op = draw.choice(list(OPS))
    unit = "norm" if op == "direction" else "absolute"
    edit = FeatureEdit(feature=draw.randrange(LATENTS), op=op, value=draw.uniform(*OPS[op]), unit=unit)
    gate = Gate(feature=draw.randrange(LATENTS), above=draw.uniform(0.0, 1.0), over="so_far")
    return Steering([edit], when=gate if draw.random() < 0.4 else None)


def measured(model: Any, tokenizer: Any, steering: Steering, seed: int, args: argparse.Namespace) -> Receipt:
    draw = random.Random(seed)
    generation = GenerationSettings(args.new_tokens, 1.0, batch_size=64, seed=seed, chat=False)
    settings = ReceiptSettings(generation=generation, scorer_name="even words", tokens_per_batch=2048)
    prompts, neutral = texts(args.prompts, 3, draw), texts(args.neutral, 5, draw)
    return measure_receipt(model, tokenizer, steering, ReceiptTexts(prompts, neutral), even_words, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--steerings", type=int, default=50)
    parser.add_argument("--fresh", type=int, default=4, help="fresh measurements of each steering")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--neutral", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/receipts.json"))
    args = parser.parse_args()
    held: dict[str, list[list[bool]]] = {}
    for number in range(args.steerings):
        model, tokenizer = tiny_model(args.seed * 1000 + number)
        steering = a_steering(random.Random(args.seed * 1000 + number))
        first = (args.seed * 1000 + number) * 100
        receipt = measured(model, tokenizer, steering, first, args)
        others = [measured(model, tokenizer, steering, first + i, args) for i in range(1, args.fresh + 1)]
        for name, one in receipt.numbers.items():
            fresh = [other.numbers[name].value for other in others if name in other.numbers]
            if one.low is not None and one.high is not None and fresh:
                held.setdefault(name, []).append([one.low - 1e-9 <= value <= one.high + 1e-9 for value in fresh])
    print(f"{args.steerings} steerings, {args.prompts} prompts, {args.neutral} neutral texts, 90 % intervals")
    print(f"{'number':20} {'held, first':>12} {'held, all':>10} {'of':>6}  standard error")
    rows = {}
    for name, of in held.items():
        every = [hit for row in of for hit in row]
        share = sum(every) / len(every)
        error = math.sqrt(share * (1 - share) / len(of))  # the fresh ones of a steering share its interval
        rows[name] = {"first": sum(row[0] for row in of), "steerings": len(of), "share": share, "error": error}
        print(f"{name:20} {rows[name]['first']:>6} of {len(of):<3} {share:>9.1%} {len(every):>6}  {error:.3f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"settings": {**vars(args), "out": str(args.out)}, "held": rows}, indent=1))


if __name__ == "__main__":
    main()
