"""LAMBADA's file, which several suites read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...latents.settings import check_integers


@dataclass(frozen=True)
class LambadaOptions:
    """Passages whose last word is to be guessed.

    Args:
        lambada: .jsonl with a column text.
        limit: rows of LAMBADA and of each subject of MMLU, the first ones; by default all.
    """

    PANEL: ClassVar[str] = "Suites fairness and capability"

    lambada: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_integers(self, limit=1)
