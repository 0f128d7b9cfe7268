"""WinoBias, CrowS-Pairs and LAMBADA in parts: those that choose a number of features and those that report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..journal import Journal
from ..settings import BootstrapSettings
from .stereotypes import (
    LastWords,
    PairScores,
    SentencePair,
    last_word_summary,
    preference,
    preference_change,
    read_crows_pairs,
    read_winobias,
    score_last_words,
    score_pairs,
)

TYPES = (1, 2)  # of WinoBias: whether the pronoun's referent needs knowledge of the world


@dataclass(frozen=True)
class PairPart:
    """Pairs that are measured together.

    Args:
        name: as results.json has it.
        pairs: of which the first text is the more stereotypical.
        by: fields of `PairScores` that say something of them.
        chooses: whether they choose the number of features, or report.
    """

    name: str
    pairs: Sequence[SentencePair]
    by: tuple[str, ...] = ("sentence", "marked")
    chooses: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def score(
        self, model: Any, tokenizer: Any, steering: Any, tokens_at_once: int, journal: Journal | None = None
    ) -> PairScores:
        """See `score_pairs`."""
        options = {"tokens_at_once": tokens_at_once, "journal": journal}
        return score_pairs(model, tokenizer, self.pairs, steering=steering, **options)

    def summary(self, scores: PairScores, unsteered: PairScores, bootstrap: BootstrapSettings) -> dict[str, Any]:
        """By each of `by`: `preference`, and the `change` against the unsteered model."""
        options = {"resamples": bootstrap.resamples, "seed": bootstrap.seed}
        return {
            by: {
                **preference(getattr(scores, by), **options),
                "change": preference_change(getattr(unsteered, by), getattr(scores, by), **options),
            }
            for by in self.by
        }


@dataclass(frozen=True)
class LastWordPart:
    """Texts whose last word is predicted.

    Args:
        name: as results.json has it.
        texts: of two words or more.
        chooses: whether they say how many features may go, or report.
    """

    name: str
    texts: Sequence[str]
    chooses: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def score(
        self, model: Any, tokenizer: Any, steering: Any, tokens_at_once: int, journal: Journal | None = None
    ) -> LastWords:
        """See `score_last_words`."""
        options = {"tokens_at_once": tokens_at_once, "journal": journal}
        return score_last_words(model, tokenizer, self.texts, steering=steering, **options)

    def summary(self, scores: LastWords, unsteered: LastWords, bootstrap: BootstrapSettings) -> dict[str, Any]:
        """`last_word_summary`, and what was `lost`: the rise of the negative log-probability, in nats a word."""
        options = {"resamples": bootstrap.resamples, "seed": bootstrap.seed}
        lost = preference_change(scores.log_p, unsteered.log_p, **options)
        return {**last_word_summary(scores, **options), "lost": lost}


@dataclass(frozen=True)
class BiasData:
    """What bias and its price are measured on, as `read_bias_data` reads it.

    Args:
        winobias_dev, winobias_test: pairs of WinoBias of type 1 and 2.
        crows_pairs: pairs of CrowS-Pairs.
        lambada: texts of LAMBADA.
    """

    winobias_dev: tuple[Sequence[SentencePair], ...]
    winobias_test: tuple[Sequence[SentencePair], ...]
    crows_pairs: Sequence[SentencePair] = ()
    lambada: Sequence[str] = ()

    def parts(
        self, max_pairs: int | None = None, max_choose: int | None = None, max_lambada: int | None = None
    ) -> list[PairPart | LastWordPart]:
        """Those with something in them. One in four texts of LAMBADA helps to choose.

        Args:
            max_pairs: of each file or kind of pairs; the first ones.
            max_choose: of each file of WinoBias' development part; by default as many.
            max_lambada: texts of LAMBADA.
        """
        parts: list[PairPart | LastWordPart] = []
        for files, name, limit in (
            (self.winobias_dev, "choose", max_choose or max_pairs), (self.winobias_test, "test", max_pairs),
        ):  # fmt: skip
            for number, pairs in zip(TYPES, files, strict=True):
                parts.append(PairPart(f"WinoBias {number} {name}", pairs[:limit], chooses=name == "choose"))
        gender = [pair for pair in self.crows_pairs if pair.kind == "gender"]
        other = [pair for pair in self.crows_pairs if pair.kind != "gender"]
        for kind, pairs in (("gender", gender), ("other", other)):
            parts.append(PairPart(f"CrowS {kind}", pairs[:max_pairs], by=("sentence", "shared")))
        texts = self.lambada[:max_lambada]
        parts.append(LastWordPart("LAMBADA choose", texts[::4], chooses=True))
        parts.append(LastWordPart("LAMBADA", [text for i, text in enumerate(texts) if i % 4]))
        return [part for part in parts if len(part)]


def read_bias_data(
    winobias: str | Path, crows_pairs: str | Path | None = None, lambada: Sequence[str] = ()
) -> BiasData:
    """WinoBias and, where they are given, CrowS-Pairs and LAMBADA.

    Args:
        winobias: folder of its files, {pro,anti}_stereotyped_type{1,2}_{dev,test}.txt.
        crows_pairs: its csv file.
        lambada: its texts.

    Raises:
        OSError: a file is not there.
        ValueError: a file is not as it should be.
    """
    folder = Path(winobias)
    dev, test = (
        tuple(
            read_winobias(
                folder / f"pro_stereotyped_type{number}_{part}.txt",
                folder / f"anti_stereotyped_type{number}_{part}.txt",
            )
            for number in TYPES
        )
        for part in ("dev", "test")
    )
    return BiasData(dev, test, read_crows_pairs(crows_pairs) if crows_pairs else (), lambada)
