"""What can be chosen in each workflow. No torch is imported here: the command line makes its options of these."""

from __future__ import annotations

from dataclasses import dataclass

POOLINGS = ("mean", "max", "last")


@dataclass(frozen=True)
class DetectSettings:
    """How texts are scored.

    Args:
        pooling: of a text's tokens: `mean`, `max` or `last`.
        pre_activations: score before the activation function, as concept latents are trained (SCAR).
        skip_first: leading tokens that do not count.
        max_length: tokens; longer texts are cut. By default 256, or what the model reads if that is less.
        tokens_per_batch: of a forward pass, padding counted.
        seed: of the half of the labelled texts that sets the threshold of F1.
    """

    pooling: str = "mean"
    pre_activations: bool = False
    skip_first: int = 1
    max_length: int | None = None
    tokens_per_batch: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}. Received: pooling={self.pooling!r}.")
        for name, least in (("skip_first", 0), ("max_length", 1), ("tokens_per_batch", 1)):
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of {least} or more. Received: {name}={value!r}.")
