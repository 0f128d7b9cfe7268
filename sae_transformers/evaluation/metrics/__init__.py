"""Metrics as `evaluate.Metric` classes: one number over predictions, gathered batch by batch.

    from sae_transformers.evaluation.metrics import Fvu
    metric = Fvu()
    metric.add_batch(predictions=reconstructions, references=hidden_states)
    metric.compute()

The mathematics is in the functions of `sae_transformers.evaluation`. `evaluation.metrics.space.write_metric` writes
the folder that `evaluate.load` takes and that a Space of the Hub holds.
"""

from .base import MetricFacts, SaeMetric
from .decisions import CalibrationError, SwapSensitivity
from .reconstruction import L0, DeadShare, Fvu, LossRecovered, NormalizedMse
from .texts import FirstDivergentToken, KnowledgeSelection, Repetition, SteeringScore

METRICS = {
    metric.facts.name: metric
    for metric in (
        Fvu, NormalizedMse, L0, DeadShare, LossRecovered,
        SteeringScore, Repetition, FirstDivergentToken, KnowledgeSelection,
        CalibrationError, SwapSensitivity,
    )
}  # fmt: skip

__all__ = [
    "L0",
    "METRICS",
    "CalibrationError",
    "DeadShare",
    "FirstDivergentToken",
    "Fvu",
    "KnowledgeSelection",
    "LossRecovered",
    "MetricFacts",
    "NormalizedMse",
    "Repetition",
    "SaeMetric",
    "SteeringScore",
    "SwapSensitivity",
]
