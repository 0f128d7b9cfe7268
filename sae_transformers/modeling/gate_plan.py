"""Which conditions a steering's gates and strengths have, each once, and what they read of which SAE.

Notation: C conditions, G different gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    skip_first: int

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
        condition = Condition(
            gate.sae, feature, gate.above, gate.until, gate.over, gate.pool, gate.pre_activations, gate.skip_first
        )
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
