"""Settings of `evaluate`, and the options of the verb, which are those of the registered suites."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ...evaluation.settings import BootstrapSettings
from ...evaluation.suites import SUITES
from ...latents.settings import ReadingSettings
from .llm import LLMSettings


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured anew, and what the record says of the model.

    Args:
        again: measure suites again that are in the record already, and replace a record of another model.
        name: of the model, for the record; by default where it was loaded from.
        revision: of the model, for the record.
        command: what was run, for the record.
    """

    again: bool = False
    name: str = ""
    revision: str | None = None
    command: str = ""


def evaluate_options() -> type:
    """A dataclass of what the suites share and of the options of each registered suite, by its name."""
    fields: list[Any] = [
        ("reading", ReadingSettings, field(default=ReadingSettings(tokens_per_batch=1024))),
        ("bootstrap", BootstrapSettings, field(default=BootstrapSettings())),
        *((name, suite.Options, field(default_factory=suite.Options)) for name, suite in SUITES.items()),
        ("language_model", LLMSettings, field(default=LLMSettings())),
    ]
    return dataclasses.make_dataclass("EvaluateOptions", fields, frozen=True)
