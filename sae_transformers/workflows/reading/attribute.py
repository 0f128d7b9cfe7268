"""Which features, at which tokens, made a model say what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...evaluation.attribution.effects import (
    ABLATION,
    GRADIENT,
    INTEGRATED,
    METHODS,
    Effects,
    ScaledLatents,
    ablation_effects,
    gradient_effects,
    integrated_gradients,
)  # fmt: skip
from ...evaluation.attribution.faithfulness import Agreement, agreement, curve_points, faithfulness_curve
from ...evaluation.attribution.targets import Target, TargetLike, read_target
from ...latents.context import reading_length
from ...latents.text_input import tokenized
from ...latents.text_latents import feature_names, sae_of
from ...modeling import SaeForSequenceClassification
from ...modeling.modeling_sae import SaePreTrainedModel
from ..results import Count, Progress
from ..settings.detect import AttributionSettings
from .attribution_result import AttributionResult


def attribute(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Any,
    target: TargetLike = None,
    method: str = GRADIENT,
    *,
    position: int | str | None = None,
    settings: AttributionSettings | None = None,
    progress: Progress | None = None,
) -> AttributionResult:
    """The effect of every active feature at every token on one number that the model gives out.

    The model runs unsteered. What the SAEs do not reconstruct stays in its stream, so that effects are those on the
    model's own output. `agreement` of the result says how far they go along with ablation, and `curve` what the
    strongest pairs of feature and token are enough for.

    Args:
        model: a language model or classifier with SAEs; PEFT's adapters around it or in it count.
        text: one text, or its token ids.
        target: the logit of a token (its text or id) or of a label; the difference of two of them, as in ("Paris",
            "London"); or a function from the model's output of n rows to (n,) numbers. By default the most likely
            token or label.
        method: `gradient x latent` (one forward and backward pass), `integrated gradients` or `ablation`; see
            `evaluation.attribution.effects`.
        position: of the token whose next token is meant, from the end where negative; by default the last. A string
            is a token of the text: why it is said there.
        progress: called with (rows done, rows) of ablations, lines and curves.

    Raises:
        ValueError: not one text, no active feature, a target that is no single token or label, a position or an SAE
            that is not there, a model without SAEs or in training mode, or a word that is no method.
        TypeError: a target of another kind.
    """
    settings = settings or AttributionSettings()
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}. Received: method={method!r}.")
    model = _within_adapters(model)
    if model.training:
        raise ValueError(
            "Dropout would make the effects random. Expected a model in eval mode, `model.eval()`. Received: one in "
            "training mode."
        )
    numbers = _numbers(model, settings.sae_numbers)
    found = tokenized(tokenizer, text, max_length=reading_length(model, settings.max_length, 1024))
    if len(found.texts) != 1:
        raise ValueError(f"Expected one text. Received: {len(found.texts)}.")
    if found.cut and not isinstance(model, SaeForSequenceClassification):
        raise ValueError(
            f"The text is longer than `max_length`, so its last token would not be read. Received: a text of more "
            f"than {len(found.ids[0])} tokens."
        )
    aim = read_target(model, tokenizer, found.ids[0], target, position)
    effects = gradient_effects(model, aim, numbers, skip_first=settings.skip_first)
    if not len(effects.effect):
        raise ValueError(
            f"No feature is active after the first {settings.skip_first} of {len(aim.ids)} tokens. Try a longer text "
            f"or a smaller `skip_first`."
        )
    effects, checked, curve = _measured(model, aim, effects, method, settings, progress)
    names = {}
    for number in numbers:
        active = set(effects.pairs.feature[effects.pairs.sae == number].tolist())
        named = feature_names(model.saes[number], active)
        names |= {(number, feature): name for feature, name in named.items()}
    tokens = [str(tokenizer.decode([token])) for token in aim.ids]
    return AttributionResult(
        found.texts[0],
        tokens,
        aim.name,
        method,
        effects,
        names,
        checked,
        curve,
        replace(settings, sae_numbers=numbers),
    )


def _within_adapters(model: nn.Module) -> Any:
    """The model that PEFT's wrapper is around: adapters of weights act inside it.

    Raises:
        ValueError: adapters that act before it.
    """
    wrapper: Any = model
    if not hasattr(wrapper, "get_base_model"):
        return model
    if getattr(wrapper.active_peft_config, "is_prompt_learning", False):
        raise ValueError(
            "A learnt prompt stands before the text, so that features would be told at wrong tokens. Expected a LoRA "
            f"or another adapter of weights. Received: {wrapper.active_peft_config.peft_type.value}."
        )
    return wrapper.get_base_model()


def _numbers(model: SaePreTrainedModel, asked: Sequence[int]) -> tuple[int, ...]:
    """The SAEs that are attributed.

    Raises:
        ValueError: there are none, or none of that number.
    """
    if not isinstance(model, SaePreTrainedModel) or not len(model.saes):
        raise ValueError(
            "Attribution is to the features of SAEs: `attach` gives a base some. Received: a model without SAEs."
        )
    numbers = tuple(sorted(set(asked))) or tuple(range(len(model.saes)))
    for number in numbers:
        sae_of(model, number)
    return numbers


def _measured(
    model: SaePreTrainedModel,
    target: Target,
    first: Effects,
    method: str,
    settings: AttributionSettings,
    progress: Progress | None,
) -> tuple[Effects, Agreement | None, Any]:
    """Effects by the method, how another method goes along with them, and the curve.

    Args:
        first: gradient x latent.
    """
    n_pairs = len(first.effect)
    chosen = first.effect.abs().argsort(descending=True, stable=True)[: settings.max_pairs]
    checked = _sample(first.effect, settings) if method != ABLATION else chosen
    points = len(curve_points(min(n_pairs, settings.max_pairs) if method == ABLATION else n_pairs))
    rows = 2 * points * (1 + settings.draws) if settings.curve else 0
    rows += len(checked) + (settings.steps * len(set(first.pairs.sae.tolist())) if method == INTEGRATED else 0)
    count, tokens = Count(progress, rows), settings.tokens_per_batch
    scaled = ScaledLatents(model, target, first.pairs, skip_first=settings.skip_first)
    effects, against = first, ABLATION
    if method == INTEGRATED:
        made = integrated_gradients(scaled, steps=settings.steps, tokens_per_batch=tokens, report=count)
        effects = first._replace(effect=made)
    others = ablation_effects(scaled, checked, tokens_per_batch=tokens, report=count)
    if method == ABLATION:
        compared, against = agreement(others, first.effect[checked], GRADIENT), GRADIENT
        effects = Effects(first.pairs.take(checked), others, first.value)
        scaled = ScaledLatents(model, target, effects.pairs, skip_first=settings.skip_first)
    else:
        compared = agreement(effects.effect[checked], others, against) if len(checked) else None
    curve = None
    if settings.curve:
        curve = faithfulness_curve(
            scaled, effects.effect, draws=settings.draws, seed=settings.seed, tokens_per_batch=tokens, report=count
        )
    return effects, compared, curve


def _sample(effect: Tensor, settings: AttributionSettings) -> Tensor:
    """Numbers of the pairs that are ablated to check: half the strongest, half at random from the others."""
    order = effect.abs().argsort(descending=True, stable=True)
    strongest = min(len(order), (settings.check + 1) // 2)
    rest = order[strongest:]
    picked = torch.randperm(len(rest), generator=torch.Generator().manual_seed(settings.seed))
    return torch.cat([order[:strongest], rest[picked[: settings.check - strongest]]])
