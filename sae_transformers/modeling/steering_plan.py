"""Steering compiled against a model: index and value tensors, so that a forward pass branches on structure only.

Every elementwise op is a clamped affine map `z' = min(max(a*z + b, low), high)`; an edit of one latent by several ops
is several stages. Values of all ops and all batch rows are entries of the same tables, so a changed value, latent or
op of the same shape does not recompile a compiled model. Notation: R rows of different steering, m latents, T tokens.

Value tables have a leading axis of size 3: the absolute part, the part in multiples of the latent's typical maximum,
and the part in multiples of the hidden norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .configuration_sparse_autoencoder import TOPK_ACTIVATIONS, SparseAutoencoderConfig
from .steering import END, FAR, UNITS, FeatureEdit, Steering


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

    def put(self, row: int, column: int, edit: FeatureEdit) -> None:
        op, value = edit.op, 0.0 if edit.value is None else edit.value
        if op == "scale":
            self.factor[row, column] = value
        elif op in ("set", "ablate"):
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

    def apply(self, latents: Tensor, rows: Tensor | None, maxima: Tensor | None, norms: Tensor | None) -> Tensor:
        """z' of (batch, T, m) latents."""
        factor = self.factor if rows is None else self.factor[rows]
        moved = factor.unsqueeze(1) * latents + self.shift.at(rows, maxima, norms)
        return torch.minimum(torch.maximum(moved, self.low.at(rows, maxima, norms)), self.high.at(rows, maxima, norms))


Edits = list[tuple[int, FeatureEdit]]  # of one row, with the latent of each


class Places:
    """Latents of one SAE by what their edits need, each with its place in its table.

    read: they must be encoded. blind: they only receive an `add`: the change is known without encoding. direct: their
    decoder row is added as it is, without denormalisation.
    """

    def __init__(self, edits: Sequence[Edits], *, balance: bool) -> None:
        everything = [pair for row in edits for pair in row]
        added = {f for f, e in everything if e.op == "add"}
        self.only_added = added - {f for f, e in everything if e.op not in ("add", "direction")}
        if balance:  # the sum of the code must be known
            self.only_added = set()
        found: dict[str, set[int]] = {"read": set(), "blind": set(), "direct": set()}
        for feature, edit in everything:
            found[self.kind(feature, edit)].add(feature)
        self.read, self.blind, self.direct = (
            {f: place for place, f in enumerate(sorted(found[kind]))} for kind in ("read", "blind", "direct")
        )

    def kind(self, feature: int, edit: FeatureEdit) -> str:
        """`read`, `blind` or `direct`."""
        if edit.op == "direction" or (feature in self.only_added and edit.unit == "norm"):
            return "direct"
        return "blind" if feature in self.only_added else "read"


class SaePlan:
    """What is done at one SAE.

    read, blind, direct: (m,), (n,), (q,) latents, see `Places`; those that are read have `stages`.
    lookup: (d_sae,) each latent's place in `read`, or m.
    edited: (R, m), 1 where the row edits the latent and 0 where only another row does.
    reweight: (R, d_sae) scores, or None; `reweight_rows` (R,) bool, or None where all rows are re-weighted.
    replace: `none`, `all` or `mixed` rows lose what the SAE does not reconstruct; `replace_rows` (R,) bool.
    """

    def __init__(self, number: int, config: SparseAutoencoderConfig, plans: Sequence[Steering], like: Tensor) -> None:
        self.number, self.count = number, len(plans)
        where = {"dtype": like.dtype, "device": like.device}
        self.made_for = (like.dtype, like.device)
        edits = [[(config.resolve_feature(e.feature), e) for e in s.feature_edits if e.sae == number] for s in plans]
        balances = {s.balance for s in plans if any(e.sae == number for e in s.edits)}
        if len(balances) > 1:
            raise ValueError("`balance` must be the same for all rows of a batch. Received: balance=True and False.")
        self.balance = balances == {True}
        _check_magnitude(edits, config)
        places = Places(edits, balance=self.balance)
        self.read, self.blind, self.direct = (
            torch.tensor(list(latents), dtype=torch.long, device=like.device)
            for latents in (places.read, places.blind, places.direct)
        )
        self._fill_tables(edits, places, where)
        if self.balance and bool((self.edited.sum(-1) == config.d_sae).any()):
            raise ValueError(
                f"`balance` spreads a change over latents that are not edited. Received: edits of all {config.d_sae}."
            )
        self.selects = bool(len(self.read)) and config.activation in TOPK_ACTIVATIONS
        self.lookup = self.read.new_empty(0)
        if self.selects:
            self.lookup = torch.full((config.d_sae,), len(self.read), dtype=torch.long, device=like.device)
            self.lookup[self.read] = torch.arange(len(self.read), device=like.device)
        self._compile_reweighting(number, config, plans, where)
        replaced = [
            number in s.reconstruct or (not s.keep_error and any(e.sae == number for e in s.edits)) for s in plans
        ]
        self.replace = "all" if all(replaced) else "mixed" if any(replaced) else "none"
        self.replace_rows = torch.tensor(replaced, device=like.device)
        units = {edit.unit for row in edits for _, edit in row}
        self.uses_max, self.uses_norm = "max" in units, "norm" in units

    def _fill_tables(self, edits: Sequence[Edits], places: Places, where: dict[str, Any]) -> None:
        """The values of all edits; several of one latent, one after the other, are several `stages`."""
        rows, width = len(edits), len(places.read)
        scaled = any(edit.op == "scale_magnitude" for row in edits for _, edit in row)
        self.magnitude = torch.full((rows, width), math.nan, **where) if scaled else None
        self.stages: list[Stage] = []
        self.edited = torch.zeros(rows, width, **where)
        self.blind_values = ValueTable(rows, len(places.blind), 0.0, **where)
        self.direct_values = ValueTable(rows, len(places.direct), 0.0, **where)
        for row, row_edits in enumerate(edits):
            depths: dict[int, int] = {}
            for feature, edit in row_edits:
                kind = places.kind(feature, edit)
                if kind == "direct":
                    self.direct_values.add(row, places.direct[feature], edit.value or 0.0, edit.unit)
                    continue
                if kind == "blind":
                    self.blind_values.add(row, places.blind[feature], edit.value or 0.0, edit.unit)
                    continue
                place = places.read[feature]
                self.edited[row, place] = 1.0
                if edit.op == "scale_magnitude" and self.magnitude is not None:
                    self.magnitude[row, place] = edit.value or 0.0
                    continue
                depths[place] = depth = depths.get(place, 0) + 1
                if depth > len(self.stages):
                    self.stages.append(Stage(rows, width, **where))
                self.stages[depth - 1].put(row, place, edit)

    def _compile_reweighting(
        self, number: int, config: SparseAutoencoderConfig, plans: Sequence[Steering], where: dict[str, Any]
    ) -> None:
        found = {r: e for r, s in enumerate(plans) for e in s.reweightings if e.sae == number}
        self.reweight: Tensor | None = None
        self.reweight_rows: Tensor | None = None
        self.reweight_mode = ""
        if not found:
            return
        if config.activation == "gated":
            raise ValueError("Re-weighting needs one pre-activation per latent. Received: activation='gated'.")
        modes = {(e.mode, e.legacy) for e in found.values()}
        if len(modes) > 1 or len({len(e.scores) for e in found.values()}) > 1:
            raise ValueError(f"Rows of a batch must be re-weighted in one mode. Received: {sorted(modes)}.")
        scores = next(iter(found.values())).scores
        if len(scores) != config.d_sae:
            raise ValueError(f"`scores` needs one number for each of {config.d_sae} latents. Received: {len(scores)}.")
        self.reweight = torch.ones(len(plans), config.d_sae, **where)
        for row, edit in found.items():
            self.reweight[row] = torch.tensor(edit.scores, **where)
        if len(found) < len(plans):
            self.reweight_rows = torch.tensor([row in found for row in range(len(plans))], device=where["device"])
        mode, legacy = modes.pop()
        if legacy and len(found) < len(plans):
            raise ValueError("Legacy re-weighting changes the decoder's statistics and must hold for all rows.")
        self.reweight_mode = "weight_legacy" if legacy else mode


def _check_magnitude(edits: Sequence[Edits], config: SparseAutoencoderConfig) -> None:
    if config.activation == "gated" and any(e.op == "scale_magnitude" for row in edits for _, e in row):
        raise ValueError("`scale_magnitude` needs one pre-activation per latent. Received: activation='gated'.")
    for row in edits:
        for feature in {f for f, e in row if e.op == "scale_magnitude"}:
            if sum(1 for f, e in row if f == feature and e.op != "direction") > 1:
                raise ValueError(
                    f"`scale_magnitude` must be the only edit of its latent. Received: several of feature {feature}."
                )


class SteeringPlan:
    """A batch's steering, compiled for one model. Build it with `model.prepare_steering`.

    likes holds one tensor for each SAE, with the dtype and on the device it runs in.

    rows: the `Steering` of each row.
    saes: SAE number -> `SaePlan`.
    intervals: (R, P, 2) int64 offsets of the steered [start, stop) columns, and `from_prompt` (R, P, 2) bool: counted
        from the end of the prompt instead of the first real token; both None where all positions of all rows are
        steered.
    """

    is_plan = True
    is_bound: Literal[False] = False

    def __init__(
        self, plans: Sequence[Steering], configs: Sequence[SparseAutoencoderConfig], likes: Sequence[Tensor]
    ) -> None:
        self.rows = tuple(plans)
        self.count = len(plans)
        used = set()
        for steering in plans:
            for number in [e.sae for e in steering.edits] + list(steering.reconstruct):
                if number >= len(configs):
                    raise ValueError(
                        f"The model has {len(configs)} SAE(s), numbered from 0. Received: sae={number!r}."
                    )
                used.add(number)
        self.saes = {number: SaePlan(number, configs[number], plans, likes[number]) for number in sorted(used)}
        self.intervals: Tensor | None = None
        self.from_prompt: Tensor | None = None
        self.ends_with_prompt = False
        if any(s.positions != "all" or not s for s in plans):
            self._compile_positions(plans, likes[0].device)

    def fits(self, likes: Iterable[Tensor]) -> bool:
        """Whether the SAEs it is about still have the dtype and the device it was compiled for."""
        return all(
            (like.dtype, like.device) == plan.made_for for like, plan in zip(likes, self.saes.values(), strict=True)
        )

    def _compile_positions(self, plans: Sequence[Steering], device: torch.device) -> None:
        rows = [steering.bounds for steering in plans]
        width = max(1, max(len(r) for r in rows))
        intervals = torch.zeros(len(rows), width, 2, dtype=torch.long)
        from_prompt = torch.zeros(len(rows), width, 2, dtype=torch.bool)
        for r, ranges in enumerate(rows):
            for p, (start, stop) in enumerate(ranges):
                for side, (bound, open_end) in enumerate(((start, -FAR), (stop, FAR))):
                    intervals[r, p, side] = open_end if bound is None else 0 if bound == END else bound
                    from_prompt[r, p, side] = bound == END or (isinstance(bound, int) and bound < 0)
        self.ends_with_prompt = bool((from_prompt[..., 1] & (intervals[..., 1] <= 0) | (intervals[..., 1] == 0)).all())
        self.intervals, self.from_prompt = intervals.to(device), from_prompt.to(device)

    def ranges(self, prompt_length: int) -> list[list[tuple[int, int]]]:
        """`Steering.ranges` of each row."""
        return [steering.ranges(prompt_length) for steering in self.rows]

    def position_mask(self, columns: Tensor, rows: Tensor) -> Tensor | None:
        """Which tokens are steered, (batch, T) bool, or None for all.

        Args:
            columns: (T,) absolute columns of the tokens at hand.
            rows: (batch, 3) int64: row of the tables, first real column, end of the prompt.
        """
        if self.intervals is None or self.from_prompt is None:
            return None
        table = rows[:, 0] if self.count > 1 else torch.zeros_like(rows[:, 0])
        intervals, from_prompt = self.intervals.to(rows.device)[table], self.from_prompt.to(rows.device)[table]
        anchor = torch.where(from_prompt, rows[:, 2, None, None], rows[:, 1, None, None])  # (batch, P, 2)
        start, stop = (intervals + anchor).unbind(-1)
        inside = (columns >= start.unsqueeze(-1)) & (columns < stop.unsqueeze(-1))  # (batch, P, T)
        return inside.any(1)


class BoundSteering:
    """A plan inside one `generate` call, where the number of prompt columns is known."""

    is_bound: Literal[True] = True

    def __init__(self, plan: SteeringPlan, prompt_length: int) -> None:
        self.plan = plan
        self.prompt_length = prompt_length

    def is_over(self, past_length: int) -> bool:
        """Whether no token from `past_length` on is steered."""
        return self.plan.ends_with_prompt and past_length >= self.prompt_length
