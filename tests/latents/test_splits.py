"""Halves of labelled texts: both labels in each, and the same ones for a seed for good."""

from __future__ import annotations

import pytest

from sae_transformers.latents.splits import label_halves

LABELS = [0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0]


def test_halves_have_both_labels_alike() -> None:
    first, second = label_halves(LABELS, 0)
    assert sorted(first + second) == list(range(len(LABELS)))
    assert [sum(LABELS[i] for i in half) for half in (first, second)] == [3, 2]
    assert [len(half) for half in (first, second)] == [6, 5]


def test_a_seed_always_draws_the_same_halves() -> None:
    assert label_halves(LABELS, 0) == ([1, 2, 3, 4, 8, 9], [0, 5, 6, 7, 10])
    assert label_halves(LABELS, 7) == ([0, 2, 5, 7, 9, 10], [1, 3, 4, 6, 8])


def test_a_label_needs_two_texts() -> None:
    with pytest.raises(ValueError, match="Received: 1 of label 1"):
        label_halves([0, 0, 1], 0)
