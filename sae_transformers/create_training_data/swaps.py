"""Pairs of texts in which only an attribute differs, from pairs of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


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
    return _replaced(text, other)


def swapped_pairs(texts: Sequence[str], pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The texts that have one of the words, each once, and what they become."""
    pairs = list(pairs)
    changed = {text: new for text in texts if (new := swap_words(text, pairs)) != text}
    return list(changed), list(changed.values())


def both_versions(texts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Each text that has one of the words, all of them as the first of their pair, and all as the second.

    Unlike those of `swapped_pairs`, which go from male to female in some texts and back in others, all pairs point one
    way, so that the difference of a feature of one gender has the same sign in every text.

    Args:
        pairs: (first, second) words in lower case, such as (he, she); a word that is in several pairs becomes the
            other one of the first of these, so that of (him, her), (his, her) "her" becomes "him".

    Returns:
        The two lists, of one length; texts in which nothing differs are left out.
    """
    to_first, to_second = {}, {}
    for one, two in pairs:
        to_first.setdefault(two, one)
        to_second.setdefault(one, two)
    versions = ((_replaced(text, to_first), _replaced(text, to_second)) for text in texts)
    kept = [(one, two) for one, two in versions if one != two]
    return [one for one, _ in kept], [two for _, two in kept]


def _replaced(text: str, other: Mapping[str, str]) -> str:
    """The text with whole words replaced, with their capitals."""
    if not other:
        return text
    words = "|".join(map(re.escape, sorted(other, key=len, reverse=True)))

    def replaced(found: re.Match[str]) -> str:
        word = found.group()
        new = other[word.lower()]
        if word.isupper() and len(word) > 1:
            return new.upper()
        return new.capitalize() if word[0].isupper() else new

    return re.sub(rf"(?<!\w)(?:{words})(?!\w)", replaced, text, flags=re.IGNORECASE)
