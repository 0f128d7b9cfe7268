"""Latents in the graph of a model's outputs, and functions that take their place.

Notation: `h` what the base made where an SAE writes, `x` what the SAE reads, `z = encode(x)` its latents, `v` the
reported values (equal to `z`), `s` the scale that undoes the SAE's normalisation, `sg` a stop of the gradient. What
goes on in the forward pass is `h` in every case, to the last bit: only gradients differ.

    error detached  h' = sg(h) + (decode(v) - sg(decode(v)))     dh'/dv = s * W_dec, dh'/dx = that of decode(encode(x))
    error kept      h' = h + s * (v - z) @ W_dec                 dh'/dv = s * W_dec, dh'/dx = that of the base

With the error detached the stream after an SAE depends on its latents alone (and on the skip connection of a
transcoder), so that an SAE's latents reach the output through the latents of later SAEs and what lies between. With
the error kept it depends on all that the base's stream does: the gradient of a value is the derivative of the base's
own output by an `add` to that latent. `v` is a copy of `z` in the graph, so a loss of the values themselves trains
what lies before them; in the second case its share and that of `z` cancel exactly in the gradient of `x`.

Sparse feature circuits (https://arxiv.org/abs/2403.19647), section 3 and appendix; attribution patching
(https://arxiv.org/abs/2310.10348).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_sparse_autoencoder import SparseAutoencoderConfig
from .outputs import SparseFeatures
from .sae_code import Normalized
from .sae_mathematics import SaeMathematics, without_gradients
from .steering_plan import SaePlan, SteeringPlan

WITH_ERROR = "with_error"
FeatureFunction = Callable[[SparseFeatures], Tensor]


@dataclass(frozen=True, eq=False)
class FeatureGraph:
    """What of a pass's latents is in the graph of its outputs.

    error: `detached` or `kept`; None where no latents are asked for.
    functions: SAE number -> what takes the place of its latents' values.
    """

    error: str | None = None
    functions: Mapping[int, FeatureFunction] = field(default_factory=dict)

    def works_at(self, number: int, reported: Collection[int]) -> bool:
        """Whether SAE `number` writes its latents into the pass."""
        return number in self.functions or (self.error is not None and number in reported)


@dataclass(frozen=True, eq=False)
class FeatureRemoval:
    """In place of a function of `edit_features`: what some latents write is taken out of the pass, as if they were
    set to 0. Only they are computed, and the gradient goes to what the SAE reads, never to the SAE.

    features: (m,) latents. tokens: (batch, seq) float, 1 where they are taken out.
    """

    features: Tensor
    tokens: Tensor

    def taken_out(self, sae: SaeMathematics, x: Tensor, hidden: Tensor) -> Tensor:
        """The hidden state (batch, seq, d_out) where the SAE writes, without them.

        Args:
            x: (batch, seq, d_in), what it reads, in its dtype.
        """
        frozen, columns = without_gradients(sae), self.features.to(x.device)
        normalized = frozen.normalize(x)
        latents = frozen.latents_of(normalized, columns) * self.tokens.to(x)[..., None]
        return _plus(hidden, -latents @ frozen.W_dec[columns], normalized)


def feature_graph(
    options: Any,
    reported: Collection[int],
    plan: SteeringPlan | None,
    configs: Sequence[SparseAutoencoderConfig],
) -> FeatureGraph | None:
    """What the options of a call ask for; None where that is nothing.

    Args:
        options: `SaeCallOptions`.
        reported: numbers of the SAEs whose features are reported.
        configs: of all SAEs.

    Raises:
        ValueError: the options do not go together, or a steering reads latents of the same SAE.
        TypeError: `edit_features` holds something else than functions.
    """
    asked, functions = options.features_require_grad, options.edit_features
    if not asked and functions is None:
        return None
    if asked and functions is not None:
        raise ValueError(
            "Give `features_require_grad` or `edit_features`: a function can make its values require a gradient "
            "itself. Received: both."
        )
    graph = (
        FeatureGraph(functions=_functions(functions, len(configs))) if functions is not None else _with_grad(options)
    )
    worked = [number for number in range(len(configs)) if graph.works_at(number, reported)]
    if several := [number for number in worked if configs[number].hooks_out]:
        if graph.error == "detached":
            raise ValueError(
                f"An SAE that writes to several places has no error to detach: each place is the sum over all layers "
                f"of the transcoder. Expected features_require_grad={WITH_ERROR!r}. Received: True, SAE {several[0]}."
            )
        if plan is not None and set(several) & set(plan.saes):
            raise ValueError(
                f"Steering of an SAE that writes to several places does not go together with its latents in the "
                f"graph. Expected no steering there. Received: an edit of SAE {several[0]}."
            )
    for number, own in (plan.saes if plan is not None else {}).items():
        if graph.works_at(number, reported) and not _is_constant(own):
            raise ValueError(
                f"A steering that reads latents of SAE {number} would act on the values that "
                f"{'are edited' if functions is not None else 'require a gradient'}. Expected no steering there, or "
                f"one that adds constants (op 'add' or 'direction' without `when`). Received: "
                f"{[str(row) for row in plan.rows if row][:1] if plan is not None else []}."
            )
    return graph


def _with_grad(options: Any) -> FeatureGraph:
    asked = options.features_require_grad
    if asked not in (True, WITH_ERROR):
        raise ValueError(
            f"`features_require_grad` must be True (the SAE's error is detached) or {WITH_ERROR!r}. "
            f"Received: features_require_grad={asked!r}."
        )
    if options.features is None and not options.output_features:
        raise ValueError(
            "`features_require_grad` needs features that are reported: `output_features=True` or `features=[...]`. "
            "Received: neither."
        )
    if options.pre_activations:
        raise ValueError(
            "`features_require_grad` is of activations, which are what is decoded. Received: pre_activations=True."
        )
    if not torch.is_grad_enabled():
        raise ValueError(
            "`features_require_grad` needs gradients: call the model outside of `torch.no_grad()` and "
            "`torch.inference_mode()`. Received: gradients are off."
        )
    return FeatureGraph("kept" if asked == WITH_ERROR else "detached")


def _functions(given: Any, n_saes: int) -> Mapping[int, FeatureFunction]:
    if not isinstance(given, Mapping):
        given = {0: given}
    for number, function in given.items():
        if not isinstance(number, int) or not 0 <= number < n_saes:
            raise ValueError(f"The model has {n_saes} SAE(s), numbered from 0. Received: edit_features of {number!r}.")
        if not callable(function) and not isinstance(function, FeatureRemoval):
            raise TypeError(
                f"`edit_features` must be a function from `SparseFeatures` to new values (batch, seq, width), or a "
                f"dict of them by SAE number. Received: {type(function).__name__}."
            )
    return dict(given)


def _is_constant(plan: SaePlan) -> bool:
    """Whether what a steering adds does not depend on the latents."""
    reads = len(plan.read) or plan.reweight is not None or plan.replace != "none" or plan.selects
    return not (reads or plan.erasures is not None or plan.gates is not None)


def place_in_graph(
    sae: SaeMathematics, x: Tensor, hidden: Tensor, columns: Tensor | None, graph: FeatureGraph, number: int
) -> tuple[SparseFeatures | Tensor, Tensor]:
    """The latents, and the hidden state that depends on them, to be run inside the SAE's `forward`.

    Args:
        x: (batch, seq, d_in), what the SAE reads, in its dtype.
        hidden: (batch, seq, d_out), what the base made where it writes.
        columns: (m,) latents that are reported, or None for all active ones.
    """
    function = graph.functions.get(number)
    if isinstance(function, FeatureRemoval):  # of no call that reports
        return x, function.taken_out(sae, x, hidden)
    normalized = sae.normalize(x)
    if columns is not None and function is None and graph.error == "kept":
        z = sae.latents_of(normalized, columns)
        v = _node(z)
        return v, _plus(hidden, (v - z) @ sae.W_dec[columns], normalized)
    code = sae.code_of(normalized)
    sparse = code.sparse()
    active = sparse.values.detach() != 0

    def decoded(values: Tensor) -> Tensor:
        return weighted_rows(sae.W_dec, sparse.indices, values, active)

    if function is not None:
        change = _new_values(function, sparse, number) - sparse.values
        reported = sparse if columns is None else code.dense()[..., columns]
        return reported, _plus(hidden, decoded(change), normalized)
    if columns is None:
        v = _node(sparse.values)
        features: SparseFeatures | Tensor = sparse._replace(values=v)
        if graph.error == "kept":
            return features, _plus(hidden, decoded(v - sparse.values), normalized)
        output = sae.output_of(decoded(v), normalized, x)
    else:
        z = code.dense()[..., columns]
        features = _node(z)
        output = sae.output_of(decoded(sparse.values) + (features - z) @ sae.W_dec[columns], normalized, x)
    output = output.to(hidden.device)
    return features, hidden.detach() + (output - output.detach()).to(hidden.dtype)


def weighted_rows(rows: Tensor, indices: Tensor, values: Tensor, active: Tensor) -> Tensor:
    """`sum_k values[..., k] * rows[indices[..., k]]` over the active places, (..., d); no (..., n) tensor is made.

    Args:
        rows: (n, d).
        indices, values, active: (..., k) int64, dtype of `rows`, bool. Places that are not active get no gradient.
    """
    counts = active.sum(-1).flatten()
    starts = counts.cumsum(0) - counts
    flat = F.embedding_bag(indices[active], rows, starts, per_sample_weights=values[active], mode="sum")
    return flat.view(*indices.shape[:-1], rows.shape[-1])


def _node(values: Tensor) -> Tensor:
    """The same values as a tensor of its own in the graph, or a leaf where nothing before it has a gradient."""
    return values.view_as(values) if values.requires_grad else values.detach().requires_grad_()


def _plus(hidden: Tensor, change: Tensor, normalized: Normalized) -> Tensor:
    if normalized.scale is not None:
        change = change * normalized.scale
    return hidden + change.to(device=hidden.device, dtype=hidden.dtype)


def _new_values(function: FeatureFunction, features: SparseFeatures, number: int) -> Tensor:
    values = function(features)
    if not isinstance(values, Tensor) or values.shape != features.values.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"The function that edits features of SAE {number} must return their new values, shape "
            f"{tuple(features.values.shape)}. Received: {got}."
        )
    return values.to(features.values)
