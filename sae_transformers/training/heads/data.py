"""States and labels that heads are trained on, checked, and how they are split."""

from __future__ import annotations

import torch
from torch import Tensor

from ...evaluation.classification import OBJECTIVES


class HeadData:
    """Cached states with their labels.

    states: (n, d) or (n, 2, d), float32 or float64. targets: (n,) 0 or 1 in the states' dtype for `binary`; (n,) int64
    for `multi_class`; (n, n_labels) in the states' dtype for `multi_label`; None for `pairwise`. n_outputs: rows of a
    head. width: d.
    """

    def __init__(self, states: Tensor, labels: Tensor | None, objective: str | None) -> None:
        if not isinstance(states, Tensor) or not (labels is None or isinstance(labels, Tensor)):
            raise TypeError(
                f"`states` and `labels` must be tensors; `label_ids` makes one of words. "
                f"Received: {type(states).__name__} and {type(labels).__name__}."
            )
        self.objective = objective or _objective_of(states, labels)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}. Received: objective={objective!r}.")
        pairs = self.objective == "pairwise"
        fits = states.ndim == 3 and states.shape[1] == 2 if pairs else states.ndim == 2
        if pairs:
            fits = fits and labels is None
        elif labels is not None:
            fits = fits and labels.ndim == (2 if self.objective == "multi_label" else 1)
            fits = fits and len(labels) == len(states)
        if not fits or (labels is None and not pairs) or not states.is_floating_point() or len(states) < 2:
            raise ValueError(
                f"Expected two or more float states (n, d) with labels (n,) or (n, n_labels), or pairs (n, 2, d) with "
                f"labels=None. Received: objective={self.objective!r}, states {tuple(states.shape)} {states.dtype}, "
                f"labels {None if labels is None else tuple(labels.shape)}."
            )
        if not bool(torch.isfinite(states).all()):
            texts = int((~states.isfinite()).flatten(1).any(-1).sum())
            raise ValueError(f"`states` must be finite. Received: {texts} of {len(states)} that are not.")
        self.states = states.detach().to(states.dtype if states.dtype == torch.float64 else torch.float32)
        self.width, self.n_outputs = states.shape[-1], 1
        self.targets: Tensor | None = None
        if labels is not None:
            self._set_targets(labels.detach().to(states.device))

    def _set_targets(self, labels: Tensor) -> None:
        whole = labels.long()
        values = whole.unique().tolist()
        classes = self.objective == "multi_class"
        if not bool((whole == labels).all()) or values[0] < 0 or (not classes and values[-1] > 1):
            raise ValueError(
                f"`labels` must be whole, 0 or 1{' or more' if classes else ''}. "
                f"Received: {sorted(set(labels.reshape(-1).tolist()))[:5]}."
            )
        columns = whole.view(len(whole), -1)
        alike = [c for c in range(columns.shape[1]) if bool((columns[:, c] == columns[0, c]).all())]
        if alike:
            where = f"in label {alike[0]}" if self.objective == "multi_label" else "in all labels"
            raise ValueError(f"Two classes or more must occur. Received: only {int(columns[0, alike[0]])} {where}.")
        if classes:
            missing = sorted(set(range(values[-1] + 1)) - set(values))
            if missing:
                raise ValueError(f"Every class up to {values[-1]} must occur. Received: none of class {missing[0]}.")
            self.n_outputs, self.targets = values[-1] + 1, whole
        else:
            self.n_outputs = whole.shape[1] if self.objective == "multi_label" else 1
            self.targets = whole.to(self.states.dtype)

    def __len__(self) -> int:
        return len(self.states)


def split_rows(data: HeadData, validation: float | Tensor, seed: int, select_by: str) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate on, (n_train,) and (n_val,) int64, none in both.

    Args:
        validation: share of each class, rounded, at least one text and never all; or the rows.
        seed: of the draw.
        select_by: `auroc` needs each class among the rows.
    """
    n = len(data)
    if isinstance(validation, Tensor):
        rows = validation.detach().cpu().long()
        if validation.ndim != 1 or validation.dtype == torch.bool or len(rows.unique()) != len(rows):
            raise ValueError(f"`validation` rows must be distinct indices (n_val,). Received: {validation!r}.")
        if not 0 < len(rows) < n or int(rows.min()) < 0 or int(rows.max()) >= n:
            raise ValueError(f"`validation` must be some of {n} rows, not all. Received: {len(rows)} rows.")
        held = torch.zeros(n, dtype=torch.bool).index_fill(0, rows, True)
    else:
        if not 0 < validation < 1:
            raise ValueError(f"`validation` must be inside (0, 1) or indices. Received: validation={validation!r}.")
        strata = torch.zeros(n, dtype=torch.long)
        if data.targets is not None and data.targets.ndim == 1:
            strata = data.targets.long().cpu()
        generator, held = torch.Generator().manual_seed(seed), torch.zeros(n, dtype=torch.bool)
        for value in strata.unique():
            members = (strata == value).nonzero()[:, 0]
            count = min(max(1, round(validation * len(members))), len(members) - 1)  # a class of one is trained on
            held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
        if not bool(held.any()):
            raise ValueError(
                f"A class needs two texts for one to validate on. Received: {n} texts, one of each class."
            )
    if data.targets is not None and select_by == "auroc":
        seen = data.targets[held.to(data.targets.device)].view(int(held.sum()), -1)
        wanted = data.n_outputs if data.objective == "multi_class" else 2
        if any(len(column.unique()) < wanted for column in seen.T):
            raise ValueError(
                "`select_by='auroc'` needs each class among the validation texts. Received: one is missing."
            )
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _objective_of(states: Tensor, labels: Tensor | None) -> str:
    if labels is None or states.ndim == 3:
        return "pairwise"
    if labels.ndim == 2:
        return "multi_label"
    return "multi_class" if len(labels) and int(labels.max()) > 1 else "binary"
