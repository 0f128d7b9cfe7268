"""Dashboards of made-up features: pleasant ones, many, and ones with texts that break pages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from sae_transformers.create_training_data.annotation.tables import FeatureAnnotation
from sae_transformers.evaluation.features.histograms import ActivationHistograms
from sae_transformers.evaluation.features.table import FeatureTable, LogitWeights
from sae_transformers.hub_cards.dashboard_data import DashboardData, Raised, SpanShown, SteeringSample

PICTURES = Path(__file__).parents[2] / "docs" / "dashboard_screenshots.py"
EVIL = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'>",
    "<!--<script>",
    "]]>&lt;&amp;",
    "\x00\x07\x1b[31m",
    "\u202eright to left\u202c",
    "שלום עולם",
    "👩\u200d👩\u200d👧",
    "\ud800",
    "\udfff lone",
    "\u2028\u2029\ufeff",
    "{{ 7 * 7 }}${7 * 7}`",
    "a\"b'c\\",
    "x" * 400,
    "javascript:alert(1)",
    " \n\t ",
    "",
]


def example() -> Any:
    """The module that makes the pictures of the documentation."""
    spec = importlib.util.spec_from_file_location("dashboard_screenshots", PICTURES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(n: int, k: int) -> LogitWeights:
    falling = torch.linspace(1.5, 0.5, k).repeat(n, 1)
    ids, numbers = torch.zeros(n, k, dtype=torch.long), torch.arange(n, dtype=torch.float64)
    return LogitWeights(numbers, numbers, numbers, numbers, ids, falling, ids, -falling)


def evil() -> DashboardData:
    """A feature for each bad text, which stands wherever a text may stand."""
    n = len(EVIL)
    table = FeatureTable(weights(n, 2), [[text, " fine"] for text in EVIL], [["plain", text] for text in EVIL])
    histograms = ActivationHistograms(n)
    histograms.add(torch.arange(n)[:, None], torch.full((n, 1), 3.0))
    return DashboardData(
        EVIL[0],
        {EVIL[1]: EVIL[0]},
        table,
        names={i: text for i, text in enumerate(EVIL) if i % 2},
        spans={
            i: [SpanShown(2.0, ["before ", text, " after"], [None, 2.0, 0.5], 1, 4)] for i, text in enumerate(EVIL)
        },
        annotations={i: FeatureAnnotation(text, i % 3 == 0, [(text, text)], text) for i, text in enumerate(EVIL)},
        samples={
            i: [SteeringSample(text, text), SteeringSample(text, text, text, 1.0, 3.0)] for i, text in enumerate(EVIL)
        },
        neighbours={i: [((i + 1) % n, 0.5)] for i in range(n)},
        raised={i: [Raised(text, -0.25, text, text)] for i, text in enumerate(EVIL)},
        measures={EVIL[0]: {0: 0.5}},
        histograms=histograms,
        activation=EVIL[0],
    )
