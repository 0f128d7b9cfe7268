"""How a topic is brought into generated text, by name, and how prompts are continued to measure it.

No torch is imported here: the command line uses it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...latents.settings import check_integers
from ..settings import GenerationSettings

METHODS = ("orig", "SAE", "clamp", "weight", "swap")
SUMMARIES = {"avg": "sum", "max": "max", "counts": "count"}  # how each pools a text's tokens
ERRORS = {"keep": True, "replace": False}


@dataclass(frozen=True)
class TopicMethod:
    """A method of topic alignment with its settings.

    Args:
        name: as tables have it, such as `swap:4`.
        method: one of `METHODS`.
        keep_error: keep what the SAE does not reconstruct.
        strength: exponent of the scores.
    """

    name: str
    method: str
    keep_error: bool = True
    strength: float = 1.0

    @classmethod
    def parse(cls, name: str, *, keep_error: bool = True, strength: float = 1.0) -> TopicMethod:
        """`swap`, or with settings that differ from the given ones: `swap:replace`, `swap:4`, `swap:keep:4`.

        Raises:
            ValueError: an unknown method or setting.
        """
        method, *parts = name.split(":")
        for part in parts:
            if part in ERRORS:
                keep_error = ERRORS[part]
            elif part.replace(".", "", 1).isdecimal():
                strength = float(part)
            else:
                raise ValueError(f"Settings of a method are keep, replace and a strength. Received: {name!r}.")
        if method not in METHODS:
            raise ValueError(f"Methods are {', '.join(METHODS)}. Received: {name!r}.")
        return cls(name, method, keep_error, strength)


@dataclass(frozen=True)
class TopicGenerationSettings(GenerationSettings):
    """How prompts are continued with and without the topic.

    Args:
        max_new_tokens: tokens of a continuation, at most.
        temperature: temperature of the draws; 0 is greedy.
        top_p: share of the probability that is drawn from.
        samples_per_prompt: does not count: each prompt is continued once.
        chat: does not count: prompts are continued as they are.
        batch_size: continuations made together.
        seed: seed of the draws and of the fine-tuning.
        top_k: number of the most likely tokens that each token is drawn from; 1 is greedy. The paper's code takes 5
            (and weighs them alike, where here their probabilities count).
    """

    temperature: float = 1.0
    chat: bool = False
    batch_size: int = 16
    top_k: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, top_k=1)

    @property
    def sampling(self) -> dict[str, float | int | bool]:
        """As `generate` takes it."""
        if self.top_k == 1 or self.temperature == 0:
            return {"do_sample": False, "temperature": 1.0}
        return {"do_sample": True, "top_k": self.top_k, "top_p": self.top_p, "temperature": self.temperature}
