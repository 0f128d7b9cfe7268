"""Contrastive decoding: against a prompt without its context (CAD), or against an earlier layer (DoLa)."""

from __future__ import annotations

from collections.abc import Iterator

from .....evaluation.generation.layer_contrast import LayerContrast
from .....evaluation.generation.short_answers import Contrast
from .baseline import Bench, MethodAnswers

# SpARE, appendix C, of the Llamas. It does not say to what DoLa's apply; here to the form of context-aware decoding.
CAD_WEIGHT = {"context": 0.6, "memory": -0.8}
DOLA_WEIGHT = {"context": 6.0, "memory": -8.0}


def cad(bench: Bench) -> Iterator[MethodAnswers]:
    """Context-aware decoding (https://huggingface.co/papers/2305.14739)."""
    for side in bench.asked.settings.sides:
        closed = bench.asked.prompts(bench.rows, bench.seed, closed=True)
        contrast = Contrast(closed, CAD_WEIGHT[side])
        yield MethodAnswers("CAD", side, bench.asked.answers(bench.prompts, contrast=contrast))


def dola(bench: Bench) -> Iterator[MethodAnswers]:
    """Decoding by contrasting layers (https://huggingface.co/papers/2309.03883)."""
    for side in bench.asked.settings.sides:
        contrast = LayerContrast(DOLA_WEIGHT[side])
        yield MethodAnswers("DoLa", side, bench.asked.answers(bench.prompts, contrast=contrast))
