"""Classification heads on cached hidden states: SelfReg and its baselines, many methods and seeds in one pass.

All runs of a call have stacked parameters (r, n_out, d) and share each batched product, so a sweep costs little more
than the reading of its batches. A run's result depends on no other run: it has its own split, order of batches,
dropout, learning rate, best epoch and early stop, and leaves the stack when it stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.fairness.counterfactuals import check_features, unintended_reconstruction
from ...modeling import SparseAutoencoder
from .data import HeadData, split_rows
from .losses import UnintendedRows
from .settings import METHODS, HeadSettings
from .stack import HeadStack, Run

__all__ = ["METHODS", "HeadSettings", "Removal", "TrainedHead", "label_ids", "train_heads"]


@dataclass(frozen=True, eq=False)
class Removal:
    """Takes unintended features out of hidden states: H - relu(pre_U) @ W_dec[U], and - b_dec where asked.

    SelfReg (https://huggingface.co/papers/2502.14133), section 3.
    """

    sae: SparseAutoencoder = field(repr=False)
    features: Tensor = field(repr=False)
    subtract_b_dec: bool = False

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """States (..., d_in) without them, same dtype and device; exactly the states where U is empty."""
        left = states - unintended_reconstruction(states, self.sae, self.features)
        if self.subtract_b_dec:
            scale = self.sae.normalize(states.to(device=self.sae.device, dtype=self.sae.dtype)).scale
            b_dec = self.sae.b_dec if scale is None else self.sae.b_dec * scale
            left = left - b_dec.to(left)
        return left


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """One run's head, of its best epoch (`overfit`: the last), and how it came about.

    weight: (n_out, d), or (n_out, hidden_size) with a hidden layer; n_out is 1 for `binary` and `pairwise`.
    bias: (n_out,). hidden_weight: (hidden_size, d), hidden_bias: (hidden_size,), or None.
    history: a dict an epoch: `epoch` from 1, `loss` (mean over batches, with penalties), `score`, `learning_rate`.
    removal: what is done to states first, or None.
    """

    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None
    objective: str
    settings: HeadSettings
    seed: int
    history: list[dict[str, float]] = field(repr=False)
    best_epoch: int
    validation_score: float
    removal: Removal | None = None

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Scores of hidden states (..., d): (...) for `binary` and `pairwise`, else (..., n_out).

        Pairs (n, 2, d) give (n, 2), the scores of chosen and rejected. Features are removed here too.
        """
        return self.scores(states)

    def scores(self, states: Tensor) -> Tensor:
        """`logits`, with a gradient for the states."""
        x = states.to(self.weight)
        x = x if self.removal is None else self.removal(x)
        if self.hidden_weight is not None:
            x = F.linear(x, self.hidden_weight, self.hidden_bias).relu()
        scores = F.linear(x, self.weight, self.bias)
        return scores[..., 0] if self.objective in ("binary", "pairwise") else scores


def label_ids(
    labels: Sequence[str | int], label2id: Mapping[str | int, int] | None = None
) -> tuple[Tensor, dict[str | int, int]]:
    """Labels as words to class indices.

    Args:
        labels: n labels.
        label2id: index of each label; by default the labels that occur, in sorted order.

    Returns:
        (n,) int64, and the mapping.

    Raises:
        ValueError: a label that `label2id` has not.
    """
    known = (
        dict(label2id) if label2id is not None else {name: i for i, name in enumerate(sorted(set(labels), key=str))}
    )
    unknown = sorted({str(label) for label in labels if label not in known})
    if unknown:
        raise ValueError(f"Labels are {', '.join(map(str, known))}. Received: {', '.join(unknown[:5])}.")
    return torch.tensor([known[label] for label in labels], dtype=torch.long), known


def train_heads(
    states: Tensor,
    labels: Tensor | None,
    runs: Sequence[tuple[HeadSettings, int]],
    *,
    objective: str | None = None,
    sae: SparseAutoencoder | None = None,
    unintended: Tensor | Sequence[Tensor] | None = None,
    validation: float | Tensor = 0.2,
    report: Callable[[int, dict[str, float]], Any] | None = None,
) -> list[TrainedHead]:
    """Train one head a run on cached states.

    Each epoch is scored on the run's validation texts, which it never trains on. The best epoch's parameters are
    kept; when `patience` epochs bring none better, training goes on from the best ones with a lower learning rate, and
    in the end stops. The optimiser's moments are kept through that.

    Args:
        states: (n, d), or (n, 2, d) of pairs, chosen and rejected; float32 or float64, other floats become float32.
        labels: (n,) 0 or 1 for `binary`; (n,) class indices for `multi_class`; (n, n_labels) 0 or 1 for `multi_label`;
            None for `pairwise`. For words see `label_ids`.
        runs: settings and seed of each. The seed sets the first weights, the split, the batches and the dropout.
        objective: `binary`, `multi_class`, `multi_label` or `pairwise`; by default what states and labels look like.
        sae: whose features are unintended; frozen. Needed by `selfreg` and by removal.
        unintended: (m,) indices or a (d_sae,) mask, for all labels; or one for each output row. Removed are those
            that are unintended for every label that has any.
        validation: share of the texts, split by each run's seed, class by class (pairs and multi-label at random); or
            (n_val,) indices of the texts, for all runs.
        report: called after each epoch of each run with its place in `runs` and the epoch's entry of `history`.

    Returns:
        The heads, in the order of `runs`.

    Raises:
        ValueError: shapes or labels do not fit, a state is not finite, only one class occurs, a split leaves nothing,
            `selfreg` or removal without `sae` and `unintended`, a loss that is not finite.
    """
    data = HeadData(states, labels, objective)
    rows = _unintended_rows(data, sae, unintended)
    for settings, _ in runs:
        if (settings.method == "selfreg" or settings.removes) and (sae is None or unintended is None):
            raise ValueError(
                f"`selfreg` and removal need `sae` and `unintended`. "
                f"Received: method={settings.method!r}, sae={type(sae).__name__}, "
                f"unintended={type(unintended).__name__}."
            )
    removals: dict[bool, Removal] = {}
    if sae is not None and unintended is not None:
        features = _removed(rows)
        removals = {whole: Removal(sae, features, whole) for whole in {s.removes_b_dec for s, _ in runs if s.removes}}
    variants = [None, *removals.values()]
    bank = torch.cat([data.states if removal is None else removal(data.states) for removal in variants])
    groups: dict[tuple, list[int]] = {}
    for place, (settings, _) in enumerate(runs):
        groups.setdefault((settings.batch_size, settings.hidden_size), []).append(place)
    found: dict[int, TrainedHead] = {}
    for (_, hidden_size), places in groups.items():
        members = []
        for place in places:
            settings, seed = runs[place]
            run = Run(place, settings, seed)
            run.offset = variants.index(removals[settings.removes_b_dec] if settings.removes else None) * len(data)
            run.train, run.validation = split_rows(data, validation, seed, settings.select_by)
            members.append(run)
        penalized = [
            group
            for alignment in sorted({runs[place][0].alignment for place in places})
            for group in _penalized(sae, rows, alignment, bank, per_row=hidden_size is None)
        ]
        HeadStack(data, bank, members, penalized, report).train()
        for run in members:
            removal = removals[run.settings.removes_b_dec] if run.settings.removes else None
            found[run.place] = _head(run, data.objective, removal)
    return [found[place] for place in range(len(runs))]


def _head(run: Run, objective: str, removal: Removal | None) -> TrainedHead:
    epoch, deep = run.patience.best_epoch, len(run.best) == 4
    return TrainedHead(
        weight=run.best[-2],
        bias=run.best[-1],
        hidden_weight=run.best[0] if deep else None,
        hidden_bias=run.best[1] if deep else None,
        objective=objective,
        settings=run.settings,
        seed=run.seed,
        history=run.history,
        best_epoch=epoch,
        validation_score=run.history[epoch - 1]["score"],
        removal=removal,
    )


def _unintended_rows(
    data: HeadData, sae: SparseAutoencoder | None, unintended: Tensor | Sequence[Tensor] | None
) -> list[Tensor]:
    """Unintended features of each output row."""
    if sae is None or unintended is None:
        return []
    if sae.config.d_in != data.width:
        raise ValueError(f"States must be {sae.config.d_in} wide, as the SAE's. Received: {tuple(data.states.shape)}.")
    if isinstance(unintended, Tensor):
        return [check_features(sae, unintended)] * data.n_outputs
    if len(unintended) != data.n_outputs:
        raise ValueError(f"Expected unintended features of {data.n_outputs} rows. Received: {len(unintended)}.")
    return [check_features(sae, features) for features in unintended]


def _removed(rows: list[Tensor]) -> Tensor:
    """Features that are unintended for every row that has any."""
    named = [row for row in rows if len(row)]
    if not named:
        return rows[0]
    found, counts = torch.cat(named).unique(return_counts=True)
    return found[counts == len(named)]


def _penalized(
    sae: SparseAutoencoder | None, rows: list[Tensor], alignment: str, like: Tensor, *, per_row: bool
) -> list[UnintendedRows]:
    """What the penalty reads: of each set of rows with the same features, or of any row's features for the units of a
    hidden layer."""
    if sae is None:
        return []
    sets: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows if per_row else [torch.cat(rows).unique()] if rows else []):
        sets.setdefault(tuple(row.tolist()), []).append(place)
    found = []
    for features, places in sets.items():
        if features:
            index = torch.tensor(features, dtype=torch.long, device=sae.device)
            directions, offset = _directions(sae, index, alignment)
            offset = None if offset is None else offset.to(like)
            found.append(UnintendedRows(places if per_row else None, alignment, directions.to(like), offset))
    return found


@torch.no_grad()
def _directions(sae: SparseAutoencoder, features: Tensor, alignment: str) -> tuple[Tensor, Tensor | None]:
    """(d, m) and (m,) or None, such that `w @ directions + offset` is `sae.alignment(w, features, alignment)`."""
    if alignment == "decoder":
        return sae.W_dec[features].T.contiguous(), None
    W_enc = sae.W_enc[:, features].contiguous()
    if alignment == "encoder":
        return W_enc, None
    return W_enc, sae.alignment(sae.b_dec.new_zeros(1, sae.config.d_in), features)[0]
