"""Which latents are unintended, told without a language model: from texts with an attribute swapped or a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from ...modeling import SparseAutoencoder

AT_ONCE = 1 << 22  # latents held at a time
STATISTICS = ("relative", "paired_t")
COLUMNS = ("feature", "feature_id", "featureid", "index", "latent")


class UnintendedFeatures(TypedDict):
    """scores: (d_sae,) float64 on the CPU. indices: (m,) int64, highest score first."""

    scores: Tensor
    indices: Tensor


@torch.no_grad()
def counterfactual_features(
    sae: SparseAutoencoder,
    original_states: Tensor,
    swapped_states: Tensor,
    *,
    texts: tuple[Tensor, Tensor] | None = None,
    top: int | None = None,
    threshold: float | None = None,
    statistic: str = "relative",
    eps: float = 1e-6,
) -> UnintendedFeatures:
    """Latents that react when an attribute of a text is swapped and all else stays: they stand for the attribute.

    relative:  mean|z - z'| / (mean z + mean z' + eps)     0 to 1 for latents that are not negative
    paired_t:  |mean(z - z')| / (std(z - z') / sqrt(n))    finds a latent that moves one way in all pairs

    z and z' are a latent's activations on the two texts of a pair, means over their tokens where there are several.
    Pairs of this kind are those of counterfactual fairness in texts (https://huggingface.co/papers/1809.10610); the
    scores are ours.

    Args:
        sae: whose latents are scored.
        original_states, swapped_states: (n, d_in), row by row the two texts of a pair; with `texts` a row a token.
        texts: of each row of both the number of its pair, (n_tokens,) int64 from 0, ascending, none left out.
        top: how many latents at most.
        threshold: latents that score more; without `top` and `threshold` those that score more than 0.
        statistic: `relative` or `paired_t`; the latter needs two pairs. Constant differences count as infinite.
        eps: keeps the scores of latents that are hardly ever active down.

    Raises:
        ValueError: shapes differ or do not fit the SAE, a state is not finite, an unknown statistic.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"`statistic` must be one of {', '.join(STATISTICS)}. Received: statistic={statistic!r}.")
    if top is not None and top < 1:
        raise ValueError(f"`top` must be 1 or more. Received: top={top!r}.")
    sides = [_Side(sae, original_states, texts and texts[0]), _Side(sae, swapped_states, texts and texts[1])]
    n = sides[0].n_texts
    if n != sides[1].n_texts or n < (2 if statistic == "paired_t" else 1):
        raise ValueError(
            f"Expected pairs of texts, {'2' if statistic == 'paired_t' else '1'} or more. "
            f"Received: {n} and {sides[1].n_texts} texts."
        )
    d_sae = sae.config.d_sae
    moved, signed, squared, active = (torch.zeros(d_sae, dtype=torch.float64) for _ in range(4))
    step = max(1, AT_ONCE // d_sae)
    for start in range(0, n, step):
        z, other = (side.latents(start, min(start + step, n)) for side in sides)
        change = z - other
        moved += change.abs().sum(0)
        signed += change.sum(0)
        squared += change.square().sum(0)
        active += z.abs().sum(0) + other.abs().sum(0)
    if statistic == "relative":
        scores = (moved / n) / (active / n + eps)
    else:
        centre = signed / n
        spread = ((squared / n - centre.square()).clamp(min=0) * n / (n - 1)).sqrt()
        scores = torch.where(centre == 0, 0.0, centre.abs() / (spread / n**0.5))
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > (0.0 if threshold is None else threshold)]
    return {"scores": scores, "indices": order if top is None else order[:top]}


class _Side:
    """One of the two texts of all pairs."""

    def __init__(self, sae: SparseAutoencoder, states: Tensor, texts: Tensor | None) -> None:
        if states.ndim != 2 or states.shape[1] != sae.config.d_in or not len(states):
            raise ValueError(f"Expected states (n, {sae.config.d_in}). Received: {tuple(states.shape)}.")
        if not bool(torch.isfinite(states).all()):
            raise ValueError("States must be finite. Received: some that are not.")
        if texts is None:
            texts = torch.arange(len(states))
        texts = texts.cpu()
        counts = torch.bincount(texts) if len(texts) == len(states) and int(texts.min()) >= 0 else texts.new_zeros(1)
        if not bool((texts.diff() >= 0).all()) or not bool(counts.all()):
            raise ValueError(
                f"`texts` must number the pair of each of {len(states)} states, from 0, ascending, none left out. "
                f"Received: {len(texts)} numbers from {int(texts.min())} to {int(texts.max())}."
            )
        self.sae, self.states, self.counts, self.ends = sae, states, counts, counts.cumsum(0)
        self.n_texts = len(counts)

    def latents(self, start: int, stop: int) -> Tensor:
        """(stop - start, d_sae) float64 on the CPU: of each text the mean over its tokens."""
        counts = self.counts[start:stop]
        first, last = int(self.ends[start] - counts[0]), int(self.ends[stop - 1])
        sums = torch.zeros(stop - start, self.sae.config.d_sae, dtype=torch.float64)
        place = torch.arange(stop - start).repeat_interleave(counts)
        step = max(1, AT_ONCE // self.sae.config.d_sae)
        for row in range(first, last, step):
            rows = self.states[row : min(row + step, last)].to(device=self.sae.device, dtype=self.sae.dtype)
            sums.index_add_(0, place[row - first : row - first + len(rows)], self.sae.encode(rows).double().cpu())
        return sums / counts[:, None]


def read_feature_table(path: str | Path, d_sae: int) -> Tensor:
    """Feature ids from a plain table.

    - `.txt`: one id a line.
    - `.csv`, `.tsv`: the first column, or the one named `feature`, `feature_id`, `FeatureID`, `index` or `latent`.
    - `.json`: a list of ids, or an object with such a list under one of these names or `features`.

    Empty lines and lines that start with # do not count; an id that occurs again is ignored.

    Args:
        path: the file, UTF-8.
        d_sae: latents of the SAE that the table is of.

    Returns:
        (m,) int64, sorted.

    Raises:
        ValueError: another kind of file, an entry that is no whole number, or an id outside [0, d_sae).
    """
    path = Path(path)
    entries = _entries(path)
    ids = set()
    for place, entry in entries:
        if isinstance(entry, str) and entry.lstrip("+-").isdecimal():
            entry = int(entry)
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise ValueError(f"Feature ids are whole numbers. Received: {entry!r} in {path.name}, {place}.")
        if not 0 <= entry < d_sae:
            raise ValueError(
                f"Feature ids of this SAE are in [0, {d_sae}); is the table of another one? "
                f"Received: {entry} in {path.name}, {place}."
            )
        ids.add(entry)
    return torch.tensor(sorted(ids), dtype=torch.long)


def _entries(path: Path) -> list[tuple[str, object]]:
    """(where, entry) of each id in the file."""
    kind, text = path.suffix.lower(), path.read_text(encoding="utf-8-sig")
    if kind == ".json":
        found = json.loads(text)
        if isinstance(found, dict):
            names = [name for name in found if name.lower() in (*COLUMNS, "features")]
            found = found[names[0]] if len(names) == 1 else None
        if not isinstance(found, list):
            raise ValueError(f"Expected a list of ids, or an object with one under `features`. Received: {path.name}.")
        return [(f"entry {i}", entry) for i, entry in enumerate(found)]
    if kind not in (".txt", ".csv", ".tsv"):
        raise ValueError(f"A table of features is .txt, .csv, .tsv or .json. Received: {path.name}.")
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if kind == ".txt":
        return [(f"line {i}", line.strip()) for i, line in lines]
    table = list(csv.reader([line for _, line in lines], delimiter="\t" if kind == ".tsv" else ","))
    numbers, column = [i for i, _ in lines], 0
    if table and not table[0][0].strip().lstrip("+-").isdigit():
        header = [cell.strip().lower() for cell in table[0]]
        named = [i for i, cell in enumerate(header) if cell in COLUMNS]
        if len(named) != 1:
            raise ValueError(
                f"The header needs one column of {', '.join(COLUMNS)}. Received: {table[0]!r} in {path.name}."
            )
        column, table, numbers = named[0], table[1:], numbers[1:]
    return [
        (f"line {i}", row[column].strip() if len(row) > column else "") for i, row in zip(numbers, table, strict=False)
    ]
