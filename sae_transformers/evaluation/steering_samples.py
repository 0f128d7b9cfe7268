"""Continuations of the same prompts with single features steered, by strength: what a reader looks at first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..modeling import FeatureEdit, Steering
from .continuations import chat_prompts, continue_prompts
from .settings import GenerationSettings


def steering_samples(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    features: Sequence[int],
    strengths: Sequence[float],
    *,
    op: str = "direction",
    unit: str = "norm",
    sae: int = 0,
    chat: bool = True,
    new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int = 0,
    rows_at_once: int = 32,
    report: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Continue each prompt once without steering, and once for each feature and strength.

    All rows of a prompt see the same random numbers, so that they differ by their steering only.

    Args:
        model: a `SaeForCausalLM`; its default steering is not used.
        tokenizer: of the base.
        strengths: values of the edit, other than 0.
        op, unit, sae: see `FeatureEdit`.
        chat: put prompts into the tokenizer's chat template, if it has one.
        new_tokens, temperature, seed, rows_at_once, report: see `continue_prompts`.

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
    settings: list[tuple[int | None, float]] = [(None, 0.0), *((f, float(v)) for f in features for v in strengths)]
    asked = chat_prompts(tokenizer, prompts) if chat else list(prompts)
    plans = [
        None if feature is None else Steering([FeatureEdit(sae, feature, op, strength, unit)])
        for feature, strength in settings
    ]
    found = continue_prompts(
        model, tokenizer, asked * len(settings), [plan for plan in plans for _ in prompts],
        GenerationSettings(new_tokens, temperature, batch_size=rows_at_once, seed=seed),
        draws=[*range(len(prompts))] * len(settings), report=report,
    )  # fmt: skip
    labelled = [(*setting, prompt) for setting in settings for prompt in prompts]
    perplexities = found.perplexities.tolist()
    return [
        {
            "feature": feature, "strength": strength, "op": op if strength else "", "unit": unit if strength else "",
            "prompt": prompt, "text": text, "perplexity": perplexity,
        }
        for (feature, strength, prompt), text, perplexity in zip(labelled, found.texts, perplexities, strict=True)
    ]  # fmt: skip
