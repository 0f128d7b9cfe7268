"""How a language model is asked: in `explain`, `judge`, `ask_features`, `concept_set`, and where one scores texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...create_training_data.llm.protocol import ServiceRefused as ServiceRefused
from ...create_training_data.llm.settings import LLMSettings as LLMSettings
from ...latents.safe_texts import visible as visible
from ...latents.safe_texts import without_logins as without_logins


@dataclass(frozen=True)
class SendSettings:
    """How requests get to a language model, or that they do not. See `asking.ask_model`.

    Args:
        dry_run: estimate the cost and end.
        batch_file: write the requests for OpenAI's Batch API, and end. With `submit`: send them.
        submit: upload `batch_file` and start the batch.
        batch_results: results of a batch to begin with: a file, or the batch's id. Repeatable.
    """

    PANEL: ClassVar[str] = "Language model"

    dry_run: bool = False
    batch_file: Path | None = None
    submit: bool = False
    batch_results: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.submit and self.batch_file is None:
            raise ValueError("`submit` needs `batch_file`, the file to send. Received: batch_file=None.")
