"""Which tokens penalties on features count, and whether a step can lower them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base_arguments import positions_of
from .feature_penalty import BoundPenalty


def penalised_tokens(
    bound: BoundPenalty, length: int, inputs: Mapping[str, Any], labels: Tensor | None, mask: Tensor | None
) -> Tensor:
    """(batch, seq) float, 1 where a token counts.

    Args:
        length: of the tokens at hand.
        inputs: of the base: `attention_mask` and `position_ids` tell texts from padding and from each other.
        labels: (batch, seq), of a language model.
        mask: (batch, seq), `penalty_mask`.
    """
    penalty, source = bound.penalty, inputs.get("input_ids")
    source = inputs["inputs_embeds"] if source is None else source
    counted = torch.ones(source.shape[:2], device=source.device)
    if penalty.over == "answer" and labels is not None:
        counted = torch.zeros_like(counted)
        counted[:, :-1] = (labels[:, 1:] != -100).to(counted)
    if penalty.over == "mask" and mask is not None:
        counted = mask.to(counted)
    return real_tokens(counted, length, inputs, penalty.skip_first)


def real_tokens(counted: Tensor, length: int, inputs: Mapping[str, Any], skip_first: int) -> Tensor:
    """`counted` (batch, seq), 0 at padding and at the first tokens of each text.

    Args:
        length, inputs: as of `penalised_tokens`.
    """
    attended, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    attended = attended if isinstance(attended, Tensor) and attended.ndim == 2 else None
    if attended is not None:
        counted = counted * attended[:, -length:].to(counted)
    if not skip_first:
        return counted
    if isinstance(positions, Tensor) and positions.ndim == 2:  # packed texts begin at 0 again
        place = positions[:, -length:].to(counted.device)
    elif attended is not None:
        place = positions_of(attended)[:, -length:].to(counted.device)
    else:
        place = torch.arange(length, device=counted.device).expand(len(counted), -1)
    return counted * (place >= skip_first)


def check_penalty_inputs(
    penalties: Sequence[BoundPenalty], labels: Tensor | None, mask: Any, shape: tuple[int, int]
) -> None:
    """Raises a ValueError for tokens that a penalty speaks of and the batch does not tell.

    Args:
        labels: of a language model, (batch, seq); None where there are none.
        mask: `penalty_mask`.
        shape: (batch, seq).
    """
    for one in penalties:
        if one.penalty.over == "answer" and labels is None:
            raise ValueError(
                f"A penalty with over='answer' counts the tokens that predict a label. Pass `labels` (batch, seq), or "
                f"make it FeaturePenalty(..., over='all'). Received: no labels of tokens, for {one.name}."
            )
        if one.penalty.over == "mask" and mask is None:
            raise ValueError(
                f"A penalty with over='mask' counts the tokens that are 1 in `penalty_mask` (batch, seq), a column of "
                f"the data beside `labels`. Received: no penalty_mask, for {one.name}."
            )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(shape):
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"`penalty_mask` must be a tensor {tuple(shape)}, as the batch. Received: {given}.")


def check_learnable(name: str, cost: Tensor, *, known: bool) -> None:
    """Raises a ValueError where nothing that is trained comes before the SAE of a penalty: its term would be a number
    in the log that no step can lower.

    Args:
        name: of the penalty. cost: its cost at each token.
        known: whether a parameter was found behind it before.
    """
    if cost.requires_grad and (known or _reaches_parameter(cost)):
        return
    raise ValueError(
        f"Nothing that is trained comes before the SAE of this penalty, so no step can lower it. Train the base "
        f"there: by a LoRA (`peft.get_peft_model`) on modules at or before the SAE's layer, or with "
        f"weights_scope='full'. To measure it only, use weight=0, `model.eval()` or `torch.no_grad()`. "
        f"Received: {name} without a gradient."
    )


def _reaches_parameter(cost: Tensor) -> bool:
    """Whether a parameter is among what a tensor was computed from: with gradient checkpointing PEFT lets the embedded
    tokens require a gradient, which is nobody's."""
    waiting, seen = [cost.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
