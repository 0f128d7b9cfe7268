"""The same texts with male and with female words: pairs that point one way, whatever a text had."""

from __future__ import annotations

import re
from collections.abc import Sequence


def both_versions(texts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Each text that has one of the words, all of them as the first of their pair, and all as the second.

    Unlike `swaps.swapped_pairs`, whose pairs go from male to female in some texts and back in others, so that the
    difference of a feature of one gender has a sign that changes from text to text.

    Args:
        pairs: (first, second) words in lower case, such as (he, she); a word that is in several pairs becomes the
            other one of the first of these, so that of (him, her), (his, her) "her" becomes "him".

    Returns:
        The two lists, of one length; texts in which nothing differs are left out.
    """
    if not pairs:
        return [], []
    to_first, to_second = {}, {}
    for one, two in pairs:
        to_first.setdefault(two, one)
        to_second.setdefault(one, two)
    versions = [[_replaced(text, to_first) for text in texts], [_replaced(text, to_second) for text in texts]]
    kept = [(one, two) for one, two in zip(*versions, strict=True) if one != two]
    return [one for one, _ in kept], [two for _, two in kept]


def _replaced(text: str, other: dict[str, str]) -> str:
    """The text with whole words replaced, with their capitals."""
    words = "|".join(map(re.escape, sorted(other, key=len, reverse=True)))

    def replaced(found: re.Match[str]) -> str:
        word = found.group()
        new = other[word.lower()]
        if word.isupper() and len(word) > 1:
            return new.upper()
        return new.capitalize() if word[0].isupper() else new

    return re.sub(rf"(?<!\w)(?:{words})(?!\w)", replaced, text, flags=re.IGNORECASE)
