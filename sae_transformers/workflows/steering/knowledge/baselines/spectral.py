"""Spectral editing of activations (SEA) at the first SAE's place, at every token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from .....modeling.hook_points import find_hook_point, hook_tensor
from .....training.steering.spectral_editing import SpectralProjections, spectral_projections
from ....settings.select_knowledge import SIDES
from ...functional import last_states
from .baseline import Bench, MethodAnswers

SOURCES = {"context": "sub", "memory": "org"}  # whose answer shows the behaviour


def sea(bench: Bench) -> Iterator[MethodAnswers]:
    """Linear SEA (https://huggingface.co/papers/2405.09719), learnt from the pool's prompts whose demonstrations have
    no conflict: alone, with the wanted side's answer and with the other's."""
    asked, states = bench.asked, _states(bench)
    place = asked.model.saes[0].config.read_at
    for side in asked.settings.sides:
        (other,) = set(SIDES) - {side}
        projections = spectral_projections(states["prompt"], states[side], states[other])
        point = find_hook_point(asked.model.lm, asked.model.config.get_text_config(), place)
        hook = hook_tensor(point, projections.edit)
        try:
            edited = replace(asked, identity=f"{asked.identity} SEA {_digest(projections)}")
            answers = edited.answers(bench.prompts)
        finally:
            hook.remove()
        yield MethodAnswers("SEA", side, answers)


def _states(bench: Bench) -> dict[str, Tensor]:
    """Hidden states (n, d_in) of the last tokens: of the `prompt`, and with the answer of each side."""
    asked = bench.asked
    pool = [one for one in bench.learnt.grouped if one.style == "org_org"]
    prompts = {"prompt": [one.prompt(asked.questions) for one in pool]}
    for side, source in SOURCES.items():
        told = [asked.questions[one.row].answers(source)[0] for one in pool]
        prompts[side] = [f"{prompt} {answer}" for prompt, answer in zip(prompts["prompt"], told, strict=True)]
    per_batch = asked.settings.tokens_per_batch
    return {
        name: last_states(asked.model, asked.tokenizer, texts, tokens_per_batch=per_batch)[0]
        for name, texts in prompts.items()
    }


def _digest(projections: SpectralProjections) -> str:
    """Tells answers under these from those under others."""
    found = hashlib.sha256()
    for side in projections:
        found.update(side.float().numpy().tobytes())
    return found.hexdigest()[:16]
