"""Gates at work: what they remember of a text, and where they are open in a pass.

Notation: C conditions, G different gates, B rows, T tokens of the pass, P columns before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .gate_plan import Columns, Entry, Factor, GatePlan, Node


class GateMemory:
    """What the gates of one `generate` remember: the value of each condition at every column so far, or as many as a
    cache of fixed size has.

    A pass that begins before columns that were there before (a rejected draft, a cropped cache) overwrites them.
    """

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}
        self._decided: Tensor | None = None  # (B, G + 1), once the prompt has decided all
        self._anything_open = True
        self._end = 0

    def before(self, condition: int, past: Any) -> Tensor | None:
        """(B, P) values, or None where none are known."""
        known = self.values.get(condition)
        return None if known is None or known.shape[1] < past else known[:, :past]

    def decide(self, opened: Tensor, end: int) -> None:
        """Take in what the prompt, of `end` columns, has decided: (B, G + 1) bool."""
        self._decided, self._anything_open, self._end = opened, bool(opened[:, 1:].any()), end

    def decided(self, past: Any) -> Tensor | None:
        """(B, G + 1) bool where the prompt has decided all and lies before a pass; else None."""
        return self._decided if self._decided is not None and self._is_behind(past) else None

    def all_shut(self, past: Any) -> bool:
        """Whether no gate is open in a pass, and none will be."""
        return not self._anything_open and self._is_behind(past)

    def _is_behind(self, past: Any) -> bool:
        # A compiled pass cannot look at the number, and comes after the prompt that has decided.
        return torch.compiler.is_compiling() or bool(past >= self._end)

    def reorder(self, rows: Tensor) -> None:
        """Rows go on from other rows: beams."""
        self.values = {name: known.index_select(0, rows.to(known.device)) for name, known in self.values.items()}
        if self._decided is not None:
            self._decided = self._decided.index_select(0, rows.to(self._decided.device))


class GateRun:
    """The gates in one pass.

    Args:
        plan: the gates.
        rows: (B, 3) int64: row of the steering's tables, first real column, end of the prompt.
        past: P, columns before the pass.
        memory: of the `generate` that the pass is of; None outside of one.
        tokens: (B, T) ids of the pass, where edits name some.
        room: columns of a cache of fixed size; None of one that grows.
    """

    def __init__(
        self,
        plan: GatePlan,
        rows: Tensor,
        past: Any,
        memory: GateMemory | None,
        tokens: Tensor | None = None,
        room: int | None = None,
    ) -> None:
        self.plan, self.rows, self.memory, self.tokens, self.room = plan, rows, memory, tokens, room
        self.past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in that very tensor
        self.values: dict[int, Tensor] = {}
        self.maxima: dict[int, Tensor] = {}
        self._found: dict[int, Tensor] = {}

    def read_at(self, number: int) -> Sequence[Columns]:
        """What SAE `number` has to give in this pass."""
        return () if self.decided is not None else self.plan.columns.get(number, ())

    @property
    def decided(self) -> Tensor | None:
        """(B, G + 1) bool where the prompt has decided; None where it has not, or does not."""
        return None if self.memory is None else self.memory.decided(self.past)

    def read(self, condition: int, values: Tensor, maximum: Tensor | None) -> None:
        """Take in a condition's values at the tokens of the pass, (B, T), and its latent's typical maximum, ()."""
        self.values[condition] = values.detach()
        if maximum is not None:
            self.maxima[condition] = maximum.detach()

    def open(self, like: Tensor, needed: Sequence[int]) -> Tensor:
        """(B, T, G + 1) bool, the first of them always open; only those of the numbers `needed` mean anything. Where
        there are strengths their factors, and 1 and 0 of gates, in the dtype of `like` (B, T, d_in).

        Raises:
            RuntimeError: one of these reads an SAE that has not run yet.
        """
        if self.decided is not None:
            return self.decided.unsqueeze(1).expand(-1, like.shape[1], -1)
        gates = {number: self._entry(self.plan.entries[number - 1], like) for number in needed}
        some = next(iter(gates.values()))
        shut = torch.zeros_like(some)
        others = (gates.get(n + 1, shut) for n in range(len(self.plan.entries)))
        return torch.stack([torch.ones_like(some), *others], -1)

    def _entry(self, entry: Entry, like: Tensor) -> Tensor:
        """(B, T), bool where the plan has no strengths."""
        opened = None if entry.gate is None else self._node(entry.gate)
        if entry.excluded and self.tokens is not None:
            tokens = self.tokens.to(like.device)
            others = ~torch.isin(tokens, torch.tensor(entry.excluded, device=like.device))
            opened = others if opened is None else opened & others
        if not self.plan.factors and opened is not None:
            return opened
        factor = like.new_ones(like.shape[:2])
        for place, number in enumerate(entry.factors):
            share = self._share(self.plan.factors[number], like)
            factor = factor * share if place else share
        return factor if opened is None else torch.where(opened, factor, 0.0)

    def _share(self, factor: Factor, like: Tensor) -> Tensor:
        """A strength's factors at the tokens of the pass, (B, T), see `Strength`."""
        one, found = factor.strength, like.new_ones(like.shape[:2])
        if factor.condition is not None and one.high is not None:
            values = self._now(factor.condition)
            if one.unit == "max":
                values = values / self.maxima[factor.condition]
            inside = ((values - one.low) / (one.high - one.low)).clamp(0.0, 1.0)
            found = (one.least + (one.most - one.least) * inside).to(like)
        if one.first is None and one.decay is None:
            return found
        columns = self.past + torch.arange(like.shape[1], device=like.device)
        written = (columns - (self.rows[:, 2:3].to(like.device) - 1)).clamp(min=0)  # (B, T), g
        if one.first is not None:
            found = torch.where(written < one.first, found, 0.0)
        if one.decay is not None and one.over is not None:
            part = written.to(like.dtype) / one.over
            found = found * ((1 - part).clamp(min=0) if one.decay == "linear" else torch.exp2(-part))
        return found

    def remember(self) -> None:
        """After a pass over the last of the prompt: what it has decided, where it decides all. A compiled pass cannot
        look."""
        if torch.compiler.is_compiling():
            return
        if self.memory is None or not self.plan.prompt_decides or self.decided is not None:
            return
        end = int(self.rows[:, 2].max())
        if len(self.values) < len(self.plan.conditions):
            return
        if end <= int(self.past) + next(iter(self.values.values())).shape[1]:
            last = [self._node(entry.gate)[:, -1] for entry in self.plan.entries if entry.gate is not None]
            self.memory.decide(torch.stack([torch.ones_like(last[0]), *last], -1), end)

    def _node(self, node: Node) -> Tensor:
        if node.condition is None:
            parts = torch.stack([self._node(part) for part in node.parts])
            found = parts.all(0) if node.every else parts.any(0)
        else:
            if node.condition not in self._found:
                self._found[node.condition] = self._condition(node.condition)
            found = self._found[node.condition]
        return ~found if node.negate else found

    def _now(self, number: int) -> Tensor:
        """What a condition reads at the tokens of the pass, (B, T)."""
        condition = self.plan.conditions[number]
        if number not in self.values:
            raise RuntimeError(
                f"A gate reads SAE {condition.sae}, which had not run when an edit asked for it. Expected an SAE that "
                f"runs before the edit. Received: {condition!r}."
            )
        return self.values[number]

    def _condition(self, number: int) -> Tensor:
        condition, now = self.plan.conditions[number], self._now(number)
        if not condition.remembers:
            found = now > condition.above
            if condition.skip_first:
                columns = self.past + torch.arange(now.shape[1], device=now.device)
                found = found & (columns >= self.rows[:, 1:2].to(now.device) + condition.skip_first)
            return found
        whole = self._whole(number, now)
        here = torch.arange(now.shape[1], device=now.device) + (
            0 if whole is now else self.past
        )  # T columns of `whole`
        columns = torch.arange(whole.shape[1], device=whole.device)
        rows = self.rows.to(whole.device)
        first, end = rows[:, 1:2], rows[:, 2:3]
        read = columns >= first + condition.skip_first
        if condition.until is not None:
            opens, closes = read & (whole > condition.above), ~read | (whole <= condition.until)
            latest = [torch.where(event, columns + 1, 0).cummax(-1).values for event in (opens, closes)]
            return (latest[0] > latest[1])[:, here]
        if condition.over == "so_far":
            decided = counted = read
        else:
            decided = columns >= end - 1
            counted = read & (columns < end if condition.over == "prompt" else columns == end - 1)
        pooled = pooled_so_far(whole, counted, condition.pool if condition.over != "last" else "max")
        return (decided & (pooled > condition.above))[:, here]

    def _whole(self, number: int, now: Tensor) -> Tensor:
        """(B, P + T) values of a condition, those of this pass the last. With a cache of fixed size (B, room): what is
        behind them does not matter, as nothing looks ahead.

        Raises:
            ValueError: the tokens before were not seen.
        """
        memory = self.memory
        if memory is not None and self.room is not None:
            if number not in memory.values:
                self._check_begins(number)
                memory.values[number] = now.new_zeros(now.shape[0], self.room)
            columns = torch.arange(now.shape[1], device=now.device) + self.past
            return memory.values[number].index_copy_(1, columns, now)  # in place: a compiled pass keeps its tensors
        before = None if memory is None or self._past_is_hidden else memory.before(number, self.past)
        if before is None:
            self._check_begins(number)
        whole = now if before is None else torch.cat([before.to(now.device), now], 1)
        if memory is not None:
            memory.values[number] = whole
        return whole

    @property
    def _past_is_hidden(self) -> bool:
        return isinstance(self.past, Tensor) and torch.compiler.is_compiling()

    def _check_begins(self, number: int) -> None:
        """Raises ValueError where tokens come before those of the pass, or a compiled pass cannot tell."""
        hidden = self._past_is_hidden
        if hidden or self.past:
            raise ValueError(
                f"A gate over more than the token at hand has to have seen the tokens before. Expected a call of "
                f"`generate`, whose pass over the prompt is not compiled, or the whole text in one pass. Received: a "
                f"pass over {'those of a cache' if hidden else f'{self.past} cached tokens'}, "
                f"{self.plan.conditions[number]!r}."
            )


def pooled_so_far(values: Tensor, counted: Tensor, pool: str) -> Tensor:
    """At each column the `max` or `mean` of values (B, T) over the counted ones, (B, T) bool, up to it: (B, T), minus
    infinity where there are none."""
    if pool == "max":
        return values.masked_fill(~counted, -torch.inf).cummax(-1).values
    counts = counted.cumsum(-1)
    means = values.masked_fill(~counted, 0.0).cumsum(-1) / counts.clamp(min=1)
    return means.masked_fill(counts == 0, -torch.inf)
