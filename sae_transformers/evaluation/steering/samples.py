"""Continuations of the same prompts with single features steered, by strength: what a reader looks at first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...modeling import FeatureEdit, Steering
from ...modeling.modeling_sae import SaePreTrainedModel
from ..generation.continuations import chat_prompts, continue_prompts
from ..settings import GenerationSettings

DIRECTION = FeatureEdit(0, 0, "direction", 1.0, "norm")


def steering_samples(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    features: Sequence[int],
    strengths: Sequence[float],
    settings: GenerationSettings | None = None,
    *,
    edit: FeatureEdit = DIRECTION,
    report: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Continue each prompt once without steering, and once for each feature and strength.

    All rows of a prompt see the same random numbers, so that they differ by their steering only.

    Args:
        model: a `SaeForCausalLM`; its default steering is not used.
        tokenizer: of the base.
        strengths: values of the edit, other than 0.
        settings: how prompts are continued.
        edit: its SAE, op and unit count.
        report: see `continue_prompts`.

    Returns:
        Rows of JSON: `feature` (None and strength 0 for unsteered ones), `strength`, `op`, `unit`, `prompt`, `text`,
        and `perplexity` under the unsteered model.

    Raises:
        ValueError: nothing to steer, a strength of 0, or what `continue_prompts` refuses.
    """
    if not features or not strengths or 0 in strengths:
        raise ValueError(
            f"Expected features, and strengths other than 0; unsteered rows come by themselves. "
            f"Received: features={list(features)!r}, strengths={list(strengths)!r}."
        )
    settings = settings or GenerationSettings()
    rows: list[tuple[int | None, float]] = [(None, 0.0), *((f, float(v)) for f in features for v in strengths)]
    asked = chat_prompts(tokenizer, prompts) if settings.chat else list(prompts)
    plans = [
        None if feature is None else Steering([replace(edit, feature=feature, value=strength)])
        for feature, strength in rows
    ]
    found = continue_prompts(
        model, tokenizer, asked * len(rows), [plan for plan in plans for _ in prompts],
        settings, draws=[*range(len(prompts))] * len(rows), report=report,
    )  # fmt: skip
    labelled = [(*row, prompt) for row in rows for prompt in prompts]
    perplexities = found.perplexities.tolist()
    return [
        {
            "feature": feature, "strength": strength,
            "op": edit.op if strength else "", "unit": edit.unit if strength else "",
            "prompt": prompt, "text": text, "perplexity": perplexity,
        }
        for (feature, strength, prompt), text, perplexity in zip(labelled, found.texts, perplexities, strict=True)
    ]  # fmt: skip
