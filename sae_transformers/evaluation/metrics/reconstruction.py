"""How well an SAE reconstructs, as `evaluate` metrics."""

from __future__ import annotations

from typing import Any

import torch

from ..reconstruction.metrics import fvu, l0, normalized_mse
from .base import COUNTS, NUMBER, NUMBERS, MetricFacts, SaeMetric, tensor

STATES = {
    "predictions": "what the SAE makes of each token's hidden state, d numbers a token.",
    "references": "the hidden states, d numbers a token.",
}
STATE_FEATURES = {"predictions": NUMBERS, "references": NUMBERS}
ACTIVE = {"predictions": "the indices of each token's active latents, a list a token."}
LEAVE_OUT = (
    "Tokens that the SAE was not made for, such as the first of a text, change it much: leave them out and say so."
)


class Fvu(SaeMetric):
    facts = MetricFacts(
        "fvu",
        "Fraction of variance unexplained",
        "How much of the variance of hidden states an SAE's reconstruction leaves out: "
        "sum |x - xh|^2 / sum |x - mean(x)|^2 over tokens. One minus it is the explained variance.",
        STATES,
        STATE_FEATURES,
        "0 is perfect, 1 as bad as the mean; it has no upper end. Lower is better.",
        LEAVE_OUT,
        "Explained variance as SAELens and SAEBench name it; R^2 of several outputs, weighted by variance.",
        {"predictions": [[1.0, 0.0], [0.0, 0.5]], "references": [[1.0, 0.0], [0.0, 1.0]]},
        {"fvu": 0.25, "explained_variance": 0.75},
    )

    @staticmethod
    def measure(predictions: Any, references: Any) -> dict[str, float]:
        found = fvu(tensor(references, "references"), tensor(predictions, "predictions"))
        return {"fvu": found, "explained_variance": 1 - found}


class NormalizedMse(SaeMetric):
    facts = MetricFacts(
        "normalized_mse",
        "Normalised mean squared error",
        "The mean over tokens of mean((xh - x)^2) / mean(x^2), what SCAR's SAEs minimise.",
        STATES,
        STATE_FEATURES,
        "0 is perfect, 1 as bad as zeros. Lower is better.",
        LEAVE_OUT,
        "L_r of https://huggingface.co/papers/2411.07122.",
        {"predictions": [[1.0, 0.0], [0.0, 0.5]], "references": [[1.0, 0.0], [0.0, 1.0]]},
        {"normalized_mse": 0.125},
    )

    @staticmethod
    def measure(predictions: Any, references: Any) -> dict[str, float]:
        return {"normalized_mse": normalized_mse(tensor(references, "references"), tensor(predictions, "predictions"))}


class L0(SaeMetric):
    facts = MetricFacts(
        "l0",
        "L0 of latents",
        "The mean number of latents that are active on a token.",
        ACTIVE,
        {"predictions": COUNTS},
        "0 to the number of latents; how sparse the code is, neither end is better.",
        "Numbers of SAEs compare only at like reconstruction.",
        "The usual measure of sparsity of SAEs.",
        {"predictions": [[3, 7], [3], [0, 1, 2]]},
        {"l0": 2.0},
    )

    @staticmethod
    def measure(predictions: Any) -> dict[str, float]:
        active = [torch.ones(len(indices)) for indices in list(predictions)]
        return {"l0": l0(torch.nn.utils.rnn.pad_sequence(active, batch_first=True))}


class DeadShare(SaeMetric):
    facts = MetricFacts(
        "dead_share",
        "Share of dead latents",
        "The share of an SAE's latents that are active on none of the tokens.",
        ACTIVE,
        {"predictions": COUNTS},
        "0 to 1. Lower is better.",
        "It falls with the number of tokens: say how many there were.",
        "The usual measure of unused latents of SAEs.",
        {"predictions": [[3, 7], [3], [0, 1, 2]], "d_sae": 8},
        {"dead_share": 0.375},
        {"d_sae": "the number of latents."},
    )

    @staticmethod
    def measure(predictions: Any, d_sae: int) -> dict[str, float]:
        active = torch.cat([torch.tensor(indices, dtype=torch.long) for indices in list(predictions)])
        if d_sae < 1 or (len(active) and (int(active.min()) < 0 or int(active.max()) >= d_sae)):
            raise ValueError(f"Latents are numbered from 0 to d_sae - 1. Received: d_sae={d_sae!r}.")
        return {"dead_share": float((torch.bincount(active, minlength=d_sae) == 0).double().mean())}


class LossRecovered(SaeMetric):
    facts = MetricFacts(
        "loss_recovered",
        "Loss recovered",
        "How much of the language model's loss comes back when an SAE stands in place of an ablation: "
        "(CE_ablated - CE_sae) / (CE_ablated - CE_base), of means over texts or tokens.",
        {
            "predictions": "cross-entropies with the SAE in the model's path, a number a text or token.",
            "references": "cross-entropies of the model as it is.",
            "ablated": "cross-entropies with zeros (or the mean) in place of the hidden state.",
        },
        {"predictions": NUMBER, "references": NUMBER, "ablated": NUMBER},
        "1 is as good as the model, 0 as bad as the ablation; it has no lower end. Higher is better.",
        "Ablating with zeros does so much harm that most SAEs recover above 0.9; the mean is the harder comparison.",
        "Loss recovered of https://huggingface.co/papers/2404.16014, and `ce_loss_score` of SAEBench.",
        {"predictions": [3.5, 3.5], "references": [3.0, 3.0], "ablated": [8.0, 8.0]},
        {"loss_recovered": 0.9},
    )

    @staticmethod
    def measure(predictions: Any, references: Any, ablated: Any) -> dict[str, float]:
        columns = {"predictions": predictions, "references": references, "ablated": ablated}
        sae, base, worst = (float(tensor(column, name).mean()) for name, column in columns.items())
        if worst == base:
            raise ValueError(f"The ablation must change the loss. Received: {base!r} with it and without.")
        return {"loss_recovered": (worst - sae) / (worst - base)}
