"""Which descriptions a few words fit: BM25 over stemmed words, as arrays.

"The Probabilistic Relevance Framework: BM25 and Beyond" (https://doi.org/10.1561/1500000019), equation 3.15, k1 = 1.2
and b = 0.75. A word also counts, for less, where it only begins as one of the query does: `sarcasm` finds `sarcastic`.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable

import numpy as np

K1, B = 1.2, 0.75
ALIKE = 0.6  # what a word that only begins alike counts
SHORTEST = 5  # characters of a word that others may be like
WORD = re.compile(r"\w+", re.UNICODE)
STOP = """
a an and are as at be been but by can do does for from had has have he her his i if in into is it its may not of on or
our s she so such t than that the their them then there these they this those to up was we were what when where which
who will with you your
"""
ENDINGS = (
    ("ational", "ate"), ("fulness", "ful"), ("ousness", "ous"), ("iveness", "ive"), ("ization", "ize"),
    ("isation", "ize"), ("ingly", ""), ("ement", ""), ("ment", ""), ("ness", ""), ("edly", ""), ("ing", ""),
    ("ion", ""), ("ied", "y"), ("ed", ""), ("ly", ""),
)  # fmt: skip
IGNORED = frozenset(STOP.split())
PLURALS = (("sses", "ss"), ("ies", "y"), ("ss", "ss"), ("us", "us"), ("is", "is"), ("s", ""))


def stem(word: str) -> str:
    """A word without its commonest English endings.

    Simple on purpose: what it makes of a query and of a description need only be the same.
    """
    word = _without(_without(word, PLURALS), ENDINGS)
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]  # `running` was `runn`
    if len(word) > 3 and word.endswith("e"):
        word = word[:-1]
    return word[:-1] + "i" if len(word) > 3 and word.endswith("y") else word


def _without(word: str, endings: tuple[tuple[str, str], ...]) -> str:
    """A word with its ending, the first of these, put in another form; as it is where less than three letters stay."""
    for ending, instead in endings:
        if word.endswith(ending):
            rest = word[: len(word) - len(ending)]
            return rest + instead if len(rest) >= 3 else word
    return word


def words(text: str) -> list[str]:
    """The words of a text that say something, stemmed."""
    return [stem(word) for word in WORD.findall(text.lower()) if word not in IGNORED]


class WordIndex:
    """Texts by their words, made once.

    Args:
        texts: n of them.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        numbers: dict[str, int] = {}
        stems: dict[str, int] = {}
        ids, lengths = array("i"), array("i")
        for text in texts:
            before = len(ids)
            for word in WORD.findall(text.lower()):
                number = stems.get(word)
                if number is None:
                    number = -1 if word in IGNORED else numbers.setdefault(stem(word), len(numbers))
                    stems[word] = number
                if number >= 0:
                    ids.append(number)
            lengths.append(len(ids) - before)
        self.n = len(lengths)
        size = np.frombuffer(lengths, np.int32) if self.n else np.zeros(0, np.int32)
        owner = np.repeat(np.arange(self.n, dtype=np.int64), size)
        pairs = (np.frombuffer(ids, np.int32) if len(ids) else np.zeros(0, np.int32)).astype(np.int64)
        pairs, counts = np.unique(pairs * max(self.n, 1) + owner, return_counts=True)
        term, self._texts = np.divmod(pairs, max(self.n, 1))
        self._starts = np.searchsorted(term, np.arange(len(numbers) + 1))
        n_with = np.diff(self._starts)
        inverse = np.log(1 + (self.n - n_with + 0.5) / (n_with + 0.5))
        length = size[self._texts] / max(float(size.mean()) if self.n else 1.0, 1e-9)
        saturated = counts * (K1 + 1) / (counts + K1 * (1 - B + B * length))
        self._weights = (inverse[term] * saturated).astype(np.float32)
        self._numbers = numbers
        self._sorted = sorted(numbers)

    def scores(self, query: str) -> np.ndarray:
        """(n,) float32: how well each text fits; 0 for one without any of the words."""
        found = np.zeros(self.n, np.float32)
        for word in dict.fromkeys(words(query)):
            best = np.zeros(self.n, np.float32)
            for number, share in self._like(word):
                part = slice(self._starts[number], self._starts[number + 1])
                places = self._texts[part]
                best[places] = np.maximum(best[places], share * self._weights[part])
            found += best
        return found

    def _like(self, word: str) -> list[tuple[int, float]]:
        """The number of a word and of those that begin as it does, each with what it counts."""
        found = [(self._numbers[word], 1.0)] if word in self._numbers else []
        if len(word) >= SHORTEST:
            begin = word[: max(SHORTEST - 1, len(word) * 4 // 5)]
            for other in self._sorted[bisect_left(self._sorted, begin) : bisect_left(self._sorted, begin + "\uffff")]:
                if other != word and len(other) <= len(word) + 4:
                    found.append((self._numbers[other], ALIKE))
        return found
