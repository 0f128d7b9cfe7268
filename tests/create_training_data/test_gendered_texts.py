"""Texts as of men and as of women."""

from __future__ import annotations

from sae_transformers.create_training_data.gendered_texts import both_versions
from sae_transformers.create_training_data.swaps import read_word_pairs

PAIRS = read_word_pairs("he:she,him:her,his:her,man:woman,mr:mrs")


def test_both_point_one_way() -> None:
    male, female = both_versions(["He saw her.", "SHE left.", "Nobody came.", "A woman, his own."], PAIRS)
    assert male == ["He saw him.", "HE left.", "A man, his own."]
    assert female == ["She saw her.", "SHE left.", "A woman, her own."]


def test_whole_words_and_capitals() -> None:
    assert both_versions(["The theme: MAN, Mr. Manners"], PAIRS) == (
        ["The theme: MAN, Mr. Manners"], ["The theme: WOMAN, Mrs. Manners"]
    )  # fmt: skip
    assert both_versions(["he"], []) == ([], [])
