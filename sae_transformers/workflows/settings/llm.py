"""How a language model is asked: in `explain`, `judge`, `ask_features`, `concept_set`, and where one scores texts."""

from __future__ import annotations

from ...create_training_data.llm_exchange import ServiceRefused as ServiceRefused
from ...create_training_data.llm_settings import LLMSettings as LLMSettings
