"""Gates at work: which conditions a steering has, what they remember of a text, and where they are open in a pass.

Notation: C conditions, G different gates, B rows, T tokens of the pass, P columns before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configuration_sparse_autoencoder import SITES, SparseAutoencoderConfig
from .gates import Gate
from .strength import Strength

# Sites of a block in the order in which they run.
ORDER = ("resid_pre", "attn_heads", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post")


class Condition(NamedTuple):
    """A comparison of one latent: `Gate`'s fields, the latent by its index."""

    sae: int
    feature: int
    above: float
    until: float | None
    over: str
    pool: str
    pre_activations: bool

    @property
    def remembers(self) -> bool:
        """Whether it depends on other tokens than the one at hand."""
        return self.over != "token" or self.until is not None


class Node(NamedTuple):
    """A gate as a tree. condition: number of the condition; None where it combines `parts`, all or some of them."""

    condition: int | None
    parts: tuple[Node, ...]
    every: bool
    negate: bool


class Factor(NamedTuple):
    """A `Strength`, its detector by the number of the condition that reads it."""

    condition: int | None
    strength: Strength


class Entry(NamedTuple):
    """What an edit depends on: a gate, the numbers of factors that are multiplied, tokens that it leaves alone."""

    gate: Node | None
    factors: tuple[int, ...]
    excluded: tuple[int, ...]


class Columns(NamedTuple):
    """What the conditions on one SAE read. conditions: (c,) their numbers. features: (c,) int64, their latents."""

    conditions: tuple[int, ...]
    features: Tensor
    pre_activations: bool


class GatePlan:
    """The gates of a batch's steering.

    entries: what edits depend on, each once; number 0 stands for none, so `entries[i]` has number i + 1.
    conditions: the different conditions that gates are made of, and what strengths read.
    factors: the different strengths.
    columns: SAE number -> what is read of it, once `place` has put it on the SAEs' devices.
    """

    def __init__(self, configs: Sequence[SparseAutoencoderConfig]) -> None:
        self.configs = configs
        self.entries: list[Entry] = []
        self.factors: list[Factor] = []
        self.conditions: list[Condition] = []
        self.columns: dict[int, list[Columns]] = {}

    def number(
        self, gate: Gate | None, edited: int, strengths: Sequence[Strength] = (), excluded: tuple[int, ...] = ()
    ) -> int:
        """The number of what an edit of SAE `edited` depends on.

        Raises:
            ValueError: a condition on what the model does not have, or on what runs after the edit.
        """
        if gate is None and not strengths and not excluded:
            return 0
        node = None if gate is None else self._node(gate, edited)
        entry = Entry(node, tuple(self._factor(strength, edited) for strength in strengths), excluded)
        if entry not in self.entries:
            self.entries.append(entry)
        return self.entries.index(entry) + 1

    def _factor(self, strength: Strength, edited: int) -> int:
        condition = None
        if strength.feature is not None:
            reading = Gate(strength.feature, strength.sae, pre_activations=strength.pre_activations)
            condition = self._node(reading, edited).condition
        factor = Factor(condition, strength)
        if factor not in self.factors:
            self.factors.append(factor)
        return self.factors.index(factor)

    def _node(self, gate: Gate, edited: int) -> Node:
        if gate.feature is None:
            parts = tuple(self._node(one, edited) for one in (gate.every or gate.some))
            return Node(None, parts, bool(gate.every), gate.negate)
        if gate.sae >= len(self.configs):
            raise ValueError(
                f"The model has {len(self.configs)} SAE(s), numbered from 0. Received: a gate on sae={gate.sae!r}."
            )
        if runs_before(self.configs, gate.sae, edited) is False:
            raise ValueError(
                f"A gate must read an SAE that runs before the edit. Received: a gate on SAE {gate.sae} at "
                f"{self.configs[gate.sae].write_at!r} for an edit of SAE {edited} at "
                f"{self.configs[edited].write_at!r}."
            )
        feature = self.configs[gate.sae].resolve_feature(gate.feature)
        condition = Condition(gate.sae, feature, gate.above, gate.until, gate.over, gate.pool, gate.pre_activations)
        if condition not in self.conditions:
            self.conditions.append(condition)
        return Node(self.conditions.index(condition), (), False, gate.negate)

    def place(self, likes: Sequence[Tensor]) -> None:
        """Make the columns, when all gates are known. likes: of each SAE a tensor on its device."""
        for number, like in enumerate(likes):
            for kind in (False, True):
                found = [
                    place
                    for place, condition in enumerate(self.conditions)
                    if condition.sae == number and condition.pre_activations == kind
                ]
                if found:
                    latents = torch.tensor([self.conditions[place].feature for place in found], device=like.device)
                    self.columns.setdefault(number, []).append(Columns(tuple(found), latents, kind))

    @property
    def remembers(self) -> bool:
        """Whether what is open depends on other tokens than the one at hand."""
        return any(condition.remembers for condition in self.conditions)

    @property
    def prompt_decides(self) -> bool:
        """Whether nothing that is generated changes what is open."""
        if self.factors or self.names_tokens:
            return False
        return all(condition.over in ("prompt", "last") for condition in self.conditions)

    @property
    def names_tokens(self) -> bool:
        """Whether what is done depends on which token it is."""
        return any(entry.excluded for entry in self.entries)

    @property
    def is_scheduled(self) -> bool:
        """Whether what is generated is counted."""
        return any(one.strength.first is not None or one.strength.decay is not None for one in self.factors)


def runs_before(configs: Sequence[SparseAutoencoderConfig], one: int, other: int) -> bool | None:
    """Whether SAE `one` has been reached when SAE `other` edits; None where their places do not say."""
    one_writes, other_writes = configs[one].writes_at[0], configs[other].writes_at[0]
    if one_writes == other_writes:
        return one <= other  # in the order of their numbers
    first, second = _place(one_writes), _place(other_writes)
    return None if first is None or second is None else first < second


def _place(path: str) -> tuple[int, int] | None:
    parts = path.split(".")
    if len(parts) != 3 or parts[0] != "layers" or parts[2] not in SITES:
        return None
    return int(parts[1]), ORDER.index(parts[2])


class GateMemory:
    """What the gates of one `generate` remember: the value of each condition at every column so far.

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
        return self._decided if self._decided is not None and past >= self._end else None

    def all_shut(self, past: Any) -> bool:
        """Whether no gate is open in a pass, and none will be."""
        return not self._anything_open and past >= self._end

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
    """

    def __init__(
        self, plan: GatePlan, rows: Tensor, past: Any, memory: GateMemory | None, tokens: Tensor | None = None
    ) -> None:
        self.plan, self.rows, self.memory, self.tokens = plan, rows, memory, tokens
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
        """After a pass over the last of the prompt: what it has decided, where it decides all."""
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
            return now > condition.above
        whole = self._with_past(number, now)  # (B, P + T)
        length, tokens = whole.shape[1], now.shape[1]
        columns = torch.arange(length, device=whole.device)
        rows = self.rows.to(whole.device)
        first, end = rows[:, 1:2], rows[:, 2:3]
        real = columns >= first
        if condition.until is not None:
            opens, closes = real & (whole > condition.above), ~real | (whole <= condition.until)
            latest = [torch.where(event, columns + 1, 0).cummax(-1).values for event in (opens, closes)]
            return (latest[0] > latest[1])[:, length - tokens :]
        if condition.over == "so_far":
            decided = counted = real
        else:
            decided = columns >= end - 1
            counted = real & (columns < end) if condition.over == "prompt" else columns == end - 1
        pooled = pooled_so_far(whole, counted, condition.pool if condition.over != "last" else "max")
        return (decided & (pooled > condition.above))[:, length - tokens :]

    def _with_past(self, number: int, now: Tensor) -> Tensor:
        whole = now
        if torch.compiler.is_compiling() and isinstance(self.past, Tensor):
            raise ValueError(
                "A gate over more than the token at hand is not compiled over a static cache. Expected "
                "`disable_compile=True` in `generate`, or another cache."
            )
        if self.past:
            before = None if self.memory is None else self.memory.before(number, self.past)
            if before is None:
                raise ValueError(
                    f"A gate over more than the token at hand has to have seen the tokens before. Expected a call of "
                    f"`generate`, or the whole text in one pass. Received: a pass over {self.past} cached tokens, "
                    f"{self.plan.conditions[number]!r}."
                )
            whole = torch.cat([before.to(now.device), now], 1)
        if self.memory is not None:
            self.memory.values[number] = whole
        return whole


def pooled_so_far(values: Tensor, counted: Tensor, pool: str) -> Tensor:
    """At each column the `max` or `mean` of values (B, T) over the counted ones, (B, T) bool, up to it: (B, T)."""
    if pool == "max":
        return values.masked_fill(~counted, -torch.inf).cummax(-1).values
    return values.masked_fill(~counted, 0.0).cumsum(-1) / counted.cumsum(-1).clamp(min=1)
