"""Settings of `detect` and `attribute`."""

from __future__ import annotations

from dataclasses import dataclass

from ...latents.settings import ReadingSettings, check_choice, check_integers

POOLINGS = ("mean", "max", "last")
METHODS = ("gradient x latent", "integrated gradients", "ablation")


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


@dataclass(frozen=True)
class AttributionSettings(ReadingSettings):
    """How features are attributed, and how the result is checked.

    Args:
        max_length: tokens; a longer text is refused, of a classifier cut. By default 1,024, or what the model reads.
        skip_first: leading tokens whose features are not attributed, and stay as they are.
        tokens_per_batch: of a forward pass of ablations, points of a line or of a curve.
        sae_numbers: the SAEs whose features are attributed, from 0; by default all.
        steps: points of integrated gradients' line.
        max_pairs: pairs of feature and token that `ablation` ablates, the strongest by gradient x latent.
        check: pairs that are ablated to check the effects, half of them the strongest and half at random; 0: none.
        curve: also measure the faithfulness curve.
        draws: random orders of the curve.
        seed: of the pairs and orders at random.
    """

    sae_numbers: tuple[int, ...] = ()
    steps: int = 10
    max_pairs: int = 1000
    check: int = 32
    curve: bool = True
    draws: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, steps=1, max_pairs=1, check=0, draws=0, seed=0)
