"""Pairs of texts in which only an attribute differs, from a list of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def read_word_pairs(pairs: str) -> list[tuple[str, str]]:
    """`he:she,him:her` as pairs.

    Raises:
        ValueError: a part is not word:word, or a word is there for two others.
    """
    found = [tuple(word.strip().lower() for word in part.split(":")) for part in pairs.split(",")]
    if any(len(pair) != 2 or not all(pair) or pair[0] == pair[1] for pair in found):
        raise ValueError(f"Words to swap are like he:she,him:her. Received: {pairs!r}.")
    left = [pair[0] for pair in found]
    if len(set(left)) < len(left):
        raise ValueError(f"A word can be swapped for one other. Received: {pairs!r}.")
    return [(pair[0], pair[1]) for pair in found]


def swap_words(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The text with both words of each pair swapped at once, whole words only, with their capitals.

    Of `he:she`, "He saw her." becomes "She saw her."; a word that stands on the right of two pairs, as of
    `him:her,his:her`, becomes the left one of the first.
    """
    pairs = list(pairs)
    other: dict[str, str] = {}
    for one, two in pairs:
        other.setdefault(one, two)
        other.setdefault(two, one)
    if not other:
        return text
    words = "|".join(map(re.escape, sorted(other, key=len, reverse=True)))

    def swapped(found: re.Match[str]) -> str:
        word = found.group()
        new = other[word.lower()]
        if word.isupper() and len(word) > 1:
            return new.upper()
        return new.capitalize() if word[0].isupper() else new

    return re.sub(rf"(?<!\w)(?:{words})(?!\w)", swapped, text, flags=re.IGNORECASE)


def swapped_pairs(texts: Sequence[str], pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The texts that have one of the words, each once, and what they become."""
    pairs = list(pairs)
    changed = {text: new for text in texts if (new := swap_words(text, pairs)) != text}
    return list(changed), list(changed.values())
