"""Reading features of texts, without steering: how strongly one answers, and which answer most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .outputs import Detection, TopFeatures

POOLINGS = ("mean", "max", "last")


@torch.no_grad()
def detect(
    model: Any, inputs: Any, feature: int | str, sae: int, pooling: str, pre_activations: bool, skip_first: int
) -> Detection:
    """See `SaePreTrainedModel.detect`."""
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be 'mean', 'max' or 'last'. Received: pooling={pooling!r}.")
    inputs, counted = _inputs_and_counted(model, inputs, skip_first)
    output = model(
        **inputs, features={sae: [feature]}, pre_activations=pre_activations, steering=False, stop_at_last_sae=True
    )
    scores = output.sae_features[sae][..., 0]
    counted = _of_tokens(counted, scores, sae)
    return pooled(scores, counted, pooling)


def pooled(scores: Tensor, counted: Tensor, pooling: str) -> Detection:
    """Scores of texts from those of their tokens.

    Args:
        scores: (batch, seq).
        counted: (batch, seq) bool, which of them count.
        pooling: `mean`, `max` or `last`.
    """
    if pooling == "mean":
        found = scores.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1)  # a NaN there is nobody's
    elif pooling == "max":
        found = scores.masked_fill(~counted, -torch.inf).amax(-1)
    else:
        last = scores.shape[1] - 1 - counted.flip(-1).int().argmax(-1)
        found = scores.gather(-1, last[:, None])[:, 0]
    return Detection(scores.masked_fill(~counted, 0.0), found.masked_fill(~counted.any(-1), torch.nan))


@torch.no_grad()
def top_features(model: Any, inputs: Any, k: int, sae: int, skip_first: int) -> TopFeatures:
    """See `SaePreTrainedModel.top_features`."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`k` must be an integer of 1 or more. Received: k={k!r}.")
    inputs, counted = _inputs_and_counted(model, inputs, skip_first)
    active = model(**inputs, features={sae: None}, steering=False, stop_at_last_sae=True).sae_features[sae]
    counted = _of_tokens(counted, active.values[..., 0], sae)
    k = min(k, active.values.shape[-1])
    _, places = active.values.abs().topk(k, dim=-1)  # `abs_topk` has negative latents
    values = active.values.gather(-1, places).masked_fill(~counted[..., None], 0.0)
    features = active.indices.gather(-1, places).masked_fill(values == 0, -1)
    return TopFeatures(features, values, counted)


def _inputs_and_counted(model: Any, inputs: Any, skip_first: int) -> tuple[dict[str, Any], Tensor]:
    """What the forward pass is called with, and which positions count, (batch, seq) bool."""
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    if model.device.type != "meta":  # an offloaded model is nowhere; its hooks move what it is given
        inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    inputs = model.with_positions(inputs)
    text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if text is None or not text.shape[1]:
        raise ValueError("Every text needs at least one token. Received: texts of 0 tokens.")
    mask = inputs.get("attention_mask")
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
    return inputs, mask & (mask.cumsum(-1) > skip_first)


def _of_tokens(counted: Tensor, scores: Tensor, sae: int) -> Tensor:
    if scores.shape != counted.shape:
        raise ValueError(
            f"SAE {sae} stands where there are {scores.shape[1]} positions, which are not the text's tokens (an "
            f"image may be put before them). Expected {counted.shape[1]}. Read `features=` of a forward pass there."
        )
    return counted.to(scores.device)
