"""Settings of `dashboard`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from ...evaluation.settings import GenerationSettings
from ...latents.settings import check_integers

LAYOUTS = ("html", "neuronpedia", "delphi")


@dataclass(frozen=True)
class SteeredSamplesSettings:
    """Which continuations show what a feature does.

    Args:
        steer: features to write steering samples for, such as 3,17.
        strengths: of the samples, in norms of the hidden state; unsteered ones come by themselves.
        generation: how prompts are continued.
    """

    PANEL: ClassVar[str] = "Steering samples"

    steer: tuple[int, ...] = ()
    strengths: tuple[float, ...] = (-0.4, -0.2, 0.2, 0.4)
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    def __post_init__(self) -> None:
        if not self.strengths or 0 in self.strengths:
            raise ValueError(
                f"`strengths` must be other than 0; unsteered rows come by themselves. Received: "
                f"strengths={self.strengths!r}."
            )


@dataclass(frozen=True)
class ExportSettings:
    """Under which names features are written for other tools.

    Args:
        layout: html, a page; neuronpedia, a folder that a local instance imports; delphi, a folder of its runs.
        model_id: the base as the tool names it; by default the last part of its name, for delphi all of it.
        source_set: the SAEs of all layers as Neuronpedia names them; by default by site and width.
        release: the release of that set.
        creator: who made it.
        creator_id: a user of the instance that imports it; by default the one that a local instance begins with.
        vectors: write decoder rows too, by which Neuronpedia steers.
    """

    PANEL: ClassVar[str] = "Other layouts"

    layout: str = "html"
    model_id: str | None = None
    source_set: str | None = None
    release: str = "sae-transformers"
    creator: str = "sae-transformers"
    creator_id: str = "clkht01d40000jv08hvalcvly"
    vectors: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}. Received: layout={self.layout!r}.")


@dataclass(frozen=True)
class DashboardSettings:
    """What a page shows of an SAE's features.

    Args:
        features: which are shown, such as 1,2,5-90; by default all.
        title: title of the page.
        number: which of the SAEs of a saved model and of the results, from 0.
        judgement: which of several judgements says what is intended, from 0.
        neighbours: features with the nearest decoder rows, shown of each feature; 0: none.
        max_tokens: tokens of the texts for histograms, up to a whole block of rows.
        after: tokens shown behind the strongest one, with texts.
        max_length: tokens of a sequence; by default as for the spans, or 256, or what the model reads if that is less.
        compress: details as gzip, or as JSON that grep can read.
        samples: continuations that are made.
        export: other layouts than a page.
    """

    features: tuple[int, ...] | None = None
    title: str | None = None
    number: int = 0
    judgement: int = 0
    neighbours: int = 6
    max_tokens: int = 100_000
    after: int = 8
    max_length: int | None = None
    compress: bool = True
    samples: SteeredSamplesSettings = field(default_factory=SteeredSamplesSettings)
    export: ExportSettings = field(default_factory=ExportSettings)

    def __post_init__(self) -> None:
        check_integers(self, number=0, judgement=0, neighbours=0, max_tokens=0, after=0, max_length=2)


def feature_list(text: str) -> tuple[int, ...]:
    """Numbers of "1,2,5-90", in this order, each once.

    Raises:
        ValueError: it is no such list.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"Features are numbers and ranges, such as 1,2,5-90. Received: {part!r} in {text!r}.")
        found.update(dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1)))
    return tuple(found)
