"""How much of a suppressed behaviour comes back: latents ablated, with the error or without, or erased, and others.

    python benchmarks/recovery.py --data axbench_concept10_2b_l10 --sae outputs/pretrain/sae

The behaviour is one of AxBench's concepts, harmless ones: to write answers that hold it. Latents are those that tell
its answers best (AUROC on the training answers); how many of them are taken is chosen for ablating with the error and
for erasing alike: the most that leave the perplexity of answers without the concept within --perplexity-ratio, on half
of these, so that both cost the same. Prints numbers only; writes them to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch

from sae_transformers import (
    FeatureEdit,
    SaeForCausalLM,
    SparseAutoencoder,
    Steering,
    code_aurocs,
    direction_sae,
    encode_texts,
    fit_diffmean,
    load,
    read_concept_sets,
)
from sae_transformers.evaluation.steering.recovery import (
    ATTACKS,
    RecoverySettings,
    Suppression,
    TargetPairs,
    measure_recovery,
    suppression_costs,
)
from sae_transformers.latents.batches import right_padded


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", required=True, help="folder in AxBench's layout")
    parser.add_argument("--sae", required=True, help="folder or Hub id")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--concept", type=int, help="by default the one that ablating 32 latents suppresses most")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--perplexity-ratio", type=float, default=1.15)
    parser.add_argument("--pairs", type=int, default=24, help="of each kind")
    parser.add_argument("--known", type=int, default=6, help="that the attacker has")
    parser.add_argument("--suffix-steps", type=int, default=10)
    parser.add_argument("--candidates", type=int, default=16, help="of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/recovery.json"))
    return parser.parse_args()


def pairs_of(one: Any, part: str, label: int, most: int, seed: int) -> TargetPairs:
    """Instructions and answers with the concept (1) or without."""
    examples, labels = one.labelled(part)
    found = [e for e, own in zip(examples, labels, strict=True) if own == label and len(e.instruction) <= 200]
    chosen = random.Random(seed).sample(found, min(most, len(found)))
    return TargetPairs([e.instruction for e in chosen], [e.text for e in chosen])


@torch.no_grad()
def ranked_latents(model: Any, tokenizer: Any, one: Any, seed: int) -> tuple[list[int], torch.Tensor]:
    """Latents by AUROC of their mean over a training answer, the best first; and the difference of means."""
    sides = [pairs_of(one, "train", label, 40, seed).targets for label in (1, 0)]
    texts, labels = [*sides[0], *sides[1]], torch.tensor([1] * len(sides[0]) + [0] * len(sides[1]))
    rows = [row[:64] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    states, index = [], []
    for start in range(0, len(rows), 8):
        ids, mask = right_padded(rows[start : start + 8])
        out = model(ids, attention_mask=mask, steering=False, output_sae_inputs=True, stop_at_last_sae=True)
        mask[:, 0] = 0  # the first token is an outlier
        for line in range(len(ids)):
            states.append(out.sae_inputs[0][line][mask[line].bool()])
            index.append(torch.full((len(states[-1]),), start + line))
    hidden, places = torch.cat(states), torch.cat(index)
    codes = encode_texts(model.saes[0], hidden, places, len(rows))
    means = torch.zeros(len(rows), hidden.shape[1]).index_add_(0, places, hidden)
    means /= torch.bincount(places, minlength=len(rows))[:, None]
    return code_aurocs(codes, labels).argsort(descending=True).tolist(), fit_diffmean(means, labels)


def on_latents(op: str, latents: list[int], keep_error: bool = True) -> Suppression:
    edits = [FeatureEdit(feature=latent, op=op) for latent in latents]
    return Suppression(Steering(edits, positions=[(1, None)], keep_error=keep_error))


def main() -> None:
    args, start = parse(), time.process_time()
    sets = read_concept_sets(args.data)
    base, tokenizer, _ = load(args.model, [], model_dtype="float32")
    tokenizer.padding_side = "left"
    sae = SparseAutoencoder.from_pretrained(args.sae)
    model = SaeForCausalLM.from_base(base.unwrap(), saes=[sae]).eval()
    settings = RecoverySettings(suffix_steps=args.suffix_steps, candidates=args.candidates, seed=args.seed)
    chosen = args.concept
    if chosen is None:
        gains = []
        for one in sets:
            ranked, _ = ranked_latents(model, tokenizer, one, args.seed)
            known = pairs_of(one, "train", 1, 8, args.seed)
            plain, found = suppression_costs(
                model, tokenizer, [Suppression(), on_latents("ablate", ranked[:32])], known, settings
            )
            gains.append(found - plain)
        chosen = max(range(len(sets)), key=gains.__getitem__)
        print("loss added by ablating 32 latents, by concept:", " ".join(f"{gain:.3f}" for gain in gains))
    one = sets[chosen]
    ranked, direction = ranked_latents(model, tokenizer, one, args.seed)
    model = SaeForCausalLM.from_base(model.unwrap(), saes=[sae, direction_sae(direction[None], sae.config)]).eval()
    held_out, known = pairs_of(one, "test", 1, args.pairs, args.seed), pairs_of(one, "train", 1, args.known, args.seed)
    neutral = pairs_of(one, "test", 0, 2 * args.pairs, args.seed)
    choosing, reporting = (TargetPairs(*(column[part::2] for column in neutral)) for part in (0, 1))
    suppressions = {}
    for op in ("ablate", "erase"):
        ways = [Suppression(), *(on_latents(op, ranked[:count]) for count in args.counts)]
        plain, *costs = suppression_costs(model, tokenizer, ways, choosing, settings)
        ratios = [math.exp(cost - plain) for cost in costs]
        within = [n for n, ratio in zip(args.counts, ratios, strict=True) if ratio <= args.perplexity_ratio]
        count = max(within, default=args.counts[0])
        told = " ".join(f"{n}:{ratio:.3f}" for n, ratio in zip(args.counts, ratios, strict=True))
        print(f"{op}: perplexity ratio by number of latents {told} -> {count}")
        suppressions[f"{op}, {count} latents"] = on_latents(op, ranked[:count])
        if op == "ablate":
            suppressions[f"ablate without error, {count} latents"] = on_latents(op, ranked[:count], False)
    whole = Steering([FeatureEdit(sae=1, feature=0, op="erase")], positions=[(1, None)])
    suppressions["DiffMean, projected out"] = Suppression(whole)
    suppressions["prompt"] = Suppression(None, f"Do not write anything with this in it: {one.concept}.")
    found = measure_recovery(model, tokenizer, suppressions, held_out, known, reporting, settings)
    print(f"concept {chosen}, {len(held_out.prompts)} held-out pairs, {len(known.prompts)} known")
    print(f"{'suppression':38} {'added':>7} {'ppl ratio':>9}", *(f"{attack:>24}" for attack in ATTACKS))
    for name, row in found.items():
        cells = (f"{row.recovered[a]:.0%} ({row.low[a]:.0%} to {row.high[a]:.0%})" for a in ATTACKS)
        print(
            f"{name:38} {row.suppressed:7.3f} {row.neutral_perplexity_ratio:9.3f}", *(f"{cell:>24}" for cell in cells)
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"concept": chosen, "found": {k: v._asdict() for k, v in found.items()}}, indent=1))
    print(f"{time.process_time() - start:.0f} s of CPU")


if __name__ == "__main__":
    main()
