"""Steer towards the topic of some texts, and say how far to trust it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...create_training_data.sentence_embeddings import SentenceEmbedder
from ...evaluation.scorers.acceptability import AcceptabilityClassifier, SlorScorer, unigram_log_probs
from ...evaluation.topics.alignment import (
    TextEvidence,
    UncertaintyThreshold,
    calibrate_threshold,
    feature_kinds,
    reconstruction_sums,
    topic_selectivity,
    topic_uncertainty,
)
from ...evaluation.topics.generation import UNSTEERED, TopicComparison
from ...evaluation.topics.settings import TopicMethod
from ...latents.context import reading_length
from ...latents.hidden_states import HiddenStateReader
from ...latents.sparse_codes import SparseCodes
from ...latents.text_input import plain_texts
from ...latents.text_latents import sae_of
from ...latents.text_states import TextStates, read_text_states
from ...latents.texts import read_column as read_column
from ...modeling import Steering
from ...modeling.modeling_sae import SaePreTrainedModel
from ...training.steering.lora import tune_on_texts
from ...training.steering.topic_scores import (
    AFTER_FIRST,
    TopicScores,
    prompt_summaries,
    topic_distances,
    topic_scores,
    topic_steering,
)
from ...training.steering.topic_scores import read_topic_scores as read_topic_scores
from ..results import Count, Progress
from ..settings.align_topic import TopicScoringSettings, TopicSettings
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
        begin = time.perf_counter()
        states = self._states(given)
        embeddings = {part: self.embedder.embed(states[part].texts) for part in states}
        centre = states["reference"].hidden.double().mean(0)
        evidence = {part: self._evidence(states[part], embeddings[part], centre) for part in states}
        distances = topic_distances(embeddings["reference"], embeddings["topic"])
        scores = scores or topic_scores(evidence["reference"].summaries, distances)
        seconds = time.perf_counter() - begin
        threshold = _threshold(evidence["reference"], len(states["topic"].texts), self.settings.embedding.quantile)
        steerings = {method.name: _steering(self.settings.scoring, method, scores, self.number) for method in methods}
        steering = steerings[self.settings.scoring.method]
        self.model.prepare_steering(steering)  # an error ends here
        comparison = None
        if measuring.prompt_count > 0:
            comparison = self._comparison(states["reference"], test, prompts)
            self._measure(comparison, steerings, states["topic"], seconds)
        self.count.reached(self.count.total)
        return TopicResult(
            steering=steering,
            scores=scores,
            latents=_latent_columns(evidence["topic"].summaries, evidence["reference"].summaries),
            uncertainty=topic_uncertainty(evidence["topic"], evidence["reference"], scores.scores),
            threshold=None if threshold is None else threshold.threshold,
            error_threshold=None if threshold is None else threshold.error,
            mean_distance=float(distances.mean()),
            methods={} if comparison is None else comparison.rows,
            samples=[] if comparison is None else comparison.samples(),
            texts={part: len(some.texts) for part, some in states.items()},
            tokens={part: len(some.hidden) for part, some in states.items()},
            left_out={part: some.left_out for part, some in states.items()},
            cut={part: some.cut for part, some in states.items()},
            seconds=seconds,
            embedder=self.embedder.name,
            embedding_tokens=self.embedder.max_tokens,
            settings=self.settings,
            unused_prompts=0 if prompts is None else max(0, len(prompts) - measuring.prompt_count),
        )

    def _states(self, given: Mapping[str, Sequence[str]]) -> dict[str, TextStates]:
        reader = HiddenStateReader(self.model.lm, [self.sae.config.read_at], config=self.model.config)
        states: dict[str, TextStates] = {}
        for part, texts in given.items():
            states[part] = read_text_states(
                reader,
                self.tokenizer,
                texts,
                max_tokens=self.settings.reading.max_length or 0,
                max_norm=states["reference"].max_norm if states else None,
                skip_first=self.settings.reading.skip_first,
                tokens_at_once=self.settings.reading.tokens_per_batch,
                report=self.count,
            )
        return states

    def _evidence(self, states: TextStates, embeddings: Tensor, centre: Tensor) -> TextEvidence:
        of_texts = (states.hidden, states.text_index, len(states.texts))
        sums = reconstruction_sums(self.sae, *of_texts, centre)
        summaries = prompt_summaries(self.sae, *of_texts, summary=self.settings.scoring.summary)
        return TextEvidence(summaries, embeddings, *sums)

    def _comparison(
        self, reference: TextStates, test: Sequence[str], prompts: Sequence[str] | None
    ) -> TopicComparison:
        measuring = self.settings.measuring
        if prompts is None:
            starts = [
                str(self.tokenizer.decode(ids[: measuring.prompt_tokens], skip_special_tokens=True))
                for ids in reference.ids
            ]
            prompts = [start for start in dict.fromkeys(starts) if start.strip()]
        scorer: AcceptabilityClassifier | SlorScorer | None = self.classifier
        if scorer is None:
            # Of the base itself: the model around it would apply its default steering.
            vocabulary = self.model.config.get_text_config().vocab_size
            scorer = SlorScorer(self.model.lm, self.tokenizer, unigram_log_probs(reference.ids, vocabulary))
        return TopicComparison(
            self.model,
            self.tokenizer,
            prompts[: measuring.prompt_count],
            self.embedder.embed(test),
            self.embedder.embed,
            scorer.score,
            measuring.generation,
        )

    def _measure(
        self, comparison: TopicComparison, steerings: Mapping[str, Steering], topic: TextStates, seconds: float
    ) -> None:
        measuring, count = self.settings.measuring, len(comparison.prompts)
        comparison.measure(UNSTEERED)
        self.count(count)
        for name, steering in steerings.items():
            if name != UNSTEERED:
                comparison.measure(name, steering, preparation_seconds=0.0 if name == "SAE" else seconds)
                self.count(count)
        prefix = measuring.topic_prompt or self.tokenizer.decode(topic.ids[0], skip_special_tokens=True)
        comparison.measure("prompting", prefix=f"{prefix}\n\n")
        self.count(count)
        if measuring.lora_epochs > 0:
            begin = time.perf_counter()
            tuned = tune_on_texts(
                self.model.lm,
                topic.ids,
                rank=measuring.lora_rank,
                epochs=measuring.lora_epochs,
                seed=measuring.generation.seed,
            )
            trained = time.perf_counter() - begin
            continuations = comparison.generate(generator=tuned)
            tuned.unload()  # the base judges as it was
            comparison.judge("LoRA", continuations, trained)
            self.count(count)


def _threshold(reference: TextEvidence, topic_size: int, quantile: float) -> UncertaintyThreshold | None:
    """None where there are too few reference texts."""
    if len(reference) * (1 - quantile) < 1 - 1e-9:
        return None

    def score(summaries: SparseCodes, distances: Tensor) -> Tensor:
        return topic_scores(summaries, distances).scores

    return calibrate_threshold(reference, topic_size, score, topic_distances, quantile=quantile)


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
