"""Settings of `spans`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...create_training_data.spans.settings import SpanSettings as SpanSettings
from .texts import TextSettings


@dataclass(frozen=True)
class SpanOptions:
    """How spans are found, and in which texts: the options of the command line.

    Args:
        spans: how they are found.
        rows: which texts are read.
    """

    spans: SpanSettings = field(default_factory=SpanSettings)
    rows: TextSettings = field(default_factory=TextSettings)
