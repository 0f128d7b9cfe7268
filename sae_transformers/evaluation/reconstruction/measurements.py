"""What SAEs keep of texts, and what the model loses with them, as measurements with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...latents.text_latents import TextBatch
from ..intervals import measured
from ..journal import Watch
from ..method_ids import MethodId, baseline_method
from ..results import Measurement, with_methods
from .meter import ReconstructionMeter
from .metrics import ReplacedLosses

LATENTS_AT_ONCE = 1 << 24  # of a forward pass of an SAE whose latents are dense: 64 MiB of float32


def meter_measurements(meter: ReconstructionMeter, method: MethodId, counts: Tensor) -> list[Measurement]:
    """Of one SAE. counts: (resamples, n_texts), of `resample_counts`.

    Raises:
        ValueError: the hidden states do not vary.
    """
    n, tokens = len(meter.sums), int(meter.sums[:, 0].sum())
    whole, drawn = meter.figures(torch.ones(1, n, dtype=torch.float64)), meter.figures(counts)
    if bool(whole["fvu"].isnan()):
        raise ValueError(
            f"Hidden states must vary from token to token. Received: {tokens} at {method.label} that do not."
        )
    better = {"fvu": "lower", "normalized_mse": "lower", "l0": ""}
    found = [
        measured(metric, value, method.label, drawn[metric], n=tokens, better=better.get(metric, "higher"))
        for metric, value in whole.items()
    ]
    dead = Measurement("dead_share", meter.dead_share(), method.label, n=len(meter.active_tokens), better="lower")
    return with_methods([*found, dead], [method])


def read_all(
    model: Any, saes: Sequence[int], batches: Sequence[TextBatch], n: int, skip_first: int, watch: Watch
) -> dict[int, ReconstructionMeter]:
    """Number of each SAE -> its sums over all texts."""
    meters = {number: ReconstructionMeter(model.saes[number].config.d_sae, n) for number in saes}
    for batch in batches:
        found = watch.keep(
            {"reconstructed": batch.ids.tolist(), "texts": batch.texts.tolist(), "skip_first": skip_first},
            lambda batch=batch: _sums(model, batch, meters, skip_first),
        )
        for number, meter in meters.items():
            meter.add({name: found[f"{number}.{name}"] for name in meter.NAMES}, batch.texts)
        watch.done(len(batch.texts))
    return meters


def _sums(
    model: Any, batch: TextBatch, meters: Mapping[int, ReconstructionMeter], skip_first: int
) -> dict[str, Tensor]:
    """What `ReconstructionMeter.tensors` gives of a batch alone, each after the number of its SAE."""
    inputs = model(
        input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device), steering=False,
        output_sae_inputs=True, stop_at_last_sae=True,
    ).sae_inputs  # fmt: skip
    kept = batch.mask.bool() & (batch.mask.cumsum(-1) > skip_first)
    text = kept.nonzero()[:, 0]
    found = {}
    for number, meter in meters.items():
        alone = ReconstructionMeter(len(meter.active_tokens), len(batch.texts), meter.origin)
        sae, states = model.saes[number], inputs[number][kept.to(inputs[number].device)]
        at_once = max(1, LATENTS_AT_ONCE // sae.config.d_sae)
        for members, hidden in zip(text.split(at_once), states.split(at_once), strict=True):
            out = sae(hidden.to(sae.device, sae.dtype))
            alone.update(hidden, out.reconstruction, out.latents, members)
        found |= {f"{number}.{name}": tensor for name, tensor in alone.tensors().items()}
    return found


def loss_measurements(
    losses: ReplacedLosses, method: MethodId, counts: Tensor, *, with_base: bool
) -> list[Measurement]:
    """Of one SAE, or all: cross-entropies, divergences and what is recovered. counts: as the losses are ordered."""
    tokens = int(losses.tokens.sum())
    ones = torch.ones(1, len(losses.tokens), dtype=torch.float64)
    methods = {
        "base": baseline_method("none", "none"),
        "sae": method,
        "zero": replace(method, kind="zeros", label=f"zeros at {method.label}", baseline=True),
        "mean": replace(method, kind="mean", label=f"mean at {method.label}", baseline=True),
    }

    def rates(sums: Tensor, counts: Tensor) -> Tensor:
        return (counts @ sums) / (counts @ losses.tokens)

    found = []
    for metric, kinds in (("ce_nats", losses.ce), ("kl_nats", losses.kl)):
        for kind, sums in kinds.items():
            if kind != "base" or with_base:
                value, drawn, label = rates(sums, ones), rates(sums, counts), methods[kind].label
                found.append(measured(metric, value, label, drawn, n=tokens, better="lower"))
    for metric, worst in (("recovered", "zero"), ("recovered_from_mean", "mean")):

        def share(counts: Tensor, worst: str = worst) -> Tensor:
            base, sae, bad = (counts @ losses.ce[kind] for kind in ("base", "sae", worst))
            return torch.where(bad != base, (bad - sae) / (bad - base), torch.nan)

        note = "" if bool(share(ones).isfinite()) else "replacing the state changes no prediction"
        value, drawn = share(ones), share(counts)
        found.append(measured(metric, value, method.label, drawn, n=tokens, better="higher", note=note))
    return with_methods(found, methods.values())
