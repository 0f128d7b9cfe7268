"""Whose tokens a pass of the engine holds, and what its SAEs do with them. Nothing here knows vLLM.

An engine lays the tokens of all scheduled requests one after the other: chunks of prompts, and one token of each
answer. `begin` is told who they are and puts their steerings into as few plans as can hold them; `apply` runs a plan
on the tokens that it concerns, and on no others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..modeling import Steering
from ..modeling.sae_bank import SaeBank
from ..modeling.steering_plan import SteeringPlan
from .asked import Asked, digest

PLANS_KEPT = 64
# Numbers in one table of a plan: rows times edits. More steerings are spread over several plans.
MAX_TABLE = 2**22
READINGS_KEPT = 4096  # of requests that may have ended without anyone fetching


class Part(NamedTuple):
    """The tokens of one request in a pass.

    asked: what it asks. prompt_length: tokens of its prompt. computed: its tokens in the cache before the pass.
    scheduled: its tokens in the pass.
    """

    asked: Asked
    prompt_length: int
    computed: int
    scheduled: int


class Group(NamedTuple):
    """Tokens that share a plan.

    plan: for all of them. tokens: (n,) int64, their places in the pass, in order. rows: (n,) int64, their rows of the
    plan, None where it has one.
    """

    plan: SteeringPlan
    tokens: Tensor
    rows: Tensor | None


class Span(NamedTuple):
    """Steered tokens [start, stop) of a pass."""

    steering: Steering
    start: int
    stop: int


class Read(NamedTuple):
    """Tokens [start, stop) of a pass whose values are kept. position: of the first one in its text."""

    asked: Asked
    position: int
    start: int
    stop: int


class Steps:
    """The passes of one model with SAEs.

    Args:
        saes: the model's SAEs; their configs say what steering may name.
    """

    def __init__(self, saes: SaeBank) -> None:
        self.saes = saes
        self.groups: list[Group] = []
        self.reads: list[Read] = []
        self._plans: OrderedDict[Hashable, SteeringPlan] = OrderedDict()
        self._found: OrderedDict[str, dict[int, Tensor]] = OrderedDict()

    # -- a pass ------------------------------------------------------------------------------------------------------

    def begin(self, parts: Iterable[Part]) -> None:
        """Take in the requests of a pass, in the order of their tokens."""
        spans: dict[Hashable, list[Span]] = {}
        present: dict[Hashable, dict[Steering, None]] = {}
        self.groups, self.reads, offset = [], [], 0
        for asked, prompt_length, computed, scheduled in parts:
            if asked.reading is not None and computed < prompt_length:
                stop = min(scheduled, prompt_length - computed)
                self.reads.append(Read(asked, computed, offset, offset + stop))
            if asked.steering:
                kind = _kind(asked.steering)
                present.setdefault(kind, {})[asked.steering] = None
                for first, last in asked.steering.ranges(prompt_length):
                    start, stop = max(first - computed, 0), min(last - computed, scheduled)
                    if start < stop:
                        spans.setdefault(kind, []).append(Span(asked.steering, offset + start, offset + stop))
            offset += scheduled
        for kind, steered in spans.items():
            self.groups.extend(self._groups(list(present[kind]), steered))

    def end(self) -> None:
        """Nobody's tokens are steered any more: passes may follow that warm up or capture graphs."""
        self.groups, self.reads = [], []

    def _groups(self, steerings: Sequence[Steering], spans: Sequence[Span]) -> Iterable[Group]:
        """Plans hold the steerings of all requests at hand, in an order of their own, so that a plan is compiled when
        one joins or leaves and not at every pass."""
        for together in _batches(sorted(steerings, key=lambda steering: (digest(steering), hash(steering)))):
            plan = self._plan(tuple(together))
            row_of = {steering: row for row, steering in enumerate(together)}
            own = [span for span in spans if span.steering in row_of]
            if not own:
                continue
            tokens = np.concatenate([np.arange(span.start, span.stop) for span in own])
            rows = np.repeat([row_of[span.steering] for span in own], [span.stop - span.start for span in own])
            device = self.saes[0].device
            yield Group(
                plan,
                torch.from_numpy(tokens).to(device),
                None if plan.count == 1 else torch.from_numpy(rows).to(device),
            )

    def _plan(self, steerings: tuple[Steering, ...]) -> SteeringPlan:
        plan = self._plans.get(steerings)
        if plan is None:
            likes = [torch.empty(0, dtype=sae.dtype, device=sae.device) for sae in self.saes]
            plan = self._plans[steerings] = SteeringPlan(steerings, [sae.config for sae in self.saes], likes)
            while len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(steerings)
        return plan

    # -- an SAE in it ------------------------------------------------------------------------------------------------

    def works_at(self, number: int) -> bool:
        """Whether SAE `number` has anything to do in the pass."""
        return any(number in group.plan.saes for group in self.groups) or self.reads_at(number)

    def reads_at(self, number: int) -> bool:
        """Whether values of SAE `number` are kept in the pass."""
        return any(read.asked.reading.sae == number for read in self.reads if read.asked.reading)

    def apply(self, number: int, hidden: Tensor, target: Tensor | None = None) -> Tensor:
        """The tokens of the pass after SAE `number`.

        Args:
            hidden: (T, d_in), what it reads; T may be more than the tokens of the requests (padding of graphs).
            target: (T, d_out), what it changes; `hidden` by default.

        Returns:
            (T, d_out); `target` itself where nothing changes.
        """
        target = hidden if target is None else target
        self._read(number, hidden)
        sae = self.saes[number]
        for plan, tokens, rows in self.groups:
            own = plan.saes.get(number)
            if own is None:
                continue
            if len(tokens) == len(target):
                target = sae.steer_tokens(hidden, own, rows, target=target)
            else:
                edited = sae.steer_tokens(hidden[tokens], own, rows, target=target[tokens])
                target = target.index_copy(0, tokens, edited)
        return target

    def _read(self, number: int, hidden: Tensor) -> None:
        sae = self.saes[number]
        for asked, position, start, stop in self.reads:
            reading = asked.reading
            if reading is None or reading.sae != number:
                continue
            feature = torch.tensor([reading.feature], device=hidden.device)
            read = sae.encode_pre_acts if reading.pre_activations else sae.encode_selected
            values = read(hidden[start:stop], feature)[:, 0].float().cpu()
            self._found.setdefault(reading.key, {})[position] = values  # a preempted prompt is read again
            while len(self._found) > READINGS_KEPT:
                self._found.popitem(last=False)

    def collected(self, key: str) -> list[float] | None:
        """The values that a reading found, one for each token of its prompt, once; None where there are none."""
        parts = self._found.pop(key, None)
        if parts is None:
            return None
        values: list[float] = []
        for position, part in sorted(parts.items()):
            values[position:] = part.tolist()
        return values


def _kind(steering: Steering) -> Hashable:
    """Steerings of one kind can share a plan."""
    reweighted = sorted((edit.sae, edit.mode, edit.legacy) for edit in steering.reweightings)
    return steering.balance, tuple(reweighted)


def _batches(steerings: Sequence[Steering]) -> Iterable[list[Steering]]:
    """As many together as a plan's tables may hold."""
    together: list[Steering] = []
    edits = 0
    for steering in steerings:
        size = len(steering.edits)
        if together and (len(together) + 1) * (edits + size) > MAX_TABLE:
            yield together
            together, edits = [], 0
        together.append(steering)
        edits += size
    if together:
        yield together
