"""The methods that a steering suite compares: a latent or a steering, DiffMean, an instruction before the prompt.

    model, methods, facts = steering_methods(model, tokenizer, prompts, feature=1311, labelled=(with_it, without))
    result = steering_suite(model, tokenizer, prompts, methods, scorer, facts=facts)

The command line's suite `steering` calls these two, one after the other. The model that comes back holds DiffMean's
direction as one more SAE; use it in place of the one that was given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..evaluation.concept_steering import SteeringMethod
from ..evaluation.steering_methods import STRENGTHS, latent_method, prompt_methods, scaled_method
from ..modeling import Steering
from .diffmean import fit_diffmean
from .state_vectors import direction_sae

FACTORS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # of a given steering


def steering_methods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    feature: int | str | None = None,
    steering: Steering | None = None,
    labelled: tuple[Sequence[str], Sequence[str]] | None = None,
    more: str = "",
    less: str = "",
    sae: int = 0,
    op: str = "direction",
    strengths: Sequence[float] = STRENGTHS,
    factors: Sequence[float] = FACTORS,
    positions: Any = "all",
    max_length: int = 128,
    batch_size: int = 16,
) -> tuple[Any, dict[str, SteeringMethod | Sequence[SteeringMethod]], dict[str, Any]]:
    """Methods by name for `steering_suite`, as far as what they need is given.

    Args:
        model: a `SaeForCausalLM` in eval mode; with `labelled` it must not be used afterwards.
        tokenizer: of the base.
        prompts: of the suite.
        feature: a latent or concept of SAE `sae`: method `latent FEATURE`.
        steering: one that is scaled by `factors`: method `steering`.
        labelled: texts with the concept and texts without: method `diffmean`, their difference of means at the place
            where SAE `sae` writes, with `strengths` in hidden norms, as the latent has.
        more, less: instructions before each prompt: method `prompt`.
        op, strengths, positions: of `latent_method`; DiffMean is always added, op `direction`.
        max_length: tokens of a labelled text that are read.
        batch_size: labelled texts of a pass.

    Returns:
        model: to be measured. methods: in the order above. facts: for the suite's record.

    Raises:
        ValueError: there is nothing to compare, texts of one kind only, or a feature that the model does not have.
    """
    methods: dict[str, SteeringMethod | Sequence[SteeringMethod]] = {}
    facts: dict[str, Any] = {}
    if feature is not None:
        model.config.sae_configs[sae].resolve_feature(feature)
        unit = "norm" if op in ("direction", "set", "at_least", "at_most", "add") else "absolute"
        methods[f"latent {feature}"] = latent_method(
            feature, strengths, sae=sae, op=op, unit=unit, positions=positions
        )
    if steering is not None:
        methods["steering"] = scaled_method(steering, factors)
    if labelled is not None:
        direction = diffmean_direction(
            model, tokenizer, *labelled, sae=sae, max_length=max_length, batch_size=batch_size
        )
        model, number = with_direction(model, direction, sae=sae)
        found = latent_method(0, strengths, sae=number, positions=positions)
        methods["diffmean"] = replace(found, baseline=True)
        fitted: dict[str, Any] = {
            "texts_with": len(labelled[0]),
            "texts_without": len(labelled[1]),
            "texts_sha256": hashlib.sha256(json.dumps([list(part) for part in labelled]).encode()).hexdigest(),
            "max_length": max_length,
        }
        if feature is not None:
            own = model.saes[sae].W_dec[model.config.sae_configs[sae].resolve_feature(feature)]
            cosine = torch.cosine_similarity(own.detach().float().cpu(), direction, dim=0)
            fitted["cosine_with_latent"] = round(float(cosine), 6)
        facts["diffmean"] = fitted
    if more.strip() or less.strip():
        methods["prompt"] = prompt_methods(prompts, more, less)
        facts["instructions"] = {"more": more, "less": less}
    if not methods:
        raise ValueError(
            "Expected a feature, a steering, labelled texts or an instruction to compare. Received: none of them."
        )
    return model, methods, facts


@torch.no_grad()
def diffmean_direction(
    model: Any,
    tokenizer: Any,
    positives: Sequence[str],
    negatives: Sequence[str],
    *,
    sae: int = 0,
    max_length: int = 128,
    batch_size: int = 16,
) -> Tensor:
    """Difference of the mean hidden states of texts with and without a concept, where an SAE of the model stands.

    A text counts by the mean over its tokens but the first, so that long texts weigh as much as short ones. See
    `fit_diffmean`.

    Returns:
        (d,) float32 on the CPU, not normalised.

    Raises:
        ValueError: no text of one kind, one of a single token, or an SAE that writes elsewhere than it reads.
    """
    config = model.config.sae_configs[sae]
    if config.read_at != config.write_at:
        raise ValueError(
            f"DiffMean is fitted where the SAE reads and added where it writes. "
            f"Received: an SAE that reads {config.read_at} and writes {config.write_at}."
        )
    texts = [*positives, *negatives]
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    if not len(positives) or not len(negatives) or any(len(row) < 2 for row in rows):
        raise ValueError(
            f"Expected texts with and without the concept, of two tokens or more. Received: {len(positives)} with, "
            f"{len(negatives)} without, {sum(len(row) < 2 for row in rows)} shorter ones."
        )
    means = torch.empty(len(rows), config.d_in)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        width = len(rows[members[0]])
        ids = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in members], device=model.device)
        lengths = torch.tensor([len(rows[i]) for i in members], device=model.device)
        columns = torch.arange(width, device=model.device)
        mask = (columns < lengths[:, None]).long()
        out = model(ids, attention_mask=mask, steering=False, output_sae_inputs=True, stop_at_last_sae=True)
        kept = ((columns > 0) & (mask > 0)).float()[..., None]  # (batch, width, 1)
        means[members] = ((out.sae_inputs[sae].float() * kept).sum(1) / kept.sum(1)).cpu()
    labels = torch.tensor([1] * len(positives) + [0] * len(negatives))
    return fit_diffmean(means, labels)


def with_direction(model: Any, direction: Tensor, *, sae: int = 0) -> tuple[Any, int]:
    """The model with a direction as one more SAE, to be steered along with op `direction`; and the number of that.

    Args:
        model: a `SaeForCausalLM`; it must not be used afterwards, since the new one holds its base and its SAEs.
        direction: (d_out,), brought to norm 1.
        sae: number of the SAE at whose place it is added.
    """
    saes = [*model.saes]
    added = direction_sae(direction[None], model.config.sae_configs[sae]).to(model.saes[sae].W_dec.device)
    default = model.steering
    made = type(model).from_base(model.unwrap(), saes=[*saes, added], steering=default or None, force=True)
    return made.eval(), len(saes)
