"""Settings of `ask_features`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...latents.settings import check_integers
from .llm import LLMSettings, SendSettings


@dataclass(frozen=True)
class AskFeaturesSettings:
    """How features are asked about.

    Args:
        answers: answers to choose from.
        features_per_request: features of a request; small models need 1, and a `local_model` always gets 1.
        max_rows: ask about the first features only.
        llm: which language model is asked.
        send: how requests get there.
    """

    answers: tuple[str, ...] = ("yes", "maybe", "no")
    features_per_request: int = 20
    max_rows: int | None = None
    llm: LLMSettings = field(default_factory=LLMSettings)
    send: SendSettings = field(default_factory=SendSettings)

    def __post_init__(self) -> None:
        check_integers(self, features_per_request=1, max_rows=1)
        if len(set(self.answers)) < max(2, len(self.answers)):
            raise ValueError(
                f"`answers` must be two or more to choose from, all different. Received: answers={self.answers!r}."
            )
