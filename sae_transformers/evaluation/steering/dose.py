"""How far a steering moves the hidden states that it changes: the length of the change over that of the state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.batches import length_batches, right_padded
from ..generation.continuations import steerings_told
from ..journal import Journal, result_of


class Dose(NamedTuple):
    """Of n texts, (n,) float64 each.

    lengths: sum of |change| / |state| over the tokens, and SAEs, where something changed. changed: how many these are.
    tokens: of the text.
    """

    lengths: Tensor
    changed: Tensor
    tokens: Tensor


@torch.no_grad()
def measure_dose(
    model: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    steering: Any,
    *,
    tokens_at_once: int = 512,
    journal: Journal | None = None,
) -> Dose:
    """Read the texts as `generate` reads and writes them under a steering, and watch what changes.

    Args:
        model: a `SaeForCausalLM`.
        prompts, continuations: n rows of token ids, one or more each.
        steering: one for all rows.
        tokens_at_once: of a forward pass, padding counted; a longer row is a pass of its own.
        journal: has the passes that were done, and gets the others.
    """
    plan = model.prepare_steering(steering)
    rows = [[*before, *after] for before, after in zip(prompts, continuations, strict=True)]
    lengths, changed = torch.zeros(2, len(rows), dtype=torch.float64)
    for members in length_batches([len(row) for row in rows], tokens_at_once):
        some, ends = [rows[i] for i in members], [len(prompts[i]) for i in members]
        found = result_of(
            journal,
            lambda some=some, ends=ends: {"dose": some, "prompts": ends, **steerings_told([steering])},
            lambda some=some, ends=ends: _dosed(model, plan, some, ends),
        )
        lengths[members], changed[members] = torch.tensor(found, dtype=torch.float64)
    return Dose(lengths, changed, torch.tensor([len(row) for row in rows], dtype=torch.float64))


def _dosed(model: Any, plan: Any, rows: Sequence[Sequence[int]], ends: Sequence[int]) -> list[list[float]]:
    """`lengths` and `changed` of some rows, whose prompts end at `ends`."""
    ids, mask = right_padded(rows, model.device)
    where = torch.tensor([[0, 0, end] for end in ends], device=model.device)
    real = torch.stack(_ratios(model, plan, ids, mask, where)).where(mask.bool(), 0.0).double().cpu()
    return [real.sum((0, 2)).tolist(), (real > 0).double().sum((0, 2)).tolist()]


def _ratios(model: Any, plan: Any, ids: Tensor, mask: Tensor, ends: Tensor) -> list[Tensor]:
    """|change| / |state| (batch, width) at each SAE that is steered."""
    seen: list[Tensor] = []

    def watch(sae: Any, args: tuple, options: dict, result: Any) -> None:
        if not hasattr(result, "applied"):  # another task of the SAE
            return
        hidden, request, _, target = args
        state = hidden if target is None else target
        change = request.edit(state, result) - state
        seen.append(change.float().norm(dim=-1) / state.float().norm(dim=-1).clamp(min=1e-12))

    with ExitStack() as hooks:
        for number in plan.saes:
            hooks.enter_context(model.saes[number].register_forward_hook(watch, with_kwargs=True))
        model(
            input_ids=ids, attention_mask=mask, use_cache=False, steering=plan, steering_rows=ends,
            stop_at_last_sae=True,
        )  # fmt: skip
    return seen
