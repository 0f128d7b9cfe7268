"""Settings of `select_behaviour`."""

from __future__ import annotations

from dataclasses import dataclass

from ...latents.settings import check_choice, check_integers, check_numbers
from .select_knowledge import ACTIVATIONS

SIDES: tuple[str, ...] = ("a", "b")
POSITIONS = ("last_prompt", "generated", "prompt", "all")


@dataclass(frozen=True)
class SelectBehaviourSettings:
    """How the features that tell two groups of prompts apart are found, and how the model is steered by them.

    Args:
        proportion: share of the information that the selected features hold (K), in (0, 1); by default 0.1.
        count: features of each SAE, in place of `proportion`.
        strength: multiples of a feature's typical activation that edits aim at (alpha).
        positions: tokens that are steered: `last_prompt`, `generated`, `prompt` or `all`.
        held_out: share of the prompts to measure the features on, 0 to 1.
        seed: seed of the held-out prompts and of the estimator of mutual information.
        activation: the SAE's `own`, or `relu`: without its selection.
        samples: held-out prompts of each behaviour that are answered unsteered and steered both ways.
        max_new_tokens: tokens of such an answer.
        tokens_per_batch: tokens of a forward pass, padding counted. It changes results by rounding only.
    """

    proportion: float | None = None
    count: int | None = None
    strength: float = 2.0
    positions: str = "last_prompt"
    held_out: float = 0.25
    seed: int = 0
    activation: str = "own"
    samples: int = 4
    max_new_tokens: int = 24
    tokens_per_batch: int = 8192

    def __post_init__(self) -> None:
        if self.proportion is not None and self.count is not None:
            told = f"proportion={self.proportion!r}, count={self.count!r}"
            raise ValueError(f"Give `proportion` or `count`. Received: {told}.")
        if self.proportion is not None and not 0 < self.proportion < 1:
            raise ValueError(f"`proportion` must be in (0, 1). Received: proportion={self.proportion!r}.")
        check_numbers(self, "strength", "held_out", least=0)
        if not self.held_out < 1:
            raise ValueError(f"`held_out` must be a share below 1. Received: held_out={self.held_out!r}.")
        check_integers(self, count=1, seed=0, samples=0, max_new_tokens=1, tokens_per_batch=1)
        check_choice(self, "positions", POSITIONS)
        check_choice(self, "activation", ACTIVATIONS)
