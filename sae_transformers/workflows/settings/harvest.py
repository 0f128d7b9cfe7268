"""Settings of `harvest`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...create_training_data.harvest.settings import HarvestSettings as HarvestSettings
from .texts import TextSettings


@dataclass(frozen=True)
class HarvestOptions:
    """What is harvested, and from which texts: the options of the command line.

    Args:
        states: what is harvested.
        rows: which texts are read.
    """

    states: HarvestSettings = field(default_factory=HarvestSettings)
    rows: TextSettings = field(default_factory=TextSettings)
