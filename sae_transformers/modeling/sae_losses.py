"""Losses of SAEs, one function per equation and a number for each token, and how a model adds them up."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_sparse_autoencoder import LossWeights, SparseAutoencoderConfig


def normalized_mse(target: Tensor, output: Tensor) -> Tensor:
    """`mean((output - target)^2) / mean(target^2)` over the width.

    Used by SCAR (https://huggingface.co/papers/2411.07122), SelfReg (https://huggingface.co/papers/2502.14133) and
    "Scaling and evaluating sparse autoencoders" (https://huggingface.co/papers/2406.04093). A target of zeros that is
    met counts 0.

    Args:
        target, output: (..., d).

    Returns:
        (...), 0 or more; 1 for an output of zeros.
    """
    smallest = max(torch.finfo(target.dtype).tiny, torch.finfo(torch.float32).tiny)
    return (output - target).square().mean(-1) / target.square().mean(-1).clamp(min=smallest)


def concept_losses(pre_acts: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of pre-activations as logits; 0, with no gradient, where a label is unknown.

    Args:
        pre_acts: (..., n_concepts).
        labels: (..., n_concepts), 0 to 1, or -100 (any negative number) for unknown.

    Returns:
        (..., n_concepts).
    """
    known = labels >= 0
    goal = torch.where(known, labels, 0.0).to(pre_acts)
    loss = F.binary_cross_entropy_with_logits(pre_acts, goal, reduction="none")
    return torch.where(known, loss, 0.0)


# -- which of them a model has ---------------------------------------------------------------------------------------

SAE_LOSSES = ("reconstruction", "sparsity", "conditioning")
HEAD_LOSSES = ("unintended", "unintended_state")


def check_applicable(weights: Any, computed: Collection[str], head: str, *, with_head: bool) -> None:
    """Raises a ValueError for a loss with a weight that a head does not compute: it would be left out of the sum.

    Args:
        weights: `LossWeights`, its dict, or None.
        computed: names of the terms of the head's class.
        head: name of that class.
        with_head: whether the model has a feature head.
    """
    given = asdict(weights) if isinstance(weights, LossWeights) else dict(weights or {})
    known = [name for name in computed if with_head or name not in HEAD_LOSSES]
    lost = [name for name in (*SAE_LOSSES, *HEAD_LOSSES) if given.get(name) and name not in known]
    if lost:
        hint = "a classifier with `feature_head=`" if lost[0] in HEAD_LOSSES else "SaeForCausalLM or a classifier"
        raise ValueError(
            f"`loss_weights` of {head} may have {', '.join(known) or 'none'}. Received: "
            f"{lost[0]}={given[lost[0]]!r}, which is a loss of {hint}."
        )


def check_trainable(model: Any, weights: LossWeights, terms: Mapping[str, Tensor]) -> None:
    """Raises a ValueError that says what would make a loss trainable in which no gradient arrived."""
    given = [name for name in SAE_LOSSES if getattr(weights, name)]
    if "conditioning" in given and "conditioning" not in terms:
        need = "Pass `concept_targets` with the batch: `conditioning` compares concept latents with them"
    elif given and not any(p.requires_grad for p in model.saes.parameters()):
        need = "The SAEs are frozen, which these losses would train: `model.saes.requires_grad_(True)`"
    else:
        need = (
            "Train the SAEs by a loss of theirs, such as loss_weights={'reconstruction': 1.0}; or the base, with "
            "weights_scope='full', which leaves it trainable and saves it, or by a LoRA (`peft.get_peft_model`)"
        )
    frozen = "frozen" if not any(p.requires_grad for p in model.lm.parameters()) else "trainable"
    raise ValueError(
        f"No parameter that can be trained is in this loss. {need}. To measure a loss only, use `model.eval()` or "
        f"`torch.no_grad()`. Received: loss_weights={asdict(weights)}, the base {frozen} "
        f"(weights_scope={model.config.weights_scope!r})."
    )


# -- of a model ------------------------------------------------------------------------------------------------------


def loss_names(weights: LossWeights, *, with_concepts: bool) -> tuple[str, ...]:
    """The terms that are computed: those with a weight."""
    names = ("reconstruction", "sparsity") + (("conditioning",) if with_concepts else ())
    return tuple(name for name in names if getattr(weights, name))


def split_labels(
    labels: Tensor, configs: Sequence[SparseAutoencoderConfig], batch_size: int, length: int
) -> dict[int, Tensor]:
    """`concept_targets` by SAE, (batch, length, n_concepts); labels per text hold for all its tokens."""
    counts = [len(config.concepts) for config in configs]
    if labels.ndim == 1:
        labels = labels[:, None]
    if labels.ndim == 2:
        labels = labels[:, None, :].expand(-1, length, -1)
    expected = (batch_size, length, sum(counts))
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"`concept_targets` must be (batch, {expected[2]}) per text or {expected} per token, one column for each "
            f"concept of each SAE in order. Received: shape {tuple(labels.shape)}."
        )
    return {n: part for n, part in enumerate(labels.split(counts, dim=-1)) if counts[n]}


def counted_tokens(source: Tensor, attention_mask: Any, labels: Tensor | None) -> Tensor:
    """(batch, seq) float: the tokens over which SAE losses are averaged."""
    if labels is not None:
        counted = torch.zeros(labels.shape, device=labels.device)
        counted[:, :-1] = (labels[:, 1:] != -100).float()
        return counted
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -source.shape[1] :].float()
    return torch.ones(source.shape[:2], device=source.device)


def mean_losses(
    names: Iterable[str], by_sae: Mapping[int, Mapping[str, Tensor]], weights: Tensor, count: Any = None
) -> dict[str, Tensor]:
    """Each loss term as the mean over counted tokens and over the SAEs that have it (those without concepts have no
    conditioning).

    Args:
        by_sae: terms of each SAE, (batch, seq).
        weights: (batch, seq), of `counted_tokens`.
        count: number of counted tokens in the whole accumulated batch, so that micro-batches add up to its mean.
    """
    total = weights.sum().clamp(min=1) if count is None else count
    terms = {}
    for name in names:
        per_sae = [terms_of_one[name] for terms_of_one in by_sae.values() if name in terms_of_one]
        if per_sae:
            terms[name] = sum((loss * weights.to(loss)).sum() for loss in per_sae) / (total * len(per_sae))
    return terms


def at_least_one(count: Any) -> Any:
    """A number of labels to divide by, of an int, a tensor or None: a batch may have none."""
    if count is None:
        return None
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def weighted_loss(weights: Mapping[str, float], lm_loss: Tensor | None, terms: Mapping[str, Tensor]) -> Tensor | None:
    """The sum of the base's loss and the SAEs' terms, (); None where there is none."""
    loss = None if lm_loss is None else (lm_loss if weights["lm"] == 1 else weights["lm"] * lm_loss)
    for name, value in terms.items():
        value = weights[name] * value
        loss = value if loss is None else loss + value.to(loss.device)
    return loss
