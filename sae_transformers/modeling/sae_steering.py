"""An SAE's share of a model's forward pass: what it reports, and how it changes the hidden state.

Functions of the SAE, to be run inside its `forward` (`sae(hidden, request, number, task=serve)`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call_record import CallRequest, SiteResult
from .features_in_graph import place_in_graph
from .gate_run import GateRun
from .outputs import SparseFeatures
from .penalty_costs import penalty_costs
from .sae_code import Code, Normalized
from .sae_mathematics import SaeMathematics
from .steering_plan import SaePlan
from .steering_tables import is_open, share_of


def serve(
    sae: SaeMathematics, hidden: Tensor, request: CallRequest, number: int, target: Tensor | None = None
) -> SiteResult:
    """What `request` asks of SAE `number`.

    Args:
        hidden: (batch, seq, d_in), where it reads.
        target: (batch, seq, d_out), what it must reconstruct; `hidden` by default.
    """
    plan = request.plan.saes.get(number) if request.plan is not None else None
    features = losses = delta = replacement = rows = opened = linked = None
    x = hidden.to(sae.dtype)
    if request.gates is not None:
        _read_for_gates(sae, x, request.gates, number)
    if request.graph is not None and request.graph.works_at(number, request.features):
        here, columns = hidden if target is None else target, request.features.get(number)
        if sae.config.hooks_out:  # only what changes is known, the values of 0: it is added to each place
            here = x.new_zeros(*x.shape[:-1], sae.W_dec.shape[-1])
        features, linked = place_in_graph(sae, x, here, columns, request.graph, number)
        if sae.config.hooks_out:
            delta, linked = linked, None
        features = features if number in request.features else None
    elif number in request.features:
        features = _reported(sae, x, request.features[number], request.pre_activations)
    if plan is not None:
        gates = None
        if request.gates is not None and plan.gates is not None:
            gates = request.gates.open(x, plan.gate_numbers)
            opened = plan.lets_through(gates, request.rows)
        delta, replacement = _steer_columns(sae, x, plan, request, gates, target)
        if plan.replace == "mixed":
            rows = plan.replace_rows[request.rows]
    if request.losses:
        seen = x.detach() if request.detach else x
        goal = seen if target is None else (target.detach() if request.detach else target)
        losses = sae.token_losses(seen, request.losses, request.concept_targets.get(number), goal)
    penalties = penalty_costs(sae, x, request.penalties[number]) if number in request.penalties else None
    return SiteResult(delta, replacement, rows, features, losses, opened, linked, penalties)


def _read_for_gates(sae: SaeMathematics, x: Tensor, gates: GateRun, number: int) -> None:
    """The values that conditions on this SAE compare, at all tokens of the pass."""
    for conditions, features, pre_activations in gates.read_at(number):
        values = read_latents(sae, x, features, pre_activations)
        maxima = sae.feature_max[features] if gates.plan.factors else None
        for column, condition in enumerate(conditions):
            gates.read(condition, values[..., column], None if maxima is None else maxima[column])


def read_latents(sae: SaeMathematics, x: Tensor, features: Tensor, pre_activations: bool) -> Tensor:
    """Some latents (..., m) of hidden states (..., d_in), or their pre-activations (of a gated SAE the gate's)."""
    normalized = sae.normalize(x)
    return sae.pre_acts_of(normalized, features)[0] if pre_activations else sae.latents_of(normalized, features)


def _reported(
    sae: SaeMathematics, x: Tensor, columns: Tensor | None, pre_activations: bool
) -> SparseFeatures | Tensor:
    normalized = sae.normalize(x)
    if pre_activations:
        return sae.pre_acts_of(normalized, columns)[0]
    return sae.code_of(normalized).sparse() if columns is None else sae.latents_of(normalized, columns)


def _steer_columns(
    sae: SaeMathematics,
    x: Tensor,
    plan: SaePlan,
    request: CallRequest,
    opened: Tensor | None,
    target: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """`steer` where tokens are steered; what it gives elsewhere is not used, so it is not computed either."""
    columns = request.steered_columns()
    if columns is None:
        return steer(sae, x, plan, request.rows, opened, target)
    if not len(columns):
        return None, None
    columns = columns.to(x.device)
    opened = None if opened is None else opened[:, columns]
    goal = None if target is None else target[:, columns]
    delta, replacement = steer(sae, x[:, columns], plan, request.rows, opened, goal)
    return _spread(delta, columns, x), _spread(replacement, columns, x)


def _spread(part: Tensor | None, columns: Tensor, x: Tensor) -> Tensor | None:
    """(batch or 1, c or 1, d_out) of some columns as (batch, seq, d_out), 0 elsewhere."""
    if part is None:
        return None
    whole = part.new_zeros(*x.shape[:2], part.shape[-1])
    whole[:, columns] = part
    return whole


def steer(
    sae: SaeMathematics,
    x: Tensor,
    plan: SaePlan,
    rows: Tensor | None,
    opened: Tensor | None = None,
    target: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The change (batch, seq or 1, d_out) and the replacement, each None where there is none.

    Args:
        opened: (batch, seq, G + 1) bool, which gates are open; None where there are none.
        target: (batch, seq, d_out), what is changed; `x` by default.
    """
    rows = rows if plan.count > 1 else None
    norms = x.norm(dim=-1, keepdim=True) if plan.uses_norm else None  # (batch, seq, 1)
    erasures = plan.erasures if plan.replace != "all" else None  # with `replace` there is no error to erase from
    needs_all = plan.reweight is not None or plan.replace != "none" or plan.selects or erasures is not None
    needs_scale = needs_all or len(plan.read) or len(plan.blind)
    normalized = sae.normalize(x) if needs_scale else Normalized(x, None, None)
    code = sae.code_of(normalized) if needs_all else None
    erased = None  # from the error, nothing in rows that lose all of it
    if code is not None and erasures is not None:
        error = (x if target is None else target.to(sae.dtype)) - sae.decode_code(code, normalized, x)
        erased = erasures.component(error, sae.W_dec[erasures.features], rows, opened)
        if plan.replace == "mixed" and rows is not None:
            erased = torch.where(plan.replace_rows[rows][:, None, None], 0.0, erased)
    replacement, parts = None, []  # parts are in the SAE's normalised units
    if code is not None and plan.reweight is not None:
        code, normalized, swapped = _reweighted(sae, code, normalized, plan, plan.reweight, rows)
        if swapped is not None:
            parts.append(swapped)
    if code is not None and plan.replace != "none":
        replacement = sae.decode_code(code, normalized, x)
    if len(plan.read):
        parts.append(_change_of_read(sae, normalized, code, plan, rows, norms, opened))
    if len(plan.blind):
        values = plan.blind_values.at(rows, _maxima(sae, plan, plan.blind), None)
        parts.append(_let_through(values, opened, plan.blind_gates) @ sae.W_dec[plan.blind])
    delta = sum(parts[1:], parts[0]) if parts else None
    if delta is not None and normalized.scale is not None:
        delta = delta * normalized.scale
    if len(plan.direct):  # in the units of the hidden state
        added = _directions(sae, plan, rows, norms, opened)
        delta = added if delta is None else delta + added
    if erased is not None and delta is not None:
        delta = delta - erased
    return delta, replacement


def steered(sae: SaeMathematics, hidden: Tensor, plan: SaePlan, rows: Tensor | None, target: Tensor) -> Tensor:
    """`target` (T, d_out), steered where `hidden` (T, d_in) is read, each token by its row of the plan (T,)."""
    # Each token is a row of one column.
    delta, replacement = steer(sae, hidden.to(sae.dtype).unsqueeze(1), plan, rows, None, target.unsqueeze(1))
    replaced = plan.replace_rows[rows] if plan.replace == "mixed" and rows is not None else None
    return SiteResult(delta, replacement, replaced, None, None).applied(target.unsqueeze(1)).squeeze(1)


def _maxima(sae: SaeMathematics, plan: SaePlan, latents: Tensor) -> Tensor | None:
    return sae.feature_max[latents] if plan.uses_max else None


def _let_through(values: Tensor, opened: Tensor | None, gates: Tensor) -> Tensor:
    """Values (batch or 1, T or 1, m) of entries whose gates (1, m) are open, as far as they go, and 0."""
    if opened is None:
        return values
    share = share_of(opened, gates, None)
    return torch.where(share, values, 0.0) if share.dtype == torch.bool else share * values


def _directions(
    sae: SaeMathematics, plan: SaePlan, rows: Tensor | None, norms: Tensor | None, opened: Tensor | None
) -> Tensor:
    directions = sae.W_dec[plan.direct]  # (q, d_out)
    per_norm = norms / directions.norm(dim=-1) if norms is not None else None  # (batch, seq, q)
    values = plan.direct_values.at(rows, _maxima(sae, plan, plan.direct), per_norm)
    return _let_through(values, opened, plan.direct_gates) @ directions


def _change_of_read(
    sae: SaeMathematics,
    normalized: Normalized,
    code: Code | None,
    plan: SaePlan,
    rows: Tensor | None,
    norms: Tensor | None,
    opened: Tensor | None,
) -> Tensor:
    """`sum_i (z'_i - z_i) * W_dec[i]` over the latents that are read, (batch, seq, d_out)."""
    read = plan.read
    directions = sae.W_dec[read]  # (m, d_out)
    latents = sae.latents_of(normalized, read) if code is None else _read_of(code, plan)
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
        pre_acts = sae.pre_acts_of(normalized, read)[0] if code is None else code.pre_acts[..., read]
        scaled = ~factor.isnan()
        if opened is not None:
            scaled = scaled & is_open(opened, plan.magnitude_gates, rows)
        changed = torch.where(scaled, factor * pre_acts.abs(), changed)
    for stage in plan.stages:
        changed = stage.apply(changed, rows, _maxima(sae, plan, read), per_norm, opened)
    change = changed - latents
    delta = change @ directions
    if plan.balance:
        edited = plan.edited if rows is None else plan.edited[rows]  # (batch or 1, m)
        rest = (sae.W_dec.sum(0) - edited @ directions) / (sae.config.d_sae - edited.sum(-1, keepdim=True))
        delta = delta - change.sum(-1, keepdim=True) * rest.unsqueeze(1)
    return delta


def _read_of(code: Code, plan: SaePlan) -> Tensor:
    """Activations of the latents in `plan.read`, (batch, seq, m)."""
    if isinstance(code.latents, Tensor):
        return code.latents[..., plan.read]
    # Scatter the picked values to their place among the m that are read; all others go to a spare column.
    indices, values, _ = code.latents
    place = plan.lookup[indices]  # (batch, seq, k)
    spare = values.new_zeros(*place.shape[:-1], len(plan.read) + 1)
    return spare.scatter(-1, place, values)[..., :-1]


def _reweighted(
    sae: SaeMathematics, code: Code, normalized: Normalized, plan: SaePlan, weights: Tensor, rows: Tensor | None
) -> tuple[Code, Normalized, Tensor | None]:
    """The code after a re-weighting, what undoes its normalisation, and the change that makes of the output, (batch,
    seq, d_out); None where all rows are replaced by the decoded code."""
    scores = (weights if rows is None else weights[rows]).unsqueeze(1)
    old, code = code, _selected_again(sae, code, scores, plan.reweight_mode)
    if plan.reweight_rows is not None and rows is not None:
        code = _chosen(plan.reweight_rows[rows][:, None, None], code, old)
    if plan.reweight_mode == "weight_legacy":
        mean = scores.mean(-1, keepdim=True)
        normalized = Normalized(normalized.x, mean**2, mean)
    if plan.replace == "all":
        return code, normalized, None
    swapped = code.decoded(sae.W_dec) - old.decoded(sae.W_dec)
    if plan.replace == "mixed":  # in replaced rows the replacement holds the re-weighted code already
        swapped = torch.where(plan.replace_rows[rows][:, None, None], 0.0, swapped)
    return code, normalized, swapped


def _selected_again(sae: SaeMathematics, code: Code, scores: Tensor, mode: str) -> Code:
    weighted = sae.code_from(code.pre_acts * scores).latents
    if mode != "swap":
        return Code(code.pre_acts, weighted)
    if isinstance(weighted, Tensor):
        return Code(code.pre_acts, torch.where(weighted != 0, code.pre_acts, 0.0))
    values = torch.where(weighted.values != 0, code.pre_acts.gather(-1, weighted.indices), 0.0)
    return Code(code.pre_acts, weighted._replace(values=values))


def _chosen(where: Tensor, yes: Code, no: Code) -> Code:
    """`yes` in the rows that `where` (batch, 1, 1) names, `no` in the others; pre-activations are the same."""
    if isinstance(yes.latents, Tensor) and isinstance(no.latents, Tensor):
        return Code(yes.pre_acts, torch.where(where, yes.latents, no.latents))
    pairs = zip(yes.latents[:2], no.latents[:2], strict=True)
    indices, values = (torch.where(where, new, old) for new, old in pairs)
    return Code(yes.pre_acts, SparseFeatures(indices, values, yes.pre_acts.shape[-1]))
