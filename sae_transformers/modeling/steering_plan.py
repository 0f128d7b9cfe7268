"""Steering compiled against a model: index and value tensors, so that a forward pass branches on structure only.

Values of all ops and all batch rows are entries of the same tables (`steering_tables`), so a changed value, latent or
op of the same shape does not recompile a compiled model. Notation: R rows of different steering, m latents, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .configuration_sparse_autoencoder import TOPK_ACTIVATIONS, SparseAutoencoderConfig
from .erasing import Erasures
from .excluded_tokens import ExcludedTokens, known_ids
from .feature_edits import FeatureEdit
from .gate_plan import GatePlan
from .gate_run import GateMemory
from .steering import END, FAR, Steering
from .steering_tables import Stage, ValueTable, is_open


class Placed(NamedTuple):
    """An edit, the latent that it is of, and the number of its gate."""

    feature: int
    edit: FeatureEdit
    gate: int


Edits = list[Placed]  # of one row


class Places:
    """Latents of one SAE by what their edits need, each with its place in its table.

    read: they must be encoded. blind: they only receive an `add`: the change is known without encoding. direct: their
    decoder row is added as it is, without denormalisation.
    """

    def __init__(self, edits: Sequence[Edits], *, balance: bool) -> None:
        everything = [placed for row in edits for placed in row]
        added = {f for f, e, _ in everything if e.op == "add"}
        self.only_added = added - {f for f, e, _ in everything if e.op not in ("add", "direction")}
        if balance:  # the sum of the code must be known
            self.only_added = set()
        found: dict[str, set[tuple[int, int]]] = {"read": set(), "blind": set(), "direct": set()}
        for feature, edit, gate in everything:
            kind = self.kind(feature, edit)
            found[kind].add((feature, 0 if kind == "read" else gate))
        # By latent and gate: what is only added is one number for each.
        self.read, self.blind, self.direct = (
            {key: place for place, key in enumerate(sorted(found[kind]))} for kind in ("read", "blind", "direct")
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
    erasures: what is erased, or None.
    gates: (R, n) numbers of the gates that something of the row has here, -1 for none; one open is enough for the
        token to change at all. None where no row is gated.
    """

    def __init__(
        self,
        number: int,
        config: SparseAutoencoderConfig,
        plans: Sequence[Steering],
        like: Tensor,
        gates: GatePlan | None = None,
    ) -> None:
        gates = GatePlan([config]) if gates is None else gates
        self.number, self.count = number, len(plans)
        where = {"dtype": like.dtype, "device": like.device}
        self.made_for = (like.dtype, like.device)
        edits = [
            [
                Placed(
                    config.resolve_feature(e.feature),
                    e,
                    gates.number(s.gate_of(e), number, s.strengths_of(e), known_ids(e.exclude_tokens)),
                )
                for e in s.feature_edits
                if e.sae == number
            ]
            for s in plans
        ]
        balances = {s.balance for s in plans if any(e.sae == number for e in s.edits)}
        if len(balances) > 1:
            raise ValueError("`balance` must be the same for all rows of a batch. Received: balance=True and False.")
        self.balance = balances == {True}
        _check_magnitude(edits, config)
        places = Places(edits, balance=self.balance)
        self.read, self.blind, self.direct = (
            torch.tensor([feature for feature, _ in keys], dtype=torch.long, device=like.device)
            for keys in (places.read, places.blind, places.direct)
        )
        self.blind_gates, self.direct_gates = (
            torch.tensor([[gate for _, gate in keys]], dtype=torch.long, device=like.device)
            for keys in (places.blind, places.direct)
        )
        self._compile_gates(number, edits, plans, gates, like.device)
        self._fill_tables(edits, places, where)
        erased = [[(placed.feature, placed.gate) for placed in row if placed.edit.op == "erase"] for row in edits]
        self.erasures = Erasures(erased, like.device) if any(erased) else None
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
        if config.hooks_out and (self.erasures is not None or self.replace != "none"):
            raise ValueError(
                f"What SAE {number} does not reconstruct is not known: each place that it writes to is the sum over "
                f"all layers of the transcoder or crosscoder. Expected edits that keep the error "
                f"(keep_error=True, no op 'erase', no `reconstruct`). Received: an SAE that writes {config.write_at}."
            )
        units = {edit.unit for row in edits for _, edit, _ in row}
        self.uses_max, self.uses_norm = "max" in units, "norm" in units

    def _fill_tables(self, edits: Sequence[Edits], places: Places, where: dict[str, Any]) -> None:
        """The values of all edits; several of one latent, one after the other, are several `stages`."""
        rows, width = len(edits), len(places.read)
        scaled = any(edit.op == "scale_magnitude" for row in edits for _, edit, _ in row)
        self.magnitude = torch.full((rows, width), math.nan, **where) if scaled else None
        self.magnitude_gates = torch.zeros(rows, width, dtype=torch.long, device=where["device"])
        self.stages: list[Stage] = []
        self.edited = torch.zeros(rows, width, **where)
        self.blind_values = ValueTable(rows, len(places.blind), 0.0, **where)
        self.direct_values = ValueTable(rows, len(places.direct), 0.0, **where)
        for row, row_edits in enumerate(edits):
            depths: dict[int, int] = {}
            for feature, edit, gate in row_edits:
                kind = places.kind(feature, edit)
                if kind == "direct":
                    self.direct_values.add(row, places.direct[feature, gate], edit.value or 0.0, edit.unit)
                    continue
                if kind == "blind":
                    self.blind_values.add(row, places.blind[feature, gate], edit.value or 0.0, edit.unit)
                    continue
                place = places.read[feature, 0]
                self.edited[row, place] = 1.0
                if edit.op == "scale_magnitude" and self.magnitude is not None:
                    self.magnitude[row, place] = edit.value or 0.0
                    self.magnitude_gates[row, place] = gate
                    continue
                depths[place] = depth = depths.get(place, 0) + 1
                if depth > len(self.stages):
                    self.stages.append(Stage(rows, width, **where))
                self.stages[depth - 1].put(row, place, edit, gate)

    def _compile_gates(
        self, number: int, edits: Sequence[Edits], plans: Sequence[Steering], gates: GatePlan, device: torch.device
    ) -> None:
        rows = []
        for steering, placed in zip(plans, edits, strict=True):
            own = {gate for _, _, gate in placed}
            if number in steering.reconstruct or any(e.sae == number for e in steering.reweightings):
                own.add(gates.number(steering.gate_of(), number))
            rows.append(sorted(own))
        self.always = any(gate == 0 for row in rows for gate in row)  # whether anything is done whatever the gates
        self.gates: Tensor | None = None
        self.gate_numbers = sorted({gate for row in rows for gate in row if gate})
        if self.gate_numbers:
            width = max(map(len, rows))
            self.gates = torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=device)

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

    def lets_through(self, opened: Tensor, rows: Tensor | None) -> Tensor:
        """(batch, T) bool: whether anything at all is done to a token here.

        Args:
            opened: (batch, T, G + 1) bool, by number of the gate.
            rows: (batch,) rows of the tables, or None for the only one.
        """
        if self.gates is None:
            return torch.ones_like(opened[..., 0])
        own = self.gates if rows is None else self.gates[rows]  # (batch or 1, n)
        return (is_open(opened, own.clamp(min=0), None) & (own >= 0).unsqueeze(1)).any(-1)


def _check_magnitude(edits: Sequence[Edits], config: SparseAutoencoderConfig) -> None:
    if config.activation == "gated" and any(e.op == "scale_magnitude" for row in edits for _, e, _ in row):
        raise ValueError("`scale_magnitude` needs one pre-activation per latent. Received: activation='gated'.")
    for row in edits:
        for feature in {f for f, e, _ in row if e.op == "scale_magnitude"}:
            if sum(1 for f, e, _ in row if f == feature and e.op != "direction") > 1:
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
    excluded: tokens that are not steered; None where there are none.
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
        gates = GatePlan(configs)
        self.saes = {number: SaePlan(number, configs[number], plans, likes[number], gates) for number in sorted(used)}
        gates.place(likes)
        self.gates = gates if gates.entries else None
        self.fully_gated = not any(own.always for own in self.saes.values())
        self.intervals: Tensor | None = None
        self.from_prompt: Tensor | None = None
        self.ends_with_prompt = False
        if any(s.positions != "all" or not s for s in plans):
            self._compile_positions(plans, likes[0].device)
        tokens = [known_ids(s.exclude_tokens) if s else () for s in plans]
        self.excluded = ExcludedTokens(tokens, likes[0].device) if any(tokens) else None

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
    """A plan inside one `generate` call, where the number of prompt columns is known.

    memory: what its gates remember of the texts that are written.
    """

    is_bound: Literal[True] = True

    def __init__(self, plan: SteeringPlan, prompt_length: int, memory: GateMemory | None = None) -> None:
        self.plan = plan
        self.prompt_length = prompt_length
        self.memory = memory

    def is_over(self, past_length: int) -> bool:
        """Whether no token from `past_length` on is steered."""
        return self.plan.ends_with_prompt and past_length >= self.prompt_length
