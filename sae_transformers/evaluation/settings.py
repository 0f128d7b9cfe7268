"""What measurements share: how texts are generated, how unlikely they may become, how intervals are drawn.

No torch is imported here: the command line uses it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..latents.settings import check_integers, check_numbers


@dataclass(frozen=True)
class GenerationSettings:
    """How prompts are continued.

    Args:
        max_new_tokens: of a continuation.
        temperature: of the draws; 0 is greedy.
        top_p: share of the probability that is drawn from.
        samples_per_prompt: continuations of a prompt, with a temperature.
        chat: put prompts into the chat template, if the tokenizer has one.
        batch_size: continuations made together. It changes results by rounding only.
        seed: of every random choice.
    """

    PANEL: ClassVar[str] = "Generation"

    max_new_tokens: int = 40
    temperature: float = 0.7
    top_p: float = 1.0
    samples_per_prompt: int = 1
    chat: bool = True
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, max_new_tokens=1, samples_per_prompt=1, batch_size=1)
        check_numbers(self, "temperature", least=0)
        check_numbers(self, "top_p", above=0)
        if self.top_p > 1:
            raise ValueError(f"`top_p` must be in (0, 1]. Received: top_p={self.top_p!r}.")
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise ValueError(
                f"Without a `temperature` all samples of a prompt are the same: ask for one. "
                f"Received: samples_per_prompt={self.samples_per_prompt!r}, temperature={self.temperature!r}."
            )


@dataclass(frozen=True)
class FluencyBudget:
    """What steered text may lose.

    Args:
        perplexity_ratio: perplexity of the continuations under the unsteered model, over that of unsteered ones.
            Greedy text is the most likely there is, so the same limit is much stricter without a temperature.
        added_repetition: share of repeated word trigrams that may be added; by default any. A model that repeats
            itself has a low perplexity.
    """

    PANEL: ClassVar[str] = "Strength"

    perplexity_ratio: float = 1.6
    added_repetition: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "perplexity_ratio", above=0)


@dataclass(frozen=True)
class BootstrapSettings:
    """How 95 % intervals are drawn.

    Args:
        resamples: of the bootstrap that gives the 95 % intervals.
        seed: of every random choice.
    """

    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, resamples=1)
