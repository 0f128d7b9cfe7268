"""Steer towards the topic of some texts, and say how far to trust it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...create_training_data.sentence_embeddings import SentenceEmbedder
from ...evaluation.journal import Journal, Watch, quick_fingerprint, result_of
from ...evaluation.scorers.acceptability import AcceptabilityClassifier, SlorScorer, unigram_log_probs
from ...evaluation.topics.alignment import (
    TextEvidence,
    calibrate_threshold,
    feature_kinds,
    topic_selectivity,
    topic_uncertainty,
)
from ...evaluation.topics.generation import UNSTEERED, TopicComparison
from ...evaluation.topics.settings import TopicMethod
from ...latents.context import reading_length
from ...latents.sparse_codes import SparseCodes
from ...latents.text_input import plain_texts
from ...latents.text_latents import sae_of
from ...latents.texts import read_column as read_column
from ...modeling import Steering
from ...modeling.modeling_sae import SaePreTrainedModel
from ...training.steering.lora import tune_on_texts
from ...training.steering.topic_scores import (
    AFTER_FIRST,
    TopicScores,
    topic_distances,
    topic_scores,
    topic_steering,
)
from ...training.steering.topic_scores import read_topic_scores as read_topic_scores
from ..going_on import forgotten_if_refused, rows_sha256, verb_journal
from ..results import Count, Progress
from ..settings.align_topic import TopicScoringSettings, TopicSettings
from .topic_reading import TopicReading
from .topic_result import TopicResult


@dataclass(frozen=True)
class TopicTexts:
    """What a topic is told by. Each field is as `text_input.TEXTS` says: a list, a `Dataset`, a DataFrame, a path.

    Args:
        reference: texts of all kinds, a hundred or more.
        topic: texts of the topic, about twenty.
        topic_test: other texts of the topic, to which the similarity of continuations is measured; by default
            `topic`.
        prompts: texts to continue; by default the beginnings of reference texts.
    """

    reference: Any
    topic: Any
    topic_test: Any = None
    prompts: Any = None


def align_topic(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: TopicTexts,
    settings: TopicSettings | None = None,
    *,
    sae: int = 0,
    scores: TopicScores | None = None,
    embedder: SentenceEmbedder | None = None,
    progress: Progress | None = None,
) -> TopicResult:
    """Score latents by how near to the topic the texts are in which they are active, and steer by the scores.

    "Enabling precise topic alignment in large language models via sparse autoencoders"
    (https://huggingface.co/papers/2506.12576).

    Args:
        sae: number of the SAE whose latents are scored; it reconstructs what it reads.
        scores: in place of new ones, as `read_topic_scores` gives them.
        embedder: in place of the one that the settings name.

    Raises:
        ValueError: texts or settings that say nothing, or do not fit the model.
        TypeError: something holds no texts.
        OSError: there is no such embedder or classifier.
    """
    settings = settings or TopicSettings()
    length = reading_length(model, settings.reading.max_length, 256)
    settings = replace(settings, reading=replace(settings.reading, max_length=length))
    sae_of(model, sae)
    return _Run(model, tokenizer, settings, sae, embedder or settings.embedding.load(), progress).result(texts, scores)


class _Run:
    """What the steps of one alignment share."""

    def __init__(
        self,
        model: SaePreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TopicSettings,
        sae: int,
        embedder: SentenceEmbedder,
        progress: Progress | None,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.number = model, tokenizer, settings, sae
        self.sae = sae_of(model, sae)
        self.embedder, self.count = embedder, Count(progress, 0)
        self.classifier = settings.measuring.classifier()

    def result(self, texts: TopicTexts, scores: TopicScores | None) -> TopicResult:
        if scores is not None and len(scores.scores) != self.sae.config.d_sae:
            raise ValueError(
                f"Expected a score for each of {self.sae.config.d_sae} latents; is the table of another SAE? "
                f"Received: {len(scores.scores)}."
            )
        given = {"reference": plain_texts(texts.reference), "topic": plain_texts(texts.topic)}
        test = given["topic"] if texts.topic_test is None else plain_texts(texts.topic_test)
        prompts = None if texts.prompts is None else plain_texts(texts.prompts)
        methods, measuring = self.settings.scoring.methods(), self.settings.measuring
        runs = len([method for method in methods if method.name != UNSTEERED]) + 2 + (measuring.lora_epochs > 0)
        count = min(measuring.prompt_count, len(given["reference"] if prompts is None else prompts))
        self.count.total = sum(map(len, given.values())) + runs * count
        journal = verb_journal(
            self.settings.journal, self.model.lm, self.sae, self.settings, self.number,
            [rows_sha256(rows) for rows in (*given.values(), test, prompts or ())],
            [self.embedder.max_tokens, quick_fingerprint(self.embedder.model), self.tokenizer.get_vocab()],
        )  # fmt: skip
        with forgotten_if_refused(journal):
            watch = Watch(self.count, journal)
            self.reading = TopicReading(self.model, self.tokenizer, self.settings, self.number, watch)
            read = {"reference": self.reading.read("reference", given["reference"])}
            read["topic"] = self.reading.read("topic", given["topic"], read["reference"])
            embeddings = {part: self._embedded(one.texts) for part, one in read.items()}
            evidence = {part: one.evidence(embeddings[part]) for part, one in read.items()}
            begin = time.perf_counter()
            distances = topic_distances(embeddings["reference"], embeddings["topic"])
            scores = scores or topic_scores(evidence["reference"].summaries, distances)
            seconds = self.reading.seconds + time.perf_counter() - begin
            threshold, error_threshold = result_of(
                journal,
                lambda: "threshold",
                lambda: _threshold(evidence["reference"], len(read["topic"].texts), self.settings.embedding.quantile),
            )
            steerings = {
                method.name: _steering(self.settings.scoring, method, scores, self.number) for method in methods
            }
            steering = steerings[self.settings.scoring.method]
            self.model.prepare_steering(steering)  # an error ends here
            comparison = None
            if measuring.prompt_count > 0:
                comparison = self._comparison(read["reference"].ids, test, prompts, journal)
                self._measure(comparison, steerings, read["topic"].ids, seconds)
            self.count.reached(self.count.total)
            return TopicResult(
                steering=steering,
                scores=scores,
                latents=_latent_columns(evidence["topic"].summaries, evidence["reference"].summaries),
                uncertainty=topic_uncertainty(evidence["topic"], evidence["reference"], scores.scores),
                threshold=threshold,
                error_threshold=error_threshold,
                mean_distance=float(distances.mean()),
                methods={} if comparison is None else comparison.rows,
                samples=[] if comparison is None else comparison.samples(),
                texts={part: len(one.texts) for part, one in read.items()},
                tokens={part: one.tokens for part, one in read.items()},
                left_out={part: one.left_out for part, one in read.items()},
                cut={part: one.cut for part, one in read.items()},
                seconds=seconds,
                embedder=self.embedder.name,
                embedding_tokens=self.embedder.max_tokens,
                settings=self.settings,
                unused_prompts=0 if prompts is None else max(0, len(prompts) - measuring.prompt_count),
                journal=journal,
            )

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        told = {"embedded": rows_sha256(texts)}
        return self.reading.kept(told, lambda: {"embeddings": self.embedder.embed(texts)})["embeddings"]

    def _comparison(
        self,
        reference: Sequence[Tensor],
        test: Sequence[str],
        prompts: Sequence[str] | None,
        journal: Journal | None,
    ) -> TopicComparison:
        measuring = self.settings.measuring
        if prompts is None:
            starts = [
                str(self.tokenizer.decode(ids[: measuring.prompt_tokens], skip_special_tokens=True))
                for ids in reference
            ]
            prompts = [start for start in dict.fromkeys(starts) if start.strip()]
        scorer: AcceptabilityClassifier | SlorScorer | None = self.classifier
        if scorer is None:
            # Of the base itself: the model around it would apply its default steering.
            vocabulary = self.model.config.get_text_config().vocab_size
            scorer = SlorScorer(self.model.lm, self.tokenizer, unigram_log_probs(reference, vocabulary))
        return TopicComparison(
            self.model,
            self.tokenizer,
            prompts[: measuring.prompt_count],
            self._embedded(test),
            self.embedder.embed,
            scorer.score,
            measuring.generation,
            journal,
        )

    def _measure(
        self,
        comparison: TopicComparison,
        steerings: Mapping[str, Steering],
        topic: Sequence[Tensor],
        seconds: float,
    ) -> None:
        measuring, count = self.settings.measuring, len(comparison.prompts)
        comparison.measure(UNSTEERED)
        self.count(count)
        for name, steering in steerings.items():
            if name != UNSTEERED:
                comparison.measure(name, steering, preparation_seconds=0.0 if name == "SAE" else seconds)
                self.count(count)
        prefix = measuring.topic_prompt or self.tokenizer.decode(topic[0], skip_special_tokens=True)
        comparison.measure("prompting", prefix=f"{prefix}\n\n")
        self.count(count)
        if measuring.lora_epochs > 0:
            told = {"LoRA": rows_sha256(topic), "prompts": rows_sha256(comparison.prompts)}
            made = self.reading.watch.keep(told, lambda: self._tuned(comparison, topic))
            continued = comparison.generated(made["ids"], float(made["seconds"]))
            comparison.judge("LoRA", continued, float(made["trained"]))
            self.count(count)

    def _tuned(self, comparison: TopicComparison, topic: Sequence[Tensor]) -> dict[str, Tensor]:
        """Continuations of a base that is fine-tuned on the topic's texts, and the seconds of both."""
        measuring, begin = self.settings.measuring, time.perf_counter()
        tuned = tune_on_texts(
            self.model.lm, topic, rank=measuring.lora_rank, epochs=measuring.lora_epochs,
            seed=measuring.generation.seed,
        )  # fmt: skip
        trained = time.perf_counter() - begin
        made = comparison.generate(generator=tuned)
        tuned.unload()  # the base judges as it was
        spent = {"seconds": made["seconds"], "trained": trained}
        return {"ids": made["ids"], **{name: torch.tensor(one, dtype=torch.float64) for name, one in spent.items()}}


def _threshold(reference: TextEvidence, topic_size: int, quantile: float) -> tuple[float | None, float | None]:
    """Of uncertainty, and of reconstruction error; None where there are too few reference texts."""
    if len(reference) * (1 - quantile) < 1 - 1e-9:
        return None, None

    def score(summaries: SparseCodes, distances: Tensor) -> Tensor:
        return topic_scores(summaries, distances).scores

    found = calibrate_threshold(reference, topic_size, score, topic_distances, quantile=quantile)
    return found.threshold, found.error


def _steering(settings: TopicScoringSettings, method: TopicMethod, scores: TopicScores, sae: int) -> Steering:
    return topic_steering(
        method.method,
        scores.scores,
        sae=sae,
        # Otherwise `SAE` would be the unsteered model.
        keep_error=method.keep_error and method.method != "SAE",
        strength=method.strength,
        top=settings.clamp_top,
        value=settings.clamp_value,
        unit=settings.clamp_unit,
        positions="all" if settings.all_positions else AFTER_FIRST,
    )


def _latent_columns(topic: SparseCodes, reference: SparseCodes) -> dict[str, Sequence[Any]]:
    selectivity = topic_selectivity(topic, reference)
    return {
        "reference_texts": reference.counts().tolist(),
        "topic_share": [None if value != value else value for value in selectivity.tolist()],
        "kind": feature_kinds(selectivity),
    }
