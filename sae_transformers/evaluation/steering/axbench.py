"""How well steering brings a concept into answers: concept, instruction and fluency, each 0 to 2, after AxBench.

AxBench (https://huggingface.co/papers/2501.17148) has a language model rate a steered answer three times
and takes the harmonic mean, so that an answer that fails one of them scores 0. The strength of each method is chosen
on half of the instructions and reported on the other half. Who rates is open here: `OfflineJudge` needs no language
model, and is a proxy; its numbers are not comparable with AxBench's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.optional_packages import needs
from ..generation.continuations import Continuations, chat_prompts, continue_prompts, likelihood
from ..generation.fluency import repetition
from ..journal import Journal
from ..method_ids import MethodId
from ..settings import GenerationSettings

MOST = 2.0
ANSWERS = GenerationSettings(max_new_tokens=64, temperature=0.0)


class Ratings(NamedTuple):
    """Of n answers, (n,) float64 each, 0 to 2."""

    concept: Tensor
    instruction: Tensor
    fluency: Tensor

    @property
    def overall(self) -> Tensor:
        """Harmonic mean of the three, (n,); 0 where one of them is 0."""
        three = torch.stack(self)
        return torch.where((three > 0).all(0), 3 / (1 / three.clamp(min=1e-12)).sum(0), 0.0)

    def take(self, rows: Sequence[int]) -> Ratings:
        return Ratings(*(rating[list(rows)] for rating in self))


# (instructions, their answers, perplexity of the unsteered model on its own answers) -> ratings.
Judge = Callable[[Sequence[str], Continuations, float], Ratings]


@dataclass(frozen=True)
class SteeringMethod:
    """A way to bring a concept about.

    settings: names of what can be chosen, such as strengths, one or more. steerings: a `Steering`, or None for none,
    for each. instructions: what the model is asked in place of each instruction; None for the instruction itself.
    of: what it is, for the record.
    """

    settings: Sequence[str]
    steerings: Sequence[Any]
    instructions: Sequence[str] | None = None
    of: MethodId = MethodId("other")

    def __post_init__(self) -> None:
        if not self.settings or len(self.settings) != len(self.steerings):
            raise ValueError(
                f"Expected a steering for each setting, 1 or more. "
                f"Received: {len(self.settings)} settings, {len(self.steerings)} steerings."
            )


@dataclass(frozen=True)
class MethodResult:
    """One method on one concept.

    setting: chosen by the mean overall rating on half of the instructions. curve: setting -> that mean.
    concept, instruction, fluency, overall, perplexity, repetition: on the other half, with that setting. Perplexity is
    the unsteered model's, of the answers after the plain instructions.
    """

    setting: str
    curve: dict[str, float]
    concept: float
    instruction: float
    fluency: float
    overall: float
    perplexity: float
    repetition: float

    def numbers(self) -> dict[str, float]:
        """What was measured on the other half."""
        names = ("concept", "instruction", "fluency", "overall", "perplexity", "repetition")
        return {name: getattr(self, name) for name in names}


class OfflineJudge:
    """Ratings without a language model that judges: a proxy, fitted to texts of the concept.

    concept:      2 * probability of a logistic regression on TF-IDF of words, fitted to `positives` and `negatives`
    instruction:  2 * share of the other instructions whose reference is less like the answer than its own (cosine of
                  TF-IDF; ties count half)
    fluency:      2 * min(1, perplexity of the unsteered model's answers / perplexity of the answer)
                    * (1 - share of repeated word trigrams)

    The classifier counts words: it takes a list of the concept's words for the concept. An answer without a word is
    rated 0.

    Args:
        positives, negatives: texts with and without the concept.
        references: instruction -> a text that an answer to it is like; the instruction alone where there is none.
        seed: of the classifier.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are no positive or no negative texts.
    """

    def __init__(
        self,
        positives: Sequence[str],
        negatives: Sequence[str],
        references: Mapping[str, str] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.score = word_scorer(positives, negatives, seed=seed)
        self.references = dict(references or {})

    def __call__(self, instructions: Sequence[str], answers: Continuations, unsteered_perplexity: float) -> Ratings:
        said = torch.tensor([bool(text.strip()) for text in answers.texts]).double()
        repeated = torch.tensor([repetition([text]) for text in answers.texts], dtype=torch.float64)
        likely = (unsteered_perplexity / answers.perplexities).clamp(max=1)
        concept = self.score(answers.texts)
        return Ratings(
            MOST * concept * said, MOST * self._relevance(instructions, answers.texts) * said,
            MOST * likely * (1 - repeated) * said,
        )  # fmt: skip

    def _relevance(self, instructions: Sequence[str], texts: Sequence[str]) -> Tensor:
        from sklearn.feature_extraction.text import TfidfVectorizer

        different = list(dict.fromkeys(instructions))
        if len(different) < 2:
            return torch.ones(len(texts), dtype=torch.float64)
        known = [f"{text}\n{self.references.get(text, '')}" for text in different]
        vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english", token_pattern=r"(?u)\b\w+\b")
        rows: Any = vectorizer.fit_transform(known)
        alike = torch.from_numpy((vectorizer.transform(texts) @ rows.T).toarray())  # (texts, different)
        own = torch.tensor([different.index(text) for text in instructions])[:, None]
        mine = alike.gather(1, own)
        below, equal = (alike < mine).sum(1), (alike == mine).sum(1) - 1
        return (below + equal / 2) / (len(different) - 1)


def word_scorer(positives: Sequence[str], negatives: Sequence[str], *, seed: int = 0) -> Callable[..., Tensor]:
    """Probability that a text is one of the positives, by logistic regression on TF-IDF of its words.

    Returns:
        A function from texts to (n,) float64 in [0, 1].

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are no positive or no negative texts.
    """
    if not len(positives) or not len(negatives):
        raise ValueError(
            f"Texts with and without the concept are needed. "
            f"Received: {len(positives)} with, {len(negatives)} without."
        )
    with needs("A scorer of words", "scikit-learn", "evaluation"):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    rows = vectorizer.fit_transform([*positives, *negatives])
    labels = [1] * len(positives) + [0] * len(negatives)
    fit = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced", random_state=seed).fit(rows, labels)

    def score(texts: Sequence[str]) -> Tensor:
        if not len(texts):
            return torch.zeros(0, dtype=torch.float64)
        return torch.from_numpy(fit.predict_proba(vectorizer.transform(list(texts)))[:, 1]).double()

    return score


def evaluate_concept_steering(
    model: Any,
    tokenizer: Any,
    instructions: Sequence[str],
    methods: Mapping[str, SteeringMethod],
    judge: Judge,
    settings: GenerationSettings = ANSWERS,
    *,
    report: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> dict[str, MethodResult]:
    """Rate every method on every instruction; each method's strength is chosen on half of them.

    Args:
        model: a `SaeForCausalLM`.
        tokenizer: of the base; its chat template is used if it has one.
        instructions: two or more.
        methods: name -> method.
        judge: who rates, called once a method.
        settings: how answers are generated, one to each instruction, always in the chat template if there is one; the
            seed also draws the halves.
        report: called with the number of answers made after each batch.
        journal: has the answers of a run that was stopped, and gets the others.

    Returns:
        name -> result.

    Raises:
        ValueError: fewer than two instructions, a method with another number of them, or ratings that are not finite
            or outside [0, 2].
    """
    n = len(instructions)
    if isinstance(instructions, str) or n < 2:
        raise ValueError(f"Expected two instructions or more. Received: {n}.")
    for name, method in methods.items():
        if method.instructions is not None and len(method.instructions) != n:
            raise ValueError(
                f"Method {name!r} needs a text for each of {n} instructions. Received: {len(method.instructions)}."
            )
    order = random.Random(settings.seed).sample(range(n), n)
    search, held = sorted(order[: n // 2]), sorted(order[n // 2 :])
    plain = chat_prompts(tokenizer, instructions)
    prompts, steerings = list(plain), [None] * n
    places: dict[str, list[int]] = {}
    for name, method in methods.items():
        wanted = [steering for steering in method.steerings for _ in range(n)]
        if method.instructions is None and not any(wanted):
            places[name] = list(range(n)) * len(method.settings)  # the unsteered answers
            continue
        places[name] = list(range(len(prompts), len(prompts) + len(wanted)))
        asked = plain if method.instructions is None else chat_prompts(tokenizer, method.instructions)
        prompts += asked * len(method.settings)
        steerings += wanted
    everything = continue_prompts(
        model,
        tokenizer,
        prompts,
        steerings,
        settings,
        draws=list(range(n)) * (len(prompts) // n),
        report=report,
        journal=journal,
    )
    unsteered = everything.take(range(n))
    results = {}
    for name, method in methods.items():
        k, answers = len(method.settings), everything.take(places[name])
        if method.instructions is not None:  # how likely after the plain instruction, as for the other methods
            answers = likelihood(model, tokenizer, plain * k, answers.texts, rows_at_once=settings.batch_size)
        ratings = _checked(judge(list(instructions) * k, answers, unsteered.perplexity), n * k)
        overall = ratings.overall.view(k, n)
        means = overall[:, search].mean(1)
        best = int(means.argmax())
        rows = [best * n + place for place in held]
        chosen, said = ratings.take(rows), answers.take(rows)
        results[name] = MethodResult(
            method.settings[best],
            {setting: float(mean) for setting, mean in zip(method.settings, means, strict=True)},
            *(float(rating.mean()) for rating in (*chosen, chosen.overall)),
            perplexity=said.perplexity,
            repetition=repetition(said.texts),
        )
    return results


def _checked(ratings: Ratings, n: int) -> Ratings:
    for name, rating in zip(Ratings._fields, ratings, strict=True):
        if rating.shape != (n,) or not bool(((rating >= 0) & (rating <= MOST)).all()):
            raise ValueError(
                f"A judge gives ratings in [0, {MOST:g}] for each of {n} answers. Received: {name} of shape "
                f"{tuple(rating.shape)}, {int((~((rating >= 0) & (rating <= MOST))).sum())} of them outside."
            )
    return Ratings(*(rating.double().cpu() for rating in ratings))
