"""Vectors of mean hidden states at the first SAE's place: added (ActAdd), or put in the state's place (TaskVec)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .....latents.vector_saes import constant_sae, direction_sae
from .....modeling import FeatureEdit, SaeForCausalLM, Steering
from ....settings.select_knowledge import SIDES
from .baseline import Bench, MethodAnswers


def vectors(bench: Bench) -> Iterator[MethodAnswers]:
    """Activation addition (https://huggingface.co/papers/2308.10248) and task vectors
    (https://huggingface.co/papers/2310.15213)."""
    if bench.learnt.means is None:
        raise ValueError("Vectors need hidden states of both behaviours. Received: none were learnt.")
    model, steerings = _vector_model(bench.asked.model, bench.learnt.means)
    try:
        asked = bench.asked.with_model(model)
        for (method, side), steering in steerings.items():
            if side in bench.asked.settings.sides:
                yield MethodAnswers(method, side, asked.answers(bench.prompts, steering=steering))
    finally:
        model.unwrap()


def _vector_model(
    model: SaeForCausalLM, means: tuple[Tensor, Tensor]
) -> tuple[SaeForCausalLM, dict[tuple[str, str], Steering]]:
    """A model with activation addition and task vectors at the first SAE's place; (method, side) -> steering."""
    place, (context, memory) = model.saes[0].config, means
    apart = context - memory
    saes = [direction_sae(apart[None], place), constant_sae(context, place), constant_sae(memory, place)]
    steering = {}
    for number, (side, sign) in enumerate(zip(SIDES, (1.0, -1.0), strict=True), 1):
        edits = [FeatureEdit(0, 0, "direction", sign * float(apart.norm()))]
        steering["activation addition", side] = Steering(edits, positions="last_prompt")
        steering["task vector", side] = Steering(reconstruct=(number,), positions="last_prompt")
    return SaeForCausalLM.from_base(model.lm, saes=saes), steering
