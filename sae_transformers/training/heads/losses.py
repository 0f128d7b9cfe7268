"""Losses of classification heads that train side by side: r runs in the first dimension, one number a run.

Sources are in `head_settings.METHODS`. `legacy` is what the code of SelfReg (https://huggingface.co/papers/2502.14133)
computes under the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import HeadSettings

LEGACY_CLASS_WEIGHTS = (2.5, 2.5, 1.0)
LEGACY_PAIR_ALPHA = 0.2
ROWS_AT_ONCE = 8  # every product with features has this many rows, so that a run's result depends on no other run


def binary_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: Tensor | None = None,
    alpha: Tensor | None = None,
    smoothing: Tensor | None = None,
    weights: Tensor | None = None,
    legacy: bool = False,
) -> Tensor:
    """Binary cross-entropy of each run, its focal or its smoothed form.

    plain:      ce = -y log p - (1 - y) log(1 - p),  p = sigmoid(logit)
    focal:      alpha_y (1 - p_y)^gamma ce,  p_y = exp(-ce)
    smoothing:  ce of the target y (1 - s) + s / 2
    legacy smoothing:  -sum_i (y_i (1 - s) + s / B) log softmax(p)_i, a softmax over the batch and a sum: no smoothing

    Args:
        logits, targets: (r, m); targets 0 or 1.
        gamma: (r, 1). With it the loss is focal.
        alpha: (r, 2), of y = 0 and of y = 1.
        smoothing: (r, 1), s. With it the loss is smoothed.
        weights: (r, m), of a weighted mean.

    Returns:
        (r,), mean over m.
    """
    if smoothing is not None and legacy:
        goal = targets * (1 - smoothing) + smoothing / targets.shape[-1]
        return -(goal * torch.sigmoid(logits).log_softmax(-1)).sum(-1)
    goal = targets if smoothing is None else targets * (1 - smoothing) + smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    if gamma is not None:
        loss = _focus(loss, gamma) * loss
        if alpha is not None:
            loss = loss * torch.where(targets > 0.5, alpha[:, 1:], alpha[:, :1])
    return loss.mean(-1) if weights is None else (loss * weights).sum(-1) / weights.sum(-1)


def class_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: Tensor | None = None,
    smoothing: Tensor | None = None,
    weights: Tensor | None = None,
    legacy: bool = False,
) -> Tensor:
    """Cross-entropy of each run over classes, its focal or its smoothed form.

    plain:      ce = w_y (-log p_y),  p = softmax(logits);  sum(ce) / sum(w_y)
    focal:      w_y (1 - p_y)^gamma (-log p_y), the same weighted mean
    smoothing:  (1 - s) ce + s / C * sum_c w_c (-log p_c), over sum(w_y), as torch has it
    legacy:     the same of softmax(logits) in place of the logits, so that a perfect answer costs 0.5514 with three
                classes; focal: plain mean of (1 - exp(-ce))^gamma ce

    Args:
        logits: (r, B, C).
        labels: (r, B) int64.
        gamma, smoothing: (r, 1).
        weights: (r, C), of classes.

    Returns:
        (r,).
    """
    surprise = -(logits.softmax(-1) if legacy else logits).log_softmax(-1)  # (r, B, C)
    loss = surprise.gather(-1, labels[..., None])[..., 0]  # (r, B)
    if weights is None:
        weights = torch.ones_like(logits[:, 0])
    own = weights.gather(-1, labels)  # (r, B)
    if gamma is not None:
        if legacy:
            return (_focus(loss * own, gamma) * loss * own).mean(-1)
        loss = _focus(loss, gamma) * loss
    loss = loss * own
    if smoothing is not None:
        spread = (surprise * weights[:, None]).sum(-1) / logits.shape[-1]
        loss = (1 - smoothing) * loss + smoothing * spread
    return loss.sum(-1) / own.sum(-1)


def _focus(surprise: Tensor, gamma: Tensor) -> Tensor:
    """(1 - exp(-surprise))^gamma; kept off 0, where a power below 1 has no gradient."""
    return (-torch.expm1(-surprise)).clamp(min=torch.finfo(surprise.dtype).eps) ** gamma


def top_singular_values(weight: Tensor) -> Tensor:
    """Largest singular value of each matrix, exact: sqrt of the top eigenvalue of W W^T. For one row its norm.

    Args:
        weight: (r, n, d).

    Returns:
        (r,).
    """
    if weight.shape[1] == 1:
        return torch.linalg.vector_norm(weight[:, 0], dim=-1)
    if weight.shape[1] > weight.shape[2]:
        weight = weight.transpose(1, 2)
    return torch.linalg.eigvalsh(weight @ weight.transpose(1, 2))[:, -1].clamp(min=0).sqrt()


def unintended_penalty(
    weight: Tensor, directions: Tensor, offset: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Alignment of a head's rows with unintended features: mean or sum over j of |S_j|, S = w @ directions + offset.

    Its gradient by w is, for the mean, 1/m * sum_j sign(S_j) directions[:, j]. With SelfReg's directions, W_enc, and
    offset, b_enc - b_dec @ W_enc, w = 0 is not its minimum.

    Args:
        weight: (n, d), the rows w.
        directions: (d, m), of the unintended features alone; m = 0 gives 0.
        offset: (m,), or None for 0.
        reduction: `mean` or `sum` over the m features.

    Returns:
        (n,), 0 or more.
    """
    if not directions.shape[1]:
        return weight.sum(-1) * 0
    n = len(weight)
    blocks = F.pad(weight, (0, 0, 0, -n % ROWS_AT_ONCE)).split(ROWS_AT_ONCE)
    aligned = torch.cat([block @ directions for block in blocks])[:n]
    aligned = (aligned if offset is None else aligned + offset).abs()
    return aligned.mean(-1) if reduction == "mean" else aligned.sum(-1)


@dataclass(frozen=True)
class UnintendedRows:
    """Label rows of a head that share their unintended features.

    rows: of the head's output, or None for every unit of a hidden layer. alignment: of the runs that are meant.
    directions: (d, m) and offset: (m,) or None, as in `unintended_penalty`.
    """

    rows: list[int] | None
    alignment: str
    directions: Tensor
    offset: Tensor | None


class StackedLosses:
    """The losses of runs whose parameters are stacked, each with its own settings.

    Runs with one form of loss are computed together; which are where is settled here, not at each batch.
    """

    def __init__(
        self,
        settings: Sequence[HeadSettings],
        objective: str,
        like: Tensor,
        n_outputs: int,
        unintended: Sequence[UnintendedRows] = (),
    ) -> None:
        self.objective, self.unintended = objective, unintended
        self.n_runs, self.like = len(settings), like
        forms: dict[tuple, list[int]] = {}
        weights = [_class_weights(one, objective, n_outputs) for one in settings]
        for place, one in enumerate(settings):
            special = one.method if one.method in ("focal", "label_smoothing") else "plain"
            forms.setdefault((special, one.legacy, one.pair_loss, weights[place] is None), []).append(place)
        self.forms = []
        for (special, legacy, pair_loss, unweighted), places in forms.items():
            members = [settings[place] for place in places]
            options: dict[str, Tensor | bool | None] = {"legacy": legacy}
            if special == "focal":
                options["gamma"] = self._column([one.focal_gamma for one in members])
                if objective != "multi_class":
                    options["alpha"] = self._pairs([_alphas(one, objective) for one in members])
            elif special == "label_smoothing":
                options["smoothing"] = self._column([one.label_smoothing for one in members])
            table = None if unweighted else self._pairs([weights[place] or () for place in places])
            self.forms.append((self._index(places), pair_loss, table, options))
        self.norms = [
            (method, legacy, self._index(places), self._column([getattr(settings[i], factor) for i in places])[:, 0])
            for method, factor in (("l2", "l2"), ("spectral_norm", "spectral"))
            for legacy in (False, True)
            if (places := [i for i, one in enumerate(settings) if one.method == method and one.legacy == legacy])
        ]
        penalized: dict[tuple[str, str], list[int]] = {}
        for place, one in enumerate(settings):
            if one.method == "selfreg" and one.penalty:
                penalized.setdefault((one.penalty_reduction, one.alignment), []).append(place)
        self.penalties = [
            (kind, self._index(places), self._column([settings[i].penalty for i in places])[:, 0])
            for kind, places in penalized.items()
        ]

    def task(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        """(r,): each run's task loss.

        Args:
            logits: (r, B, C), of pairs (r, B, 2).
            targets: (r, B) of `binary` (floats) and `multi_class` (int64), (r, B, C) of `multi_label`, None of pairs.
        """
        total = logits.new_zeros(self.n_runs)
        for index, pair_loss, table, options in self.forms:
            part = logits.index_select(0, index)
            goal = None if targets is None else targets.index_select(0, index)
            total = total.index_add(0, index, self._form(part, goal, pair_loss, table, options))
        return total

    def _form(
        self, logits: Tensor, goal: Tensor | None, pair_loss: str, table: Tensor | None, options: dict
    ) -> Tensor:
        if self.objective == "multi_class" and goal is not None:
            return class_losses(logits, goal, weights=table, **options)
        weights = None
        if goal is None and pair_loss == "bradley_terry":
            logits = logits[..., 0] - logits[..., 1]
            goal = torch.ones_like(logits)
        elif goal is None:
            logits = logits.transpose(1, 2).flatten(1)  # (r, 2 B): chosen, then rejected
            half = logits.shape[1] // 2
            goal = torch.cat([torch.ones_like(logits[:, :half]), torch.zeros_like(logits[:, half:])], -1)
        elif self.objective == "binary":
            logits = logits[..., 0]
            if table is not None:
                weights = torch.where(goal > 0.5, table[:, 1:], table[:, :1])
        else:
            if table is not None:
                weights = table[:, None].expand_as(goal).flatten(1)
            logits, goal = logits.flatten(1), goal.flatten(1)
        return binary_losses(logits, goal, weights=weights, **options)

    def regularizers(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """(r,): each run's penalties on its parameters.

        Args:
            weights: (r, n_out, n_in) of each layer, the one that reads the state first.
            biases: (r, n_out) of each layer.
        """
        total = weights[0].new_zeros(self.n_runs)
        for method, legacy, index, factor in self.norms:
            layers = [weight.index_select(0, index) for weight in weights]
            if method == "l2" and legacy:
                layers += [bias.index_select(0, index) for bias in biases]
                values = [torch.linalg.vector_norm(layer.flatten(1), dim=-1) for layer in layers]
            elif method == "l2":
                values = [layer.flatten(1).square().sum(-1) for layer in layers]
            else:
                values = [top_singular_values(layer) for layer in layers]
                values = values if legacy else [value.square() / 2 for value in values]
            total = total.index_add(0, index, factor * torch.stack(values).sum(0))
        for (reduction, alignment), index, factor in self.penalties:
            reads = weights[0].index_select(0, index)
            for group in (group for group in self.unintended if group.alignment == alignment):
                rows = reads if group.rows is None else reads[:, group.rows]
                found = unintended_penalty(rows.flatten(0, 1), group.directions, group.offset, reduction)
                total = total.index_add(0, index, factor * found.view(rows.shape[:2]).sum(-1))
        return total

    def _index(self, places: list[int]) -> Tensor:
        return torch.tensor(places, device=self.like.device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return self.like.new_tensor(values)[:, None]

    def _pairs(self, rows: Sequence[Sequence[float]]) -> Tensor:
        return self.like.new_tensor(rows)


def _alphas(settings: HeadSettings, objective: str) -> tuple[float, float]:
    """Focal weights of y = 0 and of y = 1."""
    alpha = settings.focal_alpha
    if alpha is None and settings.legacy and objective == "pairwise":
        alpha = LEGACY_PAIR_ALPHA
    return (1.0, 1.0) if alpha is None else (1 - alpha, alpha)


def _class_weights(settings: HeadSettings, objective: str, n_outputs: int) -> tuple[float, ...] | None:
    """One weight a class or label, of `binary` two; None where all weigh the same. Pairs have no classes."""
    expected = {"binary": 2, "pairwise": 0}.get(objective, n_outputs)
    weights = settings.class_weights
    if weights is None and settings.legacy and objective == "multi_class" and n_outputs == len(LEGACY_CLASS_WEIGHTS):
        weights = LEGACY_CLASS_WEIGHTS
    if weights is not None and len(weights) != expected:
        raise ValueError(
            f"`class_weights` needs {expected} numbers for objective={objective!r}. "
            f"Received: class_weights={weights!r}."
        )
    return weights
