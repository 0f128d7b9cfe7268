"""Texts with an attribute swapped, by words."""

from __future__ import annotations

import pytest

from sae_transformers.create_training_data.swaps import both_versions, read_word_pairs, swap_words, swapped_pairs

PAIRS = read_word_pairs("he:she, him:her,his:her,Boy:girl")
GENDERS = read_word_pairs("he:she,him:her,his:her,man:woman,mr:mrs")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He saw her.", "She saw him."),
        ("HE and she, the boy's mother", "SHE and he, the girl's mother"),
        ("The sheriff heard this boyish hero", "The sheriff heard this boyish hero"),
        ("his", "her"),
        ("A\nboy\tHe", "A\ngirl\tShe"),
        ("", ""),
    ],
)
def test_whole_words_with_their_capitals(text: str, expected: str) -> None:
    assert swap_words(text, PAIRS) == expected


def test_words_that_are_patterns_and_swaps_that_go_back() -> None:
    pairs = read_word_pairs("c++:rust,a.b:x")
    assert swap_words("c++ or a.b, not acb", pairs) == "rust or x, not acb"
    text = "she said he is a boy and she a girl"
    assert swap_words(swap_words(text, PAIRS[:1] + PAIRS[3:]), PAIRS[:1] + PAIRS[3:]) == text


def test_only_texts_that_change_are_pairs() -> None:
    assert swapped_pairs(["he", "it", "he", "a girl"], PAIRS) == (["he", "a girl"], ["she", "a boy"])
    assert swapped_pairs(["it"], PAIRS) == ([], [])


@pytest.mark.parametrize("pairs", ["he", "he:she:it", ":she", "he:he", "he:she,he:it", ""])
def test_bad_lists_are_told(pairs: str) -> None:
    with pytest.raises(ValueError, match="Received"):
        read_word_pairs(pairs)


def test_both_point_one_way() -> None:
    male, female = both_versions(["He saw her.", "SHE left.", "Nobody came.", "A woman, his own."], GENDERS)
    assert male == ["He saw him.", "HE left.", "A man, his own."]
    assert female == ["She saw her.", "SHE left.", "A woman, her own."]


def test_whole_words_and_capitals() -> None:
    assert both_versions(["The theme: MAN, Mr. Manners"], GENDERS) == (
        ["The theme: MAN, Mr. Manners"], ["The theme: WOMAN, Mrs. Manners"]
    )  # fmt: skip
    assert both_versions(["he"], []) == ([], [])
