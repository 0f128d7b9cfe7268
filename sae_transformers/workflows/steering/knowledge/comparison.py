"""Measure the steering of both sides on the test questions, beside other methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....evaluation.generation.short_answers import Contrast
from ....evaluation.knowledge import knowledge_metrics
from ....latents.vector_saes import constant_sae, direction_sae
from ....modeling import FeatureEdit, SaeForCausalLM, Steering
from ...settings.select_knowledge import SIDES
from .answers import AskedModel, MaybeSteering, share

STYLE_OF = {"context": "sub_sub", "memory": "sub_org"}  # demonstrations that show the behaviour
CAD_WEIGHT = {"context": 0.6, "memory": -0.8}  # SpARE, appendix C
INSTRUCTIONS = {
    "context": "Answer each question from its context alone, even where the context is wrong.",
    "memory": "The contexts may be wrong. Answer each question from what you know, not from its context.",
}


def prompts_per_question(baselines: Sequence[str]) -> int:
    """How many prompts `compare_methods` reads for a question."""
    return 6 + 2 * sum(name != "vectors" for name in baselines) + 4 * ("vectors" in baselines)


def compare_methods(
    asked: AskedModel,
    rows: Sequence[int],
    seed: int,
    steering: Mapping[str, Steering],
    means: tuple[Tensor, Tensor],
) -> dict[str, dict[str, float]]:
    """Method -> metrics, with one choice of demonstrations.

    Args:
        rows: of the questions to measure on.
        seed: of the demonstrations.
        steering: towards each side.
        means: (d_in,) each, the mean last hidden state of both behaviours at the first SAE.
    """
    baselines = asked.settings.baselines
    prompts = asked.prompts(rows, seed)
    before = asked.behaviours(rows, asked.answers(prompts))
    methods: dict[str, dict[str, float]] = {}

    def add(method: str, model: AskedModel, texts: list[str], **options: Any) -> None:
        after = asked.behaviours(rows, model.answers(texts, **options))
        methods[method] = {**knowledge_metrics(after, before), "prefers_memory": math.nan}

    steered: dict[str, MaybeSteering] = {"none": False, **{f"SpARE, to {side}": steering[side] for side in SIDES}}
    for method, edits in steered.items():
        add(method, asked, prompts, steering=edits)
        methods[method]["prefers_memory"] = share(asked.prefers_memory(rows, prompts, edits))
    for side in SIDES:
        if "demonstrations" in baselines:
            add(f"demonstrations, to {side}", asked, asked.prompts(rows, seed, STYLE_OF[side]))
        if "instruction" in baselines:
            add(f"instruction, to {side}", asked, asked.prompts(rows, seed, instruction=INSTRUCTIONS[side]))
        if "cad" in baselines:
            closed = asked.prompts(rows, seed, closed=True)
            add(f"CAD, to {side}", asked, prompts, contrast=Contrast(closed, CAD_WEIGHT[side]))
    if "vectors" in baselines:
        model, vectors = _vector_model(asked.model, means)
        try:
            with_vectors = asked.with_model(model)
            for method, edits in vectors.items():
                add(method, with_vectors, prompts, steering=edits)
        finally:
            model.unwrap()
    return methods


def _vector_model(model: SaeForCausalLM, means: tuple[Tensor, Tensor]) -> tuple[SaeForCausalLM, dict[str, Steering]]:
    """A model with activation addition and task vectors at the first SAE's place, and the steering of each."""
    place, (context, memory) = model.saes[0].config, means
    apart = context - memory
    saes = [direction_sae(apart[None], place), constant_sae(context, place), constant_sae(memory, place)]
    steering = {}
    for number, (side, sign) in enumerate(zip(SIDES, (1.0, -1.0), strict=True), 1):
        edits = [FeatureEdit(0, 0, "direction", sign * float(apart.norm()))]
        steering[f"activation addition, to {side}"] = Steering(edits, positions="last_prompt")
        steering[f"task vector, to {side}"] = Steering(reconstruct=(number,), positions="last_prompt")
    return SaeForCausalLM.from_base(model.lm, saes=saes), steering
