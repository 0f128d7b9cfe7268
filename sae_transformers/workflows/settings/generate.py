"""Settings of `generate`, and features and steerings as one types them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...evaluation.settings import GenerationSettings


def parse_feature(text: str) -> tuple[int, int | str]:
    """`9`, `1:9`, `joy` or `1:joy` -> (SAE, latent or name)."""
    sae, colon, rest = text.partition(":")
    if not colon or not sae.isdecimal():
        sae, rest = "0", text
    return int(sae), int(rest) if rest.isdecimal() else rest


@dataclass(frozen=True)
class GenerateSettings:
    """How prompts are continued.

    Args:
        unsteered: continue without steering too, from the same random numbers.
        generation: how each text is written.
    """

    unsteered: bool = True
    generation: GenerationSettings = field(default_factory=lambda: GenerationSettings(max_new_tokens=50))


@dataclass(frozen=True)
class TypedSteering:
    """Steerings in text, for the command line and for tables; objects are `Steering`.

    An edit is FEATURE=VALUE. FEATURE is a number or a name, `1:9` is latent 9 of SAE 1. VALUE is a number as it is, in
    largest activations of the feature (`3x`), or in norms of the hidden state (`0.2n`); `-3x/3x` makes a steering of
    each.

    Args:
        steering: steering as JSON, a file of it, or the name of such a file in the model's folder. By default the
            model's own.
        strengths: multiples of that steering's values, side by side.
        feature: push the hidden state along features, as rivers=3x or 9=0.2n: each adds its decoder row.
        scale: multiply latents, as 0=-100; 0=-100/100 shows both.
        set: set latents to a value, as 9=4 or rivers=1x.
        add: add to latents, as 9=4.
        ablate: latents or names to set to 0.
        erase: as `ablate`, and their directions are taken out of what the SAE does not reconstruct.
        positions: steered tokens: all, prompt, generated, last_prompt, or ranges such as 1: or 0:-1. By default all;
            with nothing but `feature` all but the first, whose hidden state is an outlier.
        drop_error: replace hidden states by what the SAE reconstructs, as SCAR does.
    """

    PANEL: ClassVar[str] = "Steering"

    steering: str | None = None
    strengths: tuple[float, ...] | None = None
    feature: tuple[str, ...] = ()
    scale: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    ablate: tuple[str, ...] = ()
    erase: tuple[str, ...] = ()
    positions: str | None = None
    drop_error: bool = False

    @property
    def edits(self) -> dict[str, tuple[str, ...]]:
        """Op of `FeatureEdit` -> its edits."""
        return {
            "direction": self.feature, "scale": self.scale, "set": self.set, "add": self.add, "ablate": self.ablate,
            "erase": self.erase,
        }  # fmt: skip

    def __post_init__(self) -> None:
        edited = any(self.edits.values())
        if self.steering is not None and (edited or self.positions or self.drop_error):
            raise ValueError(
                f"`steering` says its edits and positions itself; give it alone. Received: steering={self.steering!r} "
                f"beside edits, positions or drop_error."
            )
        if self.strengths and self.steering is None:
            raise ValueError(
                "`strengths` multiply a `steering`; of edits give the values, as 9=2/4. Received: no steering."
            )
        if not edited and (self.positions or self.drop_error):
            raise ValueError("`positions` and `drop_error` are of edits. Received: none, of scale, set, feature, ...")


@dataclass(frozen=True)
class GenerateOptions:
    """What the verb `generate` takes.

    Args:
        steering: what is steered.
        settings: how prompts are continued.
    """

    steering: TypedSteering = field(default_factory=TypedSteering)
    settings: GenerateSettings = field(default_factory=GenerateSettings)
