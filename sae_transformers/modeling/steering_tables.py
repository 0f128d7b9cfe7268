"""The tables that steering is compiled into: values in their units, and the elementwise ops as clamped affine maps.

Every elementwise op is a clamped affine map `z' = min(max(a*z + b, low), high)`; an edit of one latent by several ops
is several stages. Notation: R rows of different steering, m latents, T tokens.

Value tables have a leading axis of size 3: the absolute part, the part in multiples of the latent's typical maximum,
and the part in multiples of the hidden norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .feature_edits import UNITS, WITHOUT_VALUE, FeatureEdit


class ValueTable:
    """Values of (R, m) entries in their units; `values` is (3, R, m)."""

    def __init__(self, rows: int, width: int, fill: float, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(3, rows, width, dtype=dtype, device=device)
        self.values[0] = fill
        self.uses_max = self.uses_norm = False

    def put(self, row: int, column: int, value: float, unit: str) -> None:
        self.values[:, row, column] = 0.0
        self.values[UNITS.index(unit), row, column] = value
        self.uses_max |= unit == "max"
        self.uses_norm |= unit == "norm"

    def add(self, row: int, column: int, value: float, unit: str) -> None:
        """As `put`, on top of what is there."""
        self.values[UNITS.index(unit), row, column] += value
        self.uses_max |= unit == "max"
        self.uses_norm |= unit == "norm"

    def at(self, rows: Tensor | None, maxima: Tensor | None, norms: Tensor | None) -> Tensor:
        """The values in absolute units, (batch or 1, T or 1, m).

        Args:
            rows: (batch,) row of the table for each batch row, or None for the only one.
            maxima: (m,) typical maximum of each latent.
            norms: (batch, T, 1 or m), what one hidden norm is worth in this table's unit.
        """
        table = self.values if rows is None else self.values[:, rows]
        values = table[0].unsqueeze(1)
        if self.uses_max and maxima is not None:
            values = values + table[1].unsqueeze(1) * maxima
        if self.uses_norm and norms is not None:
            values = values + table[2].unsqueeze(1) * norms
        return values


class Stage:
    """One clamped affine map for each row and latent."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.factor = torch.ones(rows, width, dtype=dtype, device=device)
        self.shift = ValueTable(rows, width, 0.0, dtype, device)
        self.low = ValueTable(rows, width, -math.inf, dtype, device)
        self.high = ValueTable(rows, width, math.inf, dtype, device)
        self.gate = torch.zeros(rows, width, dtype=torch.long, device=device)

    def put(self, row: int, column: int, edit: FeatureEdit, gate: int = 0) -> None:
        self.gate[row, column] = gate
        op, value = edit.op, 0.0 if edit.value is None else edit.value
        if op == "scale":
            self.factor[row, column] = value
        elif op in ("set", *WITHOUT_VALUE):
            self.factor[row, column] = 0.0
            self.shift.put(row, column, value, edit.unit)
        elif op == "add":
            self.shift.put(row, column, value, edit.unit)
        elif op == "shrink":
            self.shift.put(row, column, -value, edit.unit)
            self.low.put(row, column, 0.0, "absolute")
        elif op == "at_least":
            self.low.put(row, column, value, edit.unit)
        elif op == "at_most":
            self.high.put(row, column, value, edit.unit)

    def apply(
        self,
        latents: Tensor,
        rows: Tensor | None,
        maxima: Tensor | None,
        norms: Tensor | None,
        opened: Tensor | None = None,
    ) -> Tensor:
        """z' of (batch, T, m) latents. opened: (batch, T, G + 1) bool, by number of the gate; None where none is."""
        factor = self.factor if rows is None else self.factor[rows]
        moved = factor.unsqueeze(1) * latents + self.shift.at(rows, maxima, norms)
        moved = torch.minimum(
            torch.maximum(moved, self.low.at(rows, maxima, norms)), self.high.at(rows, maxima, norms)
        )
        if opened is None:
            return moved
        if opened.dtype == torch.bool:
            return torch.where(is_open(opened, self.gate, rows), moved, latents)
        return torch.lerp(latents, moved, share_of(opened, self.gate, rows))  # exact at 0 and at 1


def is_open(opened: Tensor, gates: Tensor, rows: Tensor | None) -> Tensor:
    """(batch, T, m) bool: whether each entry's gate is open, and its strength not 0. As `share_of`."""
    found = share_of(opened, gates, rows)
    return found if found.dtype == torch.bool else found != 0


def share_of(opened: Tensor, gates: Tensor, rows: Tensor | None) -> Tensor:
    """(batch, T, m): how far each entry's edit goes.

    Args:
        opened: (batch, T, G + 1) bool, by number of the gate; of strengths their factors.
        gates: (R, m) number of the gate of each entry.
        rows: (batch,) row of the tables, or None for the only one.
    """
    own = gates.expand(len(opened), -1) if rows is None else gates[rows]
    return opened.gather(-1, own.unsqueeze(1).expand(-1, opened.shape[1], -1))
