"""Settings of `spans`."""

from __future__ import annotations

from ...create_training_data.span_settings import SpanSettings as SpanSettings
