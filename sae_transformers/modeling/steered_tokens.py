"""Which tokens of a forward pass are steered, in a call by itself and within a `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base_arguments import cached_tokens, room_of
from .call_options import SaeCallOptions, source_of
from .gate_run import GateMemory, GateRun
from .steering_plan import BoundSteering, SteeringPlan


class SteeredTokens(NamedTuple):
    """The steering of one pass: its plan or None, (batch,) rows of its tables or None for one row, (batch, seq) bool
    or None for all tokens, and the gates that it depends on."""

    plan: SteeringPlan | None = None
    rows: Tensor | None = None
    mask: Tensor | None = None
    gates: GateRun | None = None


def steered_tokens(
    steering: SteeringPlan | BoundSteering | None,
    options: SaeCallOptions,
    inputs: Mapping[str, Any],
    cache: str,
    generation: GenerationState | None,
) -> SteeredTokens:
    """Where `steering` falls in a pass.

    Args:
        cache: name of the base's cache.
        generation: of the `generate` that this thread is in.
    """
    if steering is None:
        return SteeredTokens()
    bound, plan = (steering, steering.plan) if steering.is_bound is True else (None, steering)
    rows, source = options.steering_rows, source_of(inputs)
    past = _past_of(inputs, source, cache) if options.steering_past is None else options.steering_past
    if bound is not None and rows is not None and isinstance(past, int) and bound.is_over(past):
        return SteeredTokens()
    if bound is not None and rows is None and generation is not None and generation.masked:
        return SteeredTokens()
    memory = None if bound is None else bound.memory
    if bound is not None and generation is not None and rows is None:  # guidance: a text of its own
        memory = generation.unconditional_memory
    if memory is not None and plan.fully_gated and past is not None and memory.all_shut(past):
        return SteeredTokens()
    placed = plan.count > 1 or plan.intervals is not None or options.steering_mask is not None
    if not placed and plan.gates is None:  # every token of every row alike, but for some by their ids
        return SteeredTokens(plan, mask=_not_excluded(plan, inputs, None))
    if past is None:
        raise ValueError(
            "Steering at positions needs to know how many tokens the cache holds, and this base's recurrent state "
            "does not say. Expected an `attention_mask` over all tokens, earlier ones included. Received: none."
        )
    prompt_length = None
    if rows is None:
        own = generation if bound is not None else None  # the unconditional branch of guidance
        table, prompt_length = (None, None) if own is None else own.of_unconditional(source)
        rows = steering_rows_for(
            source, inputs.get("attention_mask"), past, prompt_length, rows=table, count=plan.count
        )
    if plan.gates is not None and plan.gates.is_scheduled and options.steering_rows is None and prompt_length is None:
        _check_is_prompt(past)
    mask = _not_excluded(plan, inputs, rows)
    if plan.intervals is not None or options.steering_mask is not None:
        columns = past + torch.arange(source.shape[1], device=source.device)
        mask = _both(mask, plan.position_mask(columns, rows))
        if options.steering_mask is not None:
            mask = _both(mask, _mask_at(options.steering_mask.to(source.device), columns))
    gates = None
    if plan.gates is not None:
        tokens = _ids_of(inputs) if plan.gates.names_tokens else None
        room = room_of(inputs.get(cache)) if plan.gates.remembers else None
        gates = GateRun(plan.gates, rows, past, memory, tokens, room)
    return SteeredTokens(plan, rows[:, 0] if plan.count > 1 else None, mask, gates)


def _check_is_prompt(past: Any) -> None:
    if (isinstance(past, Tensor) and torch.compiler.is_compiling()) or past:
        raise ValueError(
            f"A strength over generated tokens has to know where the prompt ended. Expected a call of `generate`, or "
            f"the whole text in one pass. Received: a pass over {past} cached tokens."
        )


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _not_excluded(plan: SteeringPlan, inputs: Mapping[str, Any], rows: Tensor | None) -> Tensor | None:
    """(batch, seq) bool of tokens that may be steered by what they are; None for all."""
    if plan.excluded is None:
        return None
    tokens = _ids_of(inputs)
    table = torch.zeros_like(tokens[:, 0]) if rows is None or plan.count == 1 else rows[:, 0]
    return ~plan.excluded.among(tokens, table)


def _ids_of(inputs: Mapping[str, Any]) -> Tensor:
    """(batch, seq) ids of the tokens at hand."""
    tokens = inputs.get("input_ids")
    if tokens is None:
        raise ValueError(
            "Steering with `exclude_tokens` goes by token ids. Expected `input_ids`. Received: `inputs_embeds`, which "
            "do not say what the tokens are; a `steering_mask` does for them."
        )
    return tokens


def _past_of(inputs: Mapping[str, Any], source: Tensor, cache: str) -> Any:
    """How many tokens came before those of `source`: an int, or a tensor ()."""
    given = [inputs[name] for name in (cache, "state", "mems") if name in inputs]
    past = cached_tokens(given[0] if given else None)
    mask = inputs.get("attention_mask")
    if past is None and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= source.shape[1]:
        past = mask.shape[1] - source.shape[1]
    return past


def steering_rows_for(
    source: Tensor,
    attention_mask: Any,
    past: Any,
    prompt_length: int | None,
    rows: Tensor | None = None,
    count: int = 1,
) -> Tensor:
    """(batch, 3) int64: row of the steering's tables, first real column, end of the prompt.

    Without a prompt length the tokens at hand are the prompt if nothing came before them, and generated if something
    did.

    Args:
        source: input ids (batch, seq) or embeddings (batch, seq, d).
        attention_mask: (batch, past + seq), or anything else, which is then not looked at.
        past: number of cached columns.
        rows: (batch,), row of the tables; one for each batch row by default.
        count: number of rows in the tables.
    """
    batch, length = source.shape[:2]
    if rows is None:
        if count > 1 and count != batch:
            raise ValueError(f"One steering for each row is needed: {batch} rows. Received: {count} steerings.")
        rows = (
            torch.arange(batch, device=source.device)
            if count > 1
            else torch.zeros_like(source[:, 0], dtype=torch.long)
        )
        rows = rows.reshape(batch, -1)[:, 0]
    first = torch.zeros_like(rows)
    end = torch.full_like(rows, prompt_length) if prompt_length is not None else first + past
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        mask = attention_mask.to(source.device).long()
        first = mask.argmax(-1)
        if prompt_length is None and isinstance(past, int) and past == 0:
            end = mask.shape[1] - mask.flip(-1).argmax(-1)
    elif prompt_length is None and isinstance(past, int) and past == 0:
        end = torch.full_like(rows, length)
    return torch.stack([rows.to(source.device), first, end], dim=-1)


def _mask_at(mask: Tensor, columns: Tensor) -> Tensor:
    """(batch, seq) bool of a (batch, length) mask at absolute columns; False beyond its length."""
    inside = columns < mask.shape[1]
    return mask.bool()[:, columns.clamp(max=mask.shape[1] - 1)] & inside


class GenerationState:
    """The steering of one `generate`, from the call to its forward passes.

    Passes of the unconditional branch of classifier-free guidance do not carry it and find it here; that branch has a
    prompt of its own, whose length its first pass shows.
    """

    def __init__(self, plan: Any, mask: Tensor | None = None, given_length: int = 0) -> None:
        """
        Args:
            plan: of `prepare_steering`, or None.
            mask: `steering_mask`, (batch, prompt length) bool.
            given_length: columns of the attention mask that the caller gave, which may reach over a cache.
        """
        self.plan = plan
        self.mask = mask
        self.given_length = given_length
        self.bound: BoundSteering | None = None
        self.rows: Tensor | None = None
        self.own_prompt_length: int | None = None
        self.memory = GateMemory()
        self.unconditional_memory = GateMemory()
        self._ids_at_start = 0

    @property
    def masked(self) -> bool:
        return self.mask is not None  # names tokens of the prompt, so none of the unconditional branch's prompt

    def of_unconditional(self, source: Tensor) -> tuple[Tensor | None, int]:
        """For a pass of the unconditional branch: (batch,) rows of the tables, and the length of its prompt."""
        if self.own_prompt_length is None:
            self.own_prompt_length = source.shape[1]
        table = None
        if self.rows is not None:
            table = self.rows[:, 0]
            table = table.repeat_interleave(source.shape[0] // table.shape[0])
        return table, self.own_prompt_length

    def place(self, input_ids: Any, model_kwargs: dict[str, Any]) -> None:
        """Bind the steering to the prompt that the base has settled on: its length, and each row's first real
        token."""
        if self.plan is None:
            return
        source = model_kwargs.get("inputs_embeds")
        if source is None or (input_ids is not None and input_ids.shape[1]):
            source = input_ids
        attention = model_kwargs.get("attention_mask")
        length = max(source.shape[1], self.given_length)
        if isinstance(attention, Tensor) and attention.ndim == 2:
            length = max(length, attention.shape[1])
        self.bound = BoundSteering(self.plan, length, self.memory)
        self.rows = steering_rows_for(source, attention, 0, length, count=self.plan.count)
        self._ids_at_start = 0 if input_ids is None else input_ids.shape[1]
        model_kwargs.update(steering=self.bound, steering_rows=self.rows)
        if self.mask is not None:
            model_kwargs["steering_mask"] = self.mask

    def seen_before(self, input_ids: Tensor, prepared: dict[str, Any], cache: str) -> int | None:
        """How many columns came before those of a pass, where the cache cannot tell; None where it can."""
        if self.bound is None or cached_tokens(prepared.get(cache)) is not None and "state" not in prepared:
            return None
        step = prepared.get("input_ids")
        step = prepared["inputs_embeds"] if step is None else step
        return self.bound.prompt_length + input_ids.shape[1] - self._ids_at_start - step.shape[1]
