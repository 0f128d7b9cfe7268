"""How much a chat model writes for each concept. No torch is imported here: the command line uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..latents.settings import check_integers, check_numbers
from .llm.requests import ChatRequest


@dataclass(frozen=True)
class ConceptRecipe:
    """How much is written for each concept.

    Args:
        positives: training answers with each concept.
        negatives: training answers without any, for all concepts.
        test: answers with and answers without each concept to evaluate on.
        hard_negatives: answers to evaluate on that use a word of each concept in another meaning.
        steering: instructions kept to steer on.
        words: words of an answer, at most.
        max_answer_tokens: tokens of an answer, more for models that think first.
        temperature: temperature of the answers.
        seed: seed of the drawing of instructions, and of the requests.
        extra: further fields of each request.
    """

    positives: int = 72
    negatives: int = 72
    test: int = 36
    hard_negatives: int = 8
    steering: int = 10
    words: int = 100
    max_answer_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integers(self, positives=1, negatives=1, words=1, max_answer_tokens=1)
        check_integers(self, test=0, hard_negatives=0, steering=0)
        check_numbers(self, "temperature", least=0)

    def request(self, text: str) -> ChatRequest:
        """A request of this text as the user's."""
        messages = [{"role": "user", "content": text}]
        return ChatRequest(messages, self.max_answer_tokens, self.temperature, None, self.seed, None, self.extra)
