"""Have a chat model write texts with and without concepts, to find features and to measure detectors by."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...create_training_data.concept_sets import ConceptSet, write_concept_sets
from ...create_training_data.concept_writing import (
    Made,
    ask_instructions,
    expected_requests,
    instruction_requests,
    instructions_wanted,
    make_concept_sets,
)
from ...create_training_data.llm.requests import KEPT, Chat, ChatRequest
from ..reading.asking import AskedResult, Exchange, ask_model
from ..results import Progress, Result
from ..settings.concept_set import ConceptSetSettings
from ..settings.llm import SendSettings

PARTS = ("train", "test")


@dataclass(frozen=True)
class ConceptSetResult(AskedResult, Result):
    """Texts with and without each concept.

    Args:
        sets: one for each concept; none where nothing was asked, with `dry_run`.
        failures: reason -> how many answers are missing because of it.
        exchange: what was asked of the language model, and what it took.
    """

    sets: list[ConceptSet] = field(repr=False)
    failures: dict[str, int]
    exchange: Exchange

    def summary(self) -> list[str]:
        """What was used, and how many texts of each kind a concept has."""
        lines = self.exchange.used()
        for one in self.sets:
            counts = {part: {kind: len(texts) for kind, texts in getattr(one, part).items()} for part in PARTS}
            lines.append(f"{one.concept[:60]}: {counts}")
        if self.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
            lines.append(f"Texts that the model did not give are left out: {reasons}.")
        return lines

    @property
    def left_out(self) -> dict[str, int]:
        """Reason -> how many texts the model itself declined to give: asking again would change nothing."""
        return {reason: count for reason, count in self.failures.items() if reason in KEPT}

    def failure(self) -> str | None:
        """A sentence on the answers that another attempt may give; None if there are all."""
        missing = ", ".join(f"{n:,} {reason}" for reason, n in self.failures.items() if reason not in self.left_out)
        if not missing:
            return None
        return f"Some answers are missing: {missing}. What was answered is kept: the same command asks for these only."

    def rows(self) -> list[dict[str, Any]]:
        """One for each text: concept, part, category, instruction, text."""
        return [
            {"concept": one.concept, "part": part, "category": category, **example._asdict()}
            for one in self.sets
            for part in PARTS
            for category, examples in getattr(one, part).items()
            for example in examples
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: what was used, what is missing, the texts, and the instructions to steer on."""
        steering = {one.concept: list(one.steering_instructions) for one in self.sets}
        return {**self.used(), "failures": self.failures, "texts": self.rows(), "steering_instructions": steering}

    def save(self, folder: str | Path) -> list[Path]:
        """Write AxBench's layout, which `steer` and `read_concept_sets` read; the files.

        Raises:
            ValueError: an answer is missing, nothing was asked, or the model gave no text of a concept at all.
        """
        if failure := self.failure():
            raise ValueError(failure)
        for one in self.sets:
            if not one.train and not one.test:
                raise ValueError(f"The model gave no text of the concept {one.concept!r}. Another model may.")
        if not self.sets:
            raise ValueError("There is no text to write: with `dry_run` nothing is asked.")
        return write_concept_sets(self.sets, folder)


def concept_set(
    concepts: Sequence[str] | os.PathLike[str],
    settings: ConceptSetSettings | None = None,
    *,
    instructions: Sequence[str] | os.PathLike[str] | None = None,
    client: Chat | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], object] | None = None,
) -> ConceptSetResult:
    """Answers to instructions with each concept, without any, and with a word of it in another meaning.

    An answer is paid for once: the same call goes on where an earlier one was stopped.

    Args:
        concepts: in words, each once; or a file with one a line.
        instructions: what is answered, or a file with one a line; by default the model makes them up.
        client: answers in place of the model that `settings.llm` names; it stays open.
        progress: called after each answer, for instructions, meanings and texts in turn.
        notice: called with a line on the estimate before anything is sent.

    Raises:
        ValueError: no model is named, no concept, one given twice, or too few instructions.
        ServiceRefused: the server takes no more requests.
    """
    settings = settings or ConceptSetSettings()
    recipe, names = settings.recipe, lines_of(concepts)
    given = None if instructions is None else lines_of(instructions)
    wanted = instructions_wanted(recipe)

    def requests(chat: Chat) -> list[ChatRequest]:
        if given is not None:
            return expected_requests(names, given, chat, recipe)
        asking = instruction_requests(wanted, recipe)
        if chat.missing(asking):
            asked = [f"An instruction of about twelve words, as number {n} of them may be." for n in range(wanted)]
        else:
            asked = ask_instructions(chat, wanted, recipe, progress=False)  # from the cache
        return [*asking, *expected_requests(names, asked, chat, recipe)]

    def run(chat: Chat) -> Made:
        asked = given
        if asked is None:
            asked = ask_instructions(chat, wanted, recipe, progress=progress or False)
        return make_concept_sets(names, asked, chat, recipe, progress=progress or False)

    exchange, made = ask_model(
        client or settings.llm, SendSettings(dry_run=settings.dry_run), requests, run, notice=notice
    )
    return ConceptSetResult([], {}, exchange) if made is None else ConceptSetResult(*made, exchange)


def lines_of(source: Sequence[str] | os.PathLike[str]) -> list[str]:
    """Texts, or those of a file's lines that have a word."""
    if not isinstance(source, os.PathLike):
        return [source] if isinstance(source, str) else list(source)
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]
