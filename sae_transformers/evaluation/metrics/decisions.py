"""How a classifier decides, as `evaluate` metrics."""

from __future__ import annotations

from typing import Any

from ..classification import BINS, calibration_error
from ..fairness.counterfactuals import swap_sensitivity
from .base import COUNT, NUMBER, MetricFacts, SaeMetric, tensor


class CalibrationError(SaeMetric):
    facts = MetricFacts(
        "calibration_error",
        "Expected calibration error",
        "How far a classifier's confidence is from how often it is right: the sum over bins of confidence of "
        "(share of texts) * |accuracy - mean confidence|.",
        {
            "predictions": "the probability of the predicted class, 0 to 1, a number a text.",
            "references": "1 where the prediction is right, 0 where it is wrong.",
        },
        {"predictions": NUMBER, "references": COUNT},
        "0 to 1. Lower is better.",
        "It depends on the bins, and a classifier that always says the base rate is well calibrated and useless.",
        "Equation 3 of https://huggingface.co/papers/1706.04599.",
        {"predictions": [0.9, 0.9, 0.6, 0.6], "references": [1, 1, 1, 0]},
        {"calibration_error": 0.1},
        {"bins": f"of equal width; {BINS} by default."},
    )

    @staticmethod
    def measure(predictions: Any, references: Any, bins: int = BINS) -> dict[str, float]:
        confidence, correct = tensor(predictions, "predictions"), tensor(references, "references")
        if (
            bins < 1
            or not bool(((correct == 0) | (correct == 1)).all())
            or not bool(((confidence >= 0) & (confidence <= 1)).all())
        ):
            raise ValueError(
                f"Expected confidences in [0, 1], references of 0 or 1, and a bin or more. "
                f"Received: {float(confidence.min())} to {float(confidence.max())}, "
                f"{sorted(set(correct.tolist()))[:5]}, bins={bins!r}."
            )
        return {"calibration_error": calibration_error(confidence, correct, bins)}


class SwapSensitivity(SaeMetric):
    facts = MetricFacts(
        "swap_sensitivity",
        "Swap sensitivity",
        "How much a yes-or-no decision changes when one attribute of a text is swapped, such as a name or a gender: "
        "mean |change of the logit|, mean |change of the probability|, and the share of decisions that flip.",
        {
            "predictions": "logits of the swapped texts, a number a text.",
            "references": "logits of the same texts as they were.",
        },
        {"predictions": NUMBER, "references": NUMBER},
        "0 and more for logits, 0 to 1 for the others. 0 is counterfactually fair; lower is better.",
        "A classifier that decides nothing does not change: show its accuracy beside it.",
        "https://huggingface.co/papers/1703.06856, measured as in https://huggingface.co/papers/1809.10610.",
        {"predictions": [1.0, -1.0], "references": [1.0, 1.0]},
        {"delta_logit": 1.0, "delta_probability": 0.23105857863000487, "flips": 0.5},
    )

    @staticmethod
    def measure(predictions: Any, references: Any) -> dict[str, float]:
        found = swap_sensitivity(tensor(references, "references"), tensor(predictions, "predictions"), resamples=1)
        return {name: one["value"] for name, one in found.items()}
