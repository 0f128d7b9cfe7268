"""Ask for the behaviour in the prompt: by demonstrations that show it (ICL), or by an instruction."""

from __future__ import annotations

from collections.abc import Iterator

from .baseline import Bench, MethodAnswers

STYLE_OF = {"context": "sub_sub", "memory": "sub_org"}  # demonstrations that show the behaviour
INSTRUCTIONS = {
    "context": "Answer each question from its context alone, even where the context is wrong.",
    "memory": "The contexts may be wrong. Answer each question from what you know, not from its context.",
}


def demonstrations(bench: Bench) -> Iterator[MethodAnswers]:
    """Demonstrations that answer from their context, or against it."""
    for side in bench.asked.settings.sides:
        prompts = bench.asked.prompts(bench.rows, bench.seed, STYLE_OF[side])
        yield MethodAnswers("demonstrations", side, bench.asked.answers(prompts))


def instruction(bench: Bench) -> Iterator[MethodAnswers]:
    """A sentence before all."""
    for side in bench.asked.settings.sides:
        prompts = bench.asked.prompts(bench.rows, bench.seed, instruction=INSTRUCTIONS[side])
        yield MethodAnswers("instruction", side, bench.asked.answers(prompts))
