"""Pictures in tests: what was drawn, in place of a file."""

from __future__ import annotations

from typing import Any

import pytest

from sae_transformers.evaluation import plots


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    pytest.importorskip("matplotlib")
    figures: list[Any] = []

    def keep(figure: Any, path: Any, dpi: int = 150) -> Any:
        figures.append(figure)
        return path

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures
