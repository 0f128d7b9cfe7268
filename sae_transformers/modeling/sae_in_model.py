"""An SAE's share of a model's forward pass: what it reports, how it changes the hidden state, its losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .call_record import CallRecord, SiteResult
from .outputs import SparseFeatures
from .sae_losses import concept_losses, normalized_mse
from .steering_plan import SaePlan


class Normalized(NamedTuple):
    """A normalised input and how to undo it: `hidden ~ x * scale + mean`; None for what is not there."""

    x: Tensor
    scale: Tensor | float | None
    mean: Tensor | None


class Code(NamedTuple):
    """All latents of the tokens at hand: `SparseFeatures` for top-k activations, (..., d_sae) for the others.

    pre_acts: (..., d_sae).
    """

    pre_acts: Tensor
    latents: Tensor | SparseFeatures


class InModelMixin:
    """The half of `SparseAutoencoder` that hooks use; the mathematics it calls is in the other half."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _serve(self, hidden: Tensor, record: CallRecord, number: int, target: Tensor | None = None) -> SiteResult:
        """What `record` asks of this SAE, for hidden states (batch, seq, d_in)."""
        plan = record.plan.saes.get(number) if record.plan is not None else None
        columns = record.features.get(number)
        features = losses = delta = replacement = rows = None
        x = hidden.to(self.dtype)
        if number in record.features:
            features = self._report(x, columns, record.pre_activations)
        if plan is not None:
            delta, replacement = self._steer_columns(x, plan, record)
            if plan.replace == "mixed":
                rows = plan.replace_rows[record.rows]
        if record.losses:
            seen = x.detach() if record.detach else x
            goal = seen if target is None else (target.detach() if record.detach else target).to(self.dtype)
            losses = self._token_losses(seen, record.losses, record.concept_targets.get(number), goal)
        return SiteResult(delta, replacement, rows, features, losses)

    def _report(self, x: Tensor, columns: Tensor | None, pre_activations: bool) -> SparseFeatures | Tensor:
        if pre_activations:
            return self._pre_acts(x, columns)
        return self._sparse(x) if columns is None else self._selected(x, columns)

    def _steer_columns(self, x: Tensor, plan: SaePlan, record: CallRecord) -> tuple[Tensor | None, Tensor | None]:
        """`_steer` where tokens are steered; what it gives elsewhere is not used, so it is not computed either."""
        columns = record.steered_columns()
        if columns is None:
            return self._steer(x, plan, record.rows)
        if not len(columns):
            return None, None
        columns = columns.to(x.device)
        found = self._steer(x[:, columns], plan, record.rows)
        delta, replacement = (None if part is None else _spread(part, columns, x) for part in found)
        return delta, replacement

    def _steer(self, x: Tensor, plan: SaePlan, rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change (batch, seq or 1, d_out) and the replacement, each None where there is none."""
        rows = rows if plan.count > 1 else None
        norms = x.norm(dim=-1, keepdim=True) if plan.uses_norm else None  # (batch, seq, 1)
        needs_all = plan.reweight is not None or plan.replace != "none" or plan.selects
        needs_scale = needs_all or len(plan.read) or len(plan.blind)
        normalized = statistics = self.normalize(x) if needs_scale else Normalized(x, None, None)
        code = self._code_from(*self._linear(self._encoder_input(normalized))) if needs_all else None
        replacement, parts = None, []  # parts are in the SAE's normalised units
        if code is not None and plan.reweight is not None:
            scores = (plan.reweight if rows is None else plan.reweight[rows]).unsqueeze(1)
            old, code = code, self._reweighted(code, scores, plan.reweight_mode)
            if plan.reweight_rows is not None and rows is not None:
                code = _chosen(plan.reweight_rows[rows][:, None, None], code, old)
            if plan.reweight_mode == "weight_legacy":
                mean = scores.mean(-1, keepdim=True)
                statistics = Normalized(normalized.x, mean**2, mean)
            if plan.replace != "all":
                swapped = self._decoded(code) - self._decoded(old)
                if plan.replace == "mixed":  # in replaced rows the replacement holds the re-weighted code already
                    swapped = torch.where(plan.replace_rows[rows][:, None, None], 0.0, swapped)
                parts.append(swapped)
        if code is not None and plan.replace != "none":
            replacement = self._decode_code(code, statistics, x)
        if len(plan.read):
            parts.append(self._change_of_read(statistics, code, plan, rows, norms))
        if len(plan.blind):
            parts.append(plan.blind_values.at(rows, self._maxima(plan, plan.blind), None) @ self.W_dec[plan.blind])
        delta = sum(parts[1:], parts[0]) if parts else None
        if delta is not None and statistics.scale is not None:
            delta = delta * statistics.scale
        if len(plan.direct):  # in the units of the hidden state
            added = self._directions(plan, rows, norms)
            delta = added if delta is None else delta + added
        return delta, replacement

    def _maxima(self, plan: SaePlan, latents: Tensor) -> Tensor | None:
        return self.feature_max[latents] if plan.uses_max else None

    def _directions(self, plan: SaePlan, rows: Tensor | None, norms: Tensor | None) -> Tensor:
        directions = self.W_dec[plan.direct]  # (q, d_out)
        per_norm = norms / directions.norm(dim=-1) if norms is not None else None  # (batch, seq, q)
        return plan.direct_values.at(rows, self._maxima(plan, plan.direct), per_norm) @ directions

    def _change_of_read(
        self, normalized: Normalized, code: Code | None, plan: SaePlan, rows: Tensor | None, norms: Tensor | None
    ) -> Tensor:
        """`sum_i (z'_i - z_i) * W_dec[i]` over the latents that are read, (batch, seq, d_out)."""
        read = plan.read
        directions = self.W_dec[read]  # (m, d_out)
        latents = self._read_latents(normalized, code, plan)
        per_norm = None
        if norms is not None:
            per_norm = norms / directions.norm(dim=-1)
            if isinstance(normalized.scale, Tensor):  # an input without scale has norm 0 too: 0, not 0/0
                per_norm = per_norm / normalized.scale.clamp(min=torch.finfo(norms.dtype).tiny)
            elif normalized.scale is not None:
                per_norm = per_norm / normalized.scale
        changed = latents
        if plan.magnitude is not None:
            factor = (plan.magnitude if rows is None else plan.magnitude[rows]).unsqueeze(1)
            pre_acts = (
                self._linear(self._encoder_input(normalized), read)[0] if code is None else code.pre_acts[..., read]
            )
            changed = torch.where(factor.isnan(), changed, factor * pre_acts.abs())
        for stage in plan.stages:
            changed = stage.apply(changed, rows, self._maxima(plan, read), per_norm)
        change = changed - latents
        delta = change @ directions
        if plan.balance:
            edited = plan.edited if rows is None else plan.edited[rows]  # (batch or 1, m)
            rest = (self.W_dec.sum(0) - edited @ directions) / (self.config.d_sae - edited.sum(-1, keepdim=True))
            delta = delta - change.sum(-1, keepdim=True) * rest.unsqueeze(1)
        return delta

    def _read_latents(self, normalized: Normalized, code: Code | None, plan: SaePlan) -> Tensor:
        """Activations of the latents in `plan.read`, (batch, seq, m)."""
        if code is None:
            return self._columns(normalized, plan.read)
        if isinstance(code.latents, Tensor):
            return code.latents[..., plan.read]
        # Scatter the picked values to their place among the m that are read; all others go to a spare column.
        indices, values, _ = code.latents
        place = plan.lookup[indices]  # (batch, seq, k)
        spare = values.new_zeros(*place.shape[:-1], len(plan.read) + 1)
        return spare.scatter(-1, place, values)[..., :-1]

    def _reweighted(self, code: Code, scores: Tensor, mode: str) -> Code:
        weighted = self._code_from(code.pre_acts * scores, None).latents
        if mode != "swap":
            return Code(code.pre_acts, weighted)
        if isinstance(weighted, Tensor):
            return Code(code.pre_acts, torch.where(weighted != 0, code.pre_acts, 0.0))
        values = torch.where(weighted.values != 0, code.pre_acts.gather(-1, weighted.indices), 0.0)
        return Code(code.pre_acts, weighted._replace(values=values))

    def _token_losses(
        self, x: Tensor, names: tuple[str, ...], concept_targets: Tensor | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        """Each loss term per token, (...); unknown concept labels count 0."""
        x = x.to(self.dtype)
        target = x if target is None else target.to(self.dtype)
        terms: dict[str, Tensor] = {}
        code, normalized = self._full_code(x)
        if "reconstruction" in names:
            terms["reconstruction"] = normalized_mse(target, self._decode_code(code, normalized, x))
        if "sparsity" in names:
            norms = self.W_dec.norm(dim=-1)  # (d_sae,)
            if isinstance(code.latents, Tensor):
                mass = code.latents.abs() @ norms
            else:
                mass = (code.latents.values.abs() * norms[code.latents.indices]).sum(-1)
            terms["sparsity"] = mass / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
        if "conditioning" in names and (self.config.concepts or concept_targets is not None):
            latents = torch.tensor(list(self.config.concepts.values()), dtype=torch.long, device=x.device)
            pre_acts = code.pre_acts[..., latents]
            unknown = pre_acts.new_full((), -100.0)
            terms["conditioning"] = concept_losses(
                pre_acts, unknown if concept_targets is None else concept_targets
            ).sum(-1)
        return terms


def _spread(part: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """(batch or 1, c or 1, d_out) of some columns as (batch, seq, d_out), 0 elsewhere."""
    whole = part.new_zeros(*x.shape[:2], part.shape[-1])
    whole[:, columns] = part
    return whole


def _chosen(where: Tensor, yes: Code, no: Code) -> Code:
    """`yes` in the rows that `where` (batch, 1, 1) names, `no` in the others; pre-activations are the same."""
    if isinstance(yes.latents, Tensor) and isinstance(no.latents, Tensor):
        return Code(yes.pre_acts, torch.where(where, yes.latents, no.latents))
    pairs = zip(yes.latents[:2], no.latents[:2], strict=True)
    indices, values = (torch.where(where, new, old) for new, old in pairs)
    return Code(yes.pre_acts, SparseFeatures(indices, values, yes.pre_acts.shape[-1]))
