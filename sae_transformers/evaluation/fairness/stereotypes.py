"""Does a language model prefer stereotypes, and what can it still do? WinoBias, CrowS-Pairs and LAMBADA by likelihood.

All of them compare log-probabilities of texts under a causal language model; nothing is generated. Each text stands
after the tokenizer's beginning token, so that its first word counts too.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.text_files import read_lines
from ..classification import bootstrap_interval, mean_interval
from ..generation.log_likelihood import encode_after_start, token_scores
from ..journal import Journal

PRONOUNS = frozenset({"he", "she", "him", "her", "his", "hers", "himself", "herself"})


class SentencePair(NamedTuple):
    """Two texts of which the first is the more stereotypical. marked: the characters (start, end) of the words that
    differ in each, where the data marks them. kind: a group of pairs."""

    more: str
    less: str
    marked: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] = ((), ())
    kind: str = ""


def read_winobias(pro: str | Path, anti: str | Path, kind: str = "") -> list[SentencePair]:
    """WinoBias pairs from its two files, numbered lines with the referents in brackets, line by line.

    "Gender Bias in Coreference Resolution" (https://huggingface.co/papers/1804.06876). The lines of a pair differ in
    the pronoun; it is what is marked.

    Raises:
        ValueError: the files have different numbers of lines, or a line has no pronoun in brackets.
    """
    sides = [[_unbracketed(line, Path(path)) for line in read_lines(path)] for path in (pro, anti)]
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        raise ValueError(f"Expected as many lines in both files. Received: {len(sides[0])} and {len(sides[1])}.")
    return [
        SentencePair(more, less, (spans, others), kind)
        for (more, spans), (less, others) in zip(sides[0], sides[1], strict=True)
    ]


def read_crows_pairs(path: str | Path, kinds: Sequence[str] | None = None) -> list[SentencePair]:
    """CrowS-Pairs from its csv file: `sent_more` says what is more stereotypical, `sent_less` less.

    "CrowS-Pairs: A Challenge Dataset for Measuring Social Biases in Masked Language Models"
    (https://huggingface.co/papers/2010.00133).

    Args:
        kinds: of `bias_type`, such as `gender`; all by default.

    Raises:
        ValueError: a column is missing, or there is no pair of these kinds.
    """
    needed = ("sent_more", "sent_less", "bias_type")
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
            raise ValueError(
                f"CrowS-Pairs has columns {', '.join(needed)}. Received: {Path(path).name} without {missing}."
            )
        rows = list(reader)
    known = sorted({row["bias_type"] for row in rows})
    pairs = [
        SentencePair(row["sent_more"].strip(), row["sent_less"].strip(), kind=row["bias_type"])
        for row in rows
        if kinds is None or row["bias_type"] in kinds
    ]
    if not pairs:
        raise ValueError(f"Expected kinds of {known}. Received: kinds={kinds!r}.")
    return pairs


class PairScores(NamedTuple):
    """log p(more) - log p(less) of n pairs, in nats, float64: what is above 0 prefers the stereotype.

    sentence: (n,), of the whole texts.
    shared: (n,), of the tokens that both texts have, each given what stands before it. The pseudo-likelihood of
        CrowS-Pairs, whose masked models see both sides of a token; a causal one sees the left side, so that only
        tokens after the words that differ can tell, and a pair that differs at its end scores 0.
    marked: (n,), of the marked words given what stands before them; nan where nothing is marked.
    """

    sentence: Tensor
    shared: Tensor
    marked: Tensor


def score_pairs(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[SentencePair],
    *,
    steering: Any = None,
    tokens_at_once: int = 1024,
    report: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> PairScores:
    """How much more likely the more stereotypical text of each pair is.

    What both texts begin with is as likely in both and is not scored.

    Args:
        model: a causal language model, with SAEs or without.
        steering, tokens_at_once, report, journal: as for `likelihood.token_scores`.

    Raises:
        ValueError: there is no pair, the texts of a pair are the same or empty, or a text is too long.
    """
    if not pairs:
        raise ValueError("Expected pairs of texts. Received: none.")
    rows, places = encode_after_start(tokenizer, [text for pair in pairs for text in (pair.more, pair.less)])
    first, matches = [], []
    for number, (more, less) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        same = next((i for i, (a, b) in enumerate(zip(more, less, strict=False)) if a != b), min(len(more), len(less)))
        if same in (len(more), len(less)):
            raise ValueError(
                f"The texts of a pair must differ, and neither begin with the other. Received: pair {number}, whose "
                f"{len(more) - 1} and {len(less) - 1} tokens are the same up to token {same - 1}."
            )
        first += [same, same]
        matches.append(_equal_places(more, less, same))
    scores = token_scores(
        model, rows, first, steering=steering, tokens_at_once=tokens_at_once, report=report, journal=journal
    ).log_p
    found = torch.full((3, len(pairs)), math.nan, dtype=torch.float64)
    for number, pair in enumerate(pairs):
        more, less = scores[2 * number : 2 * number + 2]
        found[0, number] = more.sum() - less.sum()
        a, b = matches[number]
        found[1, number] = more[a].sum() - less[b].sum()
        marked = [
            _inside(places[2 * number + side][first[2 * number] :], spans) for side, spans in enumerate(pair.marked)
        ]
        if bool(marked[0].any()) and bool(marked[1].any()):
            found[2, number] = more[marked[0]].sum() - less[marked[1]].sum()
    return PairScores(*found)


def preference(differences: Tensor, *, resamples: int = 2000, seed: int = 0) -> dict[str, dict[str, float]]:
    """What pairs say together.

    Args:
        differences: (n,), of `PairScores`; nan counts for nothing.
        resamples, seed: of the bootstrap over pairs.

    Returns:
        `share`, of pairs whose stereotypical text is more likely, ties counted half (0.5 is no preference); `gap`,
        the mean difference in nats (0 is none). Each with `value` and the 95 % interval, `low` and `high`. And
        `pairs`, whose `value` is their number, and `ties`.
    """
    known = differences[~differences.isnan()].double()
    if not len(known):
        raise ValueError("Expected a pair with a score. Received: none.")
    ties = known == 0
    share = torch.where(ties, 0.5, (known > 0).double())
    drawn = {"resamples": resamples, "seed": seed}
    return {
        "share": mean_interval(share, **drawn), "gap": mean_interval(known, **drawn),
        "pairs": {"value": len(known)}, "ties": {"value": int(ties.sum())},
    }  # fmt: skip


def preference_change(before: Tensor, after: Tensor, *, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Mean of `after - before` over the same pairs, in nats, with the 95 % bootstrap interval over pairs.

    Args:
        before, after: (n,), of `PairScores`; pairs with a nan on either side count for nothing.
    """
    change = (after - before).double()
    change = change[~change.isnan()]
    if before.shape != after.shape or not len(change):
        raise ValueError(f"Expected scores of the same pairs. Received: {tuple(before.shape)}, {tuple(after.shape)}.")
    return mean_interval(change, resamples=resamples, seed=seed)


class LastWords(NamedTuple):
    """Of n texts: log_p (n,) float64, log-probability of the last word given the rest; right (n,) bool, whether each
    of its tokens was the most likely one."""

    log_p: Tensor
    right: Tensor


def score_last_words(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    steering: Any = None,
    tokens_at_once: int = 1024,
    report: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> LastWords:
    """LAMBADA: is the last word of a passage what the model expects? (https://huggingface.co/papers/1606.06031)

    Args:
        texts: two words or more each.
        steering, tokens_at_once, report, journal: as for `likelihood.token_scores`.

    Raises:
        ValueError: there is no text, one has a single word, or is too long.
    """
    texts = [text.strip() for text in texts]
    if not texts or any(len(text.split()) < 2 for text in texts):
        raise ValueError(
            f"Expected texts of two words or more. Received: {len(texts)} texts, with shorter ones or none."
        )
    rows, places = encode_after_start(tokenizer, texts)
    first = []
    for text, characters in zip(texts, places, strict=True):
        word = len(text) - len(text.split()[-1])
        first.append(next(i for i, (_, end) in enumerate(characters) if end > word))
    scores = token_scores(
        model, rows, first, steering=steering, tokens_at_once=tokens_at_once, report=report, journal=journal
    )
    return LastWords(
        torch.stack([values.sum() for values in scores.log_p]), torch.stack([hits.all() for hits in scores.greedy])
    )


def last_word_summary(scores: LastWords, *, resamples: int = 2000, seed: int = 0) -> dict[str, dict[str, float]]:
    """`accuracy`, share of last words that a greedy model writes, and `perplexity`, exp of the mean negative
    log-probability of a word; each with `value` and the 95 % bootstrap interval over texts."""
    log_p = scores.log_p.double()
    low, high = bootstrap_interval(log_p, lambda x: math.exp(-float(x.mean())), resamples=resamples, seed=seed)
    return {
        "accuracy": mean_interval(scores.right.double(), resamples=resamples, seed=seed),
        "perplexity": {"value": math.exp(-float(log_p.mean())), "low": low, "high": high},
    }


def _unbracketed(line: str, path: Path) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A line without its number and brackets, and the characters of the pronouns that were in brackets."""
    text, spans = "", []
    for part in re.split(r"(\[[^\]]*\])", re.sub(r"^\s*\d+\s+", "", line).strip()):
        inside = part[1:-1] if part.startswith("[") else part
        if part.startswith("[") and inside.strip().lower() in PRONOUNS:
            spans.append((len(text), len(text) + len(inside)))
        text += inside
    if not spans:
        raise ValueError(f"Each line of WinoBias has a pronoun in brackets. Received: a line without, in {path.name}.")
    return text, tuple(spans)


def _equal_places(more: Sequence[int], less: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
    """Places, counted from `first`, of the tokens that both rows share, as CrowS-Pairs aligns them."""
    blocks = difflib.SequenceMatcher(None, more, less, autojunk=False).get_matching_blocks()
    pairs = [(b.a + i, b.b + i) for b in blocks for i in range(b.size) if b.a + i >= first and b.b + i >= first]
    return tuple(torch.tensor([pair[side] - first for pair in pairs], dtype=torch.long) for side in (0, 1))  # pyright: ignore[reportReturnType]


def _inside(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Which tokens have a character in a span, (n,) bool."""
    hits = [any(start < stop and end > begin for begin, stop in spans) for start, end in places]
    return torch.tensor(hits, dtype=torch.bool)
