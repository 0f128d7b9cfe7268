"""Settings of `detect`."""

from __future__ import annotations

from dataclasses import dataclass

from ...latents.settings import ReadingSettings, check_choice

POOLINGS = ("mean", "max", "last")


@dataclass(frozen=True)
class DetectSettings(ReadingSettings):
    """How texts are scored.

    Args:
        pooling: of a text's tokens: `mean`, `max` or `last`.
        pre_activations: score before the activation function, as concept latents are trained (SCAR).
        max_length: tokens; longer texts are cut. By default 256, or what the model reads if that is less.
        skip_first: leading tokens that do not count.
        tokens_per_batch: of a forward pass, padding counted.
        text_column: column of the text, where rows have columns.
        seed: of the half of the labelled texts that sets the threshold of F1.
    """

    pooling: str = "mean"
    pre_activations: bool = False
    text_column: str = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "pooling", POOLINGS)
