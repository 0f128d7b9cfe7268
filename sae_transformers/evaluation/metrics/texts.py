"""What steering does to answers, as `evaluate` metrics."""

from __future__ import annotations

from typing import Any

from ..generation.first_divergent_token import mean_first_divergent_token
from ..generation.fluency import repetition
from ..knowledge import answer_behaviours
from ..steering.axbench import Ratings
from .base import COUNTS, NUMBER, TEXT, TEXTS, MetricFacts, SaeMetric, tensor


class SteeringScore(SaeMetric):
    facts = MetricFacts(
        "steering_score",
        "Steering score",
        "The harmonic mean of three ratings of each steered answer, averaged over answers: is the concept in it, does "
        "it answer the instruction, is it fluent. An answer that fails one of them scores 0.",
        {
            "concept": "rating of the concept, 0 to 2, a number an answer.",
            "instruction": "rating of the answer to the instruction, 0 to 2.",
            "fluency": "rating of the fluency, 0 to 2.",
        },
        {"concept": NUMBER, "instruction": NUMBER, "fluency": NUMBER},
        "0 to 2. Higher is better.",
        "It is only as good as the judge who rates.",
        "AxBench (https://huggingface.co/papers/2501.17148).",
        {"concept": [2.0, 1.0], "instruction": [1.0, 0.0], "fluency": [2.0, 2.0]},
        {"steering_score": 0.75},
    )

    @staticmethod
    def measure(concept: Any, instruction: Any, fluency: Any) -> dict[str, float]:
        ratings = Ratings(tensor(concept, "concept"), tensor(instruction, "instruction"), tensor(fluency, "fluency"))
        return {"steering_score": float(ratings.overall.mean())}


class Repetition(SaeMetric):
    facts = MetricFacts(
        "repetition",
        "Repetition",
        "The share of word n-grams that occurred earlier in the same text, averaged over texts: one minus distinct-n. "
        "Steering that is too strong makes a model repeat itself.",
        {"predictions": "texts."},
        {"predictions": TEXT},
        "0 to 1. Lower is better.",
        "Texts of less than n words repeat nothing; a short answer looks better than a long one.",
        "distinct-n of https://huggingface.co/papers/1510.03055.",
        {"predictions": ["a b c d", "go on go on go on"], "n": 2},
        {"repetition": 0.3},
        {"n": "words of an n-gram; 3 by default."},
    )

    @staticmethod
    def measure(predictions: Any, n: int = 3) -> dict[str, float]:
        return {"repetition": repetition(list(predictions), n)}


class FirstDivergentToken(SaeMetric):
    facts = MetricFacts(
        "first_divergent_token",
        "First divergent token",
        "How many new tokens two greedy generations from the same prompt have in common before they part, averaged "
        "over prompts.",
        {
            "predictions": "token ids after the prompt, of the steered model.",
            "references": "token ids after the prompt, of the model as it is.",
        },
        {"predictions": COUNTS, "references": COUNTS},
        "0 to the length of the shorter one. Higher is closer to the model as it is.",
        "Two generations may part early and say the same.",
        "FDT of SCAR (https://huggingface.co/papers/2411.07122).",
        {"predictions": [[5, 6, 7], [5, 6]], "references": [[5, 6, 8], [5, 6]]},
        {"first_divergent_token": 2.0},
    )

    @staticmethod
    def measure(predictions: Any, references: Any) -> dict[str, float]:
        return {"first_divergent_token": mean_first_divergent_token(list(predictions), list(references))}


class KnowledgeSelection(SaeMetric):
    facts = MetricFacts(
        "knowledge_selection",
        "Knowledge selection",
        "Where context and memory disagree, the share of answers that match the context's and the share that match "
        "the remembered one, by exact match after the usual normalisation.",
        {
            "predictions": "answers.",
            "context": "the answers that count as the context's, a list a question.",
            "memory": "the answers that count as remembered, a list a question.",
        },
        {"predictions": TEXT, "context": TEXTS, "memory": TEXTS},
        "0 to 1 each. Which one should be high is a matter of the goal.",
        "A right answer in other words does not count.",
        "EM_C and EM_M of SpARE (https://huggingface.co/papers/2410.15999).",
        {
            "predictions": ["The Paris", "rome", "Oslo"],
            "context": [["paris"], ["Milan"], ["Bergen"]],
            "memory": [["London"], ["Rome"], ["Bodo"]],
        },
        {"em_context": 1 / 3, "em_memory": 1 / 3},
    )

    @staticmethod
    def measure(predictions: Any, context: Any, memory: Any) -> dict[str, float]:
        found = answer_behaviours(list(predictions), list(context), list(memory))
        n = len(found.context)
        return {"em_context": sum(found.context) / n, "em_memory": sum(found.memory) / n}
