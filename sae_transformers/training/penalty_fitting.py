"""Margin and weight of a `FeaturePenalty`, from texts with a trait and texts as they should be.

    fitted = fit_penalty(model, tokenizer, texts, labels, FeaturePenalty("toxic", sae=1))
    model.feature_penalties = [fitted.penalty]

The margin is where nine of ten good tokens lie: one at their median charges half of all good tokens, and a model pays
for that with what it writes well. The weight is told in nats, the unit of the language model's own loss, so that
penalties on different SAEs compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..latents.context import reading_length
from ..latents.settings import ReadingSettings
from ..latents.text_input import tokenized
from ..latents.text_latents import batches_of, sae_of
from ..modeling import FeaturePenalty
from ..modeling.feature_penalty import BoundPenalty, bind_penalties, penalty_from
from ..modeling.modeling_sae import SaePreTrainedModel
from ..modeling.penalty_costs import penalised_values
from .steering.feature_search import checked_labels


@dataclass(frozen=True)
class FittedPenalty:
    """A penalty and what it costs the texts that it was fitted on.

    penalty: to be put among a model's `feature_penalties`.
    trait_cost, good_cost: nats a token of the texts with the trait and of the others; they differ by `nats`.
    n_trait, n_good: their tokens. n_cut: texts that were cut.
    """

    penalty: FeaturePenalty
    trait_cost: float
    good_cost: float
    n_trait: int
    n_good: int
    n_cut: int


def fit_penalty(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    labels: Sequence[int] | Tensor,
    penalty: FeaturePenalty | int | str,
    *,
    quantile: float = 0.9,
    nats: float = 1.0,
    reading: ReadingSettings | None = None,
) -> FittedPenalty:
    """Choose each feature's margin and the penalty's weight so that texts with a trait cost more than good ones.

    Values are read at all tokens of the texts but the first ones (the penalty's `skip_first`), whatever `over` says.
    Read what the model will be trained on: prompts and answers in its template.

    Args:
        texts: a list of strings or whatever else holds texts, or token ids.
        labels: of each text 1 with the trait, 0 without, (n,).
        penalty: its features and what is read of them; a feature alone stands for `FeaturePenalty(feature)`. `margin`
            and `weight` are replaced, and the features' own weights are divided by the standard deviations of their
            values in all texts, so that each counts alike. With goal="above" the trait is what is wanted.
        quantile: share of the good texts' tokens that cost nothing (goal="above": of the texts with the trait).
        nats: by how much a token of one kind costs more than one of the other, on average.
        reading: how long texts may be, and tokens of a forward pass; its own `skip_first` is not used.

    Raises:
        TypeError: `penalty` or `texts` is something else.
        ValueError: a goal without a margin; a feature that is not there, has one value in all texts, or costs good
            texts as much; labels that do not fit; a quantile or nats that make no sense.
    """
    wanted = FeaturePenalty(penalty) if isinstance(penalty, (int, str)) else penalty_from(penalty)
    reading = reading or ReadingSettings()
    _check(wanted, quantile, nats)
    [bound] = bind_penalties([wanted], model.config.sae_configs)
    ids, n_cut = tokenized(tokenizer, texts, max_length=reading_length(model, reading.max_length, 256))[1:]
    truth = checked_labels(torch.as_tensor(labels), len(ids)).bool()
    values, of_text = _values(model, bound, ids, reading.tokens_per_batch)
    has_trait = truth[of_text]
    if values.isnan().any() or not has_trait.any() or has_trait.all():
        raise ValueError(
            f"Expected numbers from texts of both kinds, of more than {wanted.skip_first} token(s). Received: "
            f"{int(has_trait.sum())} tokens with the trait, {int((~has_trait).sum())} without, "
            f"{int(values.isnan().sum())} of their values NaN."
        )
    below = wanted.goal == "below"
    spread = values.std(0)
    if (spread == 0).any():
        unmoved = bound.features[int((spread == 0).nonzero()[0])]
        raise ValueError(f"Feature {unmoved} has the same {wanted.of} at every token of these texts: choose another.")
    free = values[~has_trait] if below else -values[has_trait]  # where a share of tokens is to cost nothing
    margins = free.kthvalue(max(1, round(quantile * len(free))), dim=0).values * (1 if below else -1)
    scales = torch.tensor(bound.weights, dtype=torch.float64) / spread
    excess = torch.relu(values - margins if below else margins - values) ** wanted.power
    costs = excess @ (scales / scales.sum())
    trait, good = float(costs[has_trait].mean()), float(costs[~has_trait].mean())
    gap = trait - good if below else good - trait
    if gap <= 0:
        moves, side = ("rise", "with") if below else ("fall", "without")
        raise ValueError(
            f"Expected features that {moves} above what is usual {side} the trait. Received: a cost of {trait:.4g} a "
            f"token with it, {good:.4g} without, for {wanted}."
        )
    weight = nats / gap
    features = {feature: float(scale) for (feature, _), scale in zip(wanted.features, scales, strict=True)}
    found = replace(wanted, features=features, weight=weight, margin=margins.tolist())
    n_trait = int(has_trait.sum())
    return FittedPenalty(found, weight * trait, weight * good, n_trait, len(values) - n_trait, n_cut)


def _check(penalty: FeaturePenalty, quantile: Any, nats: Any) -> None:
    if penalty.goal not in ("below", "above"):
        raise ValueError(f"Only goal='below' and 'above' have a margin. Received: goal={penalty.goal!r}.")
    for name, value, high in (("quantile", quantile, 1.0), ("nats", nats, float("inf"))):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < high:
            limits = "between 0 and 1" if name == "quantile" else "a number above 0"
            raise ValueError(f"`{name}` must be {limits}. Received: {name}={value!r}.")


@torch.no_grad()
def _values(
    model: SaePreTrainedModel, bound: BoundPenalty, ids: Sequence[Sequence[int]], tokens_at_once: int
) -> tuple[Tensor, Tensor]:
    """What is penalised at each token that counts, (n, m) float64 on the CPU, and the token's text, (n,) int64."""
    penalty, values, of_text = bound.penalty, [], []
    sae = sae_of(model, penalty.sae)
    features = torch.tensor(bound.features, device=sae.device)
    for batch in batches_of(ids, tokens_at_once=tokens_at_once):
        hidden = model(
            input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device), steering=False,
            output_sae_inputs=True, stop_at_last_sae=True,
        ).sae_inputs[penalty.sae]  # fmt: skip
        counted = batch.mask.bool() & (batch.mask.cumsum(-1) > penalty.skip_first)
        states = hidden[counted.to(hidden.device)].to(sae.device, sae.dtype)
        values.append(penalised_values(sae, states, features, penalty.of).double().cpu())
        of_text.append(batch.texts[counted.nonzero()[:, 0]])
    return torch.cat(values), torch.cat(of_text)
