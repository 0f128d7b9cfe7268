"""Settings of `harvest`."""

from __future__ import annotations

from ...create_training_data.harvest_settings import HarvestSettings as HarvestSettings
