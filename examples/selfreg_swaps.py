"""Is a classifier kept off an attribute best with an SAE or without? One rule on several sets of swapped texts.

    python examples/selfreg_swaps.py --sae outputs/pretrain/sae \\
        --pairs comments train.csv test.csv original.csv swapped.csv \\
        --words dialogues dialogues.csv - he:she,him:her,man:woman

A set has texts with labels (columns text and label; `-` for no test part) and pairs in which only an attribute
differs: two files, row by row, or words to swap in the texts themselves. Heads read the mean hidden state of a text.
For each of three divisions of texts and pairs, a third of the pairs tells which features and directions react to the
swap, a third chooses, and the last third measures. Candidates: SelfReg (https://huggingface.co/papers/2502.14133) with
so many features removed and its penalty, as many at random; and without an SAE a penalty on the pairs and two
erasures. The rule takes, of those that lose at most a point of the validation F1, the one whose score moves least on
the pairs that choose.

Prints numbers, never texts; hidden states are cached in --out, results.json has every figure.
Needs: pip install 'sae-transformers[evaluation]'
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from sae_transformers import (
    HeadSettings,
    HiddenStateReader,
    SparseAutoencoder,
    choose_on_validation,
    classification_metrics,
    counterfactual_features,
    difference_sae,
    leace,
    load,
    make_swaps,
    open_text,
    project_out,
    swap_directions,
    swap_measures,
    train_heads,
)

SEEDS = (14592, 3278, 36048, 32098, 29256, 18289)  # the paper's
FEATURES, PENALTIES = (50, 100, 200, 400), (0.0, 0.3)
DIRECTIONS, PAIRING = (1, 2, 5, 10, 20, 50), (0.3, 1.0, 3.0)
BASE = HeadSettings(learning_rate=3e-3)  # at SelfReg's 1e-3 the plain head, too, stops before it has learnt the task
ERASURES = {"projection": project_out, "leace": leace}
OUTLIER = 10.0  # times the median norm: a text's first token and a few others would be all that is left of its mean


@dataclass
class Part:
    """Texts by number: states of their tokens (n_tokens, d), the text of each (n_tokens,), and what is pooled of each
    text, (n, d) and the SAE's latents (n, d_sae) in the units of the state."""

    tokens: Tensor
    index: Tensor
    pooled: Tensor
    latents: Tensor

    def of(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of some texts, ascending, and their number among these."""
        places = torch.full((len(self.pooled),), -1).index_copy_(0, texts, torch.arange(len(texts)))[self.index]
        return self.tokens[places >= 0].float(), places[places >= 0]


class Reader:
    """States of texts at the SAE's place, read once and kept in a folder."""

    def __init__(self, args: argparse.Namespace, sae: SparseAutoencoder) -> None:
        self.args, self.sae, self.model = args, sae, None

    @torch.no_grad()
    def part(self, name: str, texts: Sequence[str]) -> Part:
        file = self.args.out / f"{name}.safetensors"
        facts = f"{self.args.model}, {self.sae.config.read_at}, {self.args.max_length} tokens, {len(texts)} texts"
        if not file.exists():
            self._read(file, texts, facts)
        with safe_open(file, framework="pt") as stored:
            if (of := (stored.metadata() or {}).get("of")) != facts:
                raise SystemExit(f"{file} is of {of}, not of {facts}: give another --out, or delete it.")
        found = load_file(file)
        tokens, index, n = found["tokens"], found["index"], len(texts)
        counts = torch.bincount(index, minlength=n).clamp(min=1)[:, None]
        pooled = torch.zeros(n, tokens.shape[1])
        latents = torch.zeros(n, self.sae.config.d_sae)
        for start in range(0, len(tokens), 4096):
            rows = slice(start, start + 4096)
            hidden = tokens[rows].float()
            scale = self.sae.normalize(hidden).scale
            z = self.sae.encode(hidden)
            pooled.index_add_(0, index[rows], hidden)
            latents.index_add_(0, index[rows], z if scale is None else z * scale)
        return Part(tokens, index, pooled / counts, latents / counts)

    def _read(self, file: Path, texts: Sequence[str], facts: str) -> None:
        if self.model is None:
            self.model, self.tokenizer, _ = load(self.args.model, [], model_dtype="float32")
        place = self.sae.config.read_at
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.args.max_length)["input_ids"]
        ids = [torch.tensor(row or [self.tokenizer.eos_token_id]) for row in rows]
        keep = [torch.arange(min(1, len(row) - 1), len(row)) for row in ids]
        states = HiddenStateReader(self.model, [place]).read(ids, keep, dtype=torch.float32)[place]
        index = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(k) for k in keep]))
        norms = states.norm(dim=-1)
        usual = norms <= OUTLIER * norms.median()
        save_file({"tokens": states[usual].half(), "index": index[usual]}, file, metadata={"of": facts})


@dataclass
class SwapSet:
    """A task and pairs. train_size: how many of its texts train, in each division."""

    name: str
    texts: Part
    labels: Tensor
    train_size: int
    original: Part
    swapped: Part


def read_set(reader: Reader, name: str, train: str, test: str, pairs: Sequence[str]) -> SwapSet:
    """Of files, or of words to swap."""
    rows = list(open_text(train).rows())
    train_size = len(rows) if test != "-" else round(0.7 * len(rows))
    if test != "-":
        rows += open_text(test).rows()
    texts, names = [row["text"] for row in rows], [str(row["label"]) for row in rows]
    known = {label: i for i, label in enumerate(sorted(set(names)))}
    if len(pairs) == 1:
        both = make_swaps(texts, pairs[0])
    else:
        columns = [[row["text"] for row in open_text(path).rows()] for path in pairs]
        changed = [pair for pair in zip(*columns, strict=True) if pair[0] != pair[1]]
        both = [one for one, _ in changed], [other for _, other in changed]
    limit = reader.args.max_pairs
    original = reader.part(f"{name}-original", both[0][:limit])
    swapped = reader.part(f"{name}-swapped", both[1][:limit])
    labels = torch.tensor([known[label] for label in names])
    return SwapSet(name, reader.part(f"{name}-texts", texts), labels, train_size, original, swapped)


# -- one division -----------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """How heads are trained: what is done to pooled states of a part's texts, and the differences of pairs that a
    penalty is on."""

    settings: HeadSettings
    taken: Tensor | None = None
    erasure: Any = None
    differences: SparseAutoencoder | None = None

    def states(self, sae: SparseAutoencoder, part: Part, texts: Tensor) -> Tensor:
        states = part.pooled[texts]
        if self.taken is not None:
            states = states - part.latents[texts][:, self.taken] @ sae.W_dec[self.taken].detach()
        return states if self.erasure is None else self.erasure(states)


def ways_of(sae: SparseAutoencoder, one: SwapSet, found: Tensor, train: Tensor, division: int) -> dict[str, Way]:
    """Candidates; `found` pairs tell which features and directions react."""
    ways = {"plain": Way(BASE)}
    sides = [part.of(found) for part in (one.original, one.swapped)]
    features = counterfactual_features(
        sae, sides[0][0], sides[1][0], texts=(sides[0][1], sides[1][1]), top=max(FEATURES)
    )["indices"]
    drawn = torch.randperm(sae.config.d_sae, generator=torch.Generator().manual_seed(division))
    for count in FEATURES:
        for penalty in PENALTIES:
            head = replace(BASE, method="selfreg", penalty=penalty, alignment="decoder", removal="none")
            ways[f"selfreg, {count} features, penalty {penalty:g}"] = Way(head, features[:count])
            ways[f"random, {count} features, penalty {penalty:g}"] = Way(head, drawn[:count])
    original, swapped = one.original.pooled[found], one.swapped.pooled[found]
    for penalty in PAIRING:
        head = replace(BASE, method="selfreg", penalty=penalty, alignment="decoder", removal="none")
        ways[f"pairing, penalty {penalty:g}"] = Way(head, differences=difference_sae(original - swapped))
    directions = swap_directions(original, swapped, max(DIRECTIONS))
    for name, erase in ERASURES.items():
        for count in DIRECTIONS:
            ways[f"{name}, {count} directions"] = Way(
                BASE, erasure=erase(one.texts.pooled[train], directions[:, :count])
            )
    return ways


def measure(
    sae: SparseAutoencoder, one: SwapSet, division: int, seeds: Sequence[int], epochs: int | None
) -> dict[str, list[dict[str, float]]]:
    """Way -> a row of measures a seed."""
    draw = torch.Generator().manual_seed(division)
    order = torch.randperm(len(one.labels), generator=draw)
    train, test = order[: one.train_size], order[one.train_size :]
    pairs, third = torch.randperm(len(one.original.pooled), generator=draw), len(one.original.pooled) // 3
    found, chosen, measured = pairs[:third].sort().values, pairs[third : 2 * third], pairs[2 * third :]
    rows: dict[str, list[dict[str, float]]] = {}
    for label, way in ways_of(sae, one, found, train, division).items():
        settings = way.settings if epochs is None else replace(way.settings, epochs=epochs)
        given: dict[str, Any] = {} if way.taken is None else {"sae": sae, "unintended": way.taken}
        if way.differences is not None:
            given = {"sae": way.differences, "unintended": torch.arange(way.differences.config.d_sae)}
        states = way.states(sae, one.texts, train)
        heads = train_heads(states, one.labels[train], [(settings, seed) for seed in seeds], **given)
        rows[label] = []
        for head in heads:
            row = classification_metrics(
                head.logits(way.states(sae, one.texts, test)), one.labels[test], head.objective
            )
            for prefix, part in (("validation_", chosen), ("", measured)):
                both = [head.logits(way.states(sae, side, part)) for side in (one.original, one.swapped)]
                swap = swap_measures(*both)
                row |= {f"{prefix}delta": swap["delta_in_std"], f"{prefix}flips": swap["flips"]}
                row |= {f"{prefix}delta_logit": swap["delta_logit"]}
            rows[label].append({**row, "validation": head.validation_score})
    return rows


def family(label: str) -> str:
    return label.split(",")[0]


def chosen_ways(rows: Mapping[str, list[dict[str, float]]]) -> dict[str, str]:
    """What the rule takes of each family, and as `rule` of all but random features; `plain` if nothing is better."""
    plain = rows["plain"]
    families: dict[str, dict[str, list[dict[str, float]]]] = {}
    for label, measured in rows.items():
        if label != "plain":
            families.setdefault(family(label), {})[label] = measured
    families["rule"] = {label: rows[label] for label in rows if family(label) not in ("plain", "random")}
    return {name: choose_on_validation(ways, plain) or "plain" for name, ways in families.items()}


# -- what is shown ----------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} ± {half:.1f}"


def show(name: str, divisions: Sequence[Mapping[str, list[dict[str, float]]]], console: Console) -> dict[str, Any]:
    """A row for each family: what it does to F1 (points), the swap's effect in standard deviations and the flips (per
    cent), beside plain heads of the same seed and division."""
    picked = [chosen_ways(rows) for rows in divisions]
    plain = [statistics.fmean(row["delta"] for row in rows["plain"]) for rows in divisions]
    title = f"{name}: plain F1 {statistics.fmean(row['f1'] for rows in divisions for row in rows['plain']):.3f}, "
    title += "a swap moves it by " + ", ".join(f"{value:.3f}" for value in plain) + " standard deviations"
    table = Table("method", "chosen", "F1, points", "effect, %", "flips, %", title=title)
    facts: dict[str, Any] = {"plain_delta": plain}
    for way in picked[0]:
        pairs = [
            (row, base)
            for rows, names in zip(divisions, picked, strict=True)
            for row, base in zip(rows[names[way]], rows["plain"], strict=True)
        ]
        effect = [100 * (row["delta"] / base["delta"] - 1) for row, base in pairs]
        score = [100 * (row["f1"] - base["f1"]) for row, base in pairs]
        flips = [100 * (row["flips"] - base["flips"]) for row, base in pairs]
        strengths = "; ".join(dict.fromkeys(names[way].partition(", ")[2] or "plain" for names in picked))
        if way == "rule":
            strengths = "; ".join(names[way] for names in picked)
        table.add_row(way, strengths, interval(score), interval(effect), interval(flips))
        facts[way] = {"chosen": [names[way] for names in picked], "f1": score, "effect": effect, "flips": flips}
    console.print(table)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--pairs", nargs=5, action="append", default=[], metavar=("NAME", "TRAIN", "TEST", "A", "B"))
    parser.add_argument("--words", nargs=4, action="append", default=[], metavar=("NAME", "TRAIN", "TEST", "WORDS"))
    parser.add_argument("--divisions", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--max-pairs", type=int, default=2000)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path("outputs/selfreg-swaps"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=110)
    sae = SparseAutoencoder.from_pretrained(args.sae)
    reader = Reader(args, sae)
    results: dict[str, Any] = {}
    for name, train, test, *pairs in [*args.pairs, *args.words]:
        one = read_set(reader, name, train, test, pairs)
        divisions = [measure(sae, one, division, SEEDS, args.epochs) for division in range(args.divisions)]
        results[name] = {"shown": show(name, divisions, console), "rows": divisions}
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
