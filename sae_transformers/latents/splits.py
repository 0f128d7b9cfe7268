"""Labelled texts in two halves, both labels alike in each."""

from __future__ import annotations

import random
from collections.abc import Sequence


def label_halves(labels: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the texts of two halves, ascending; of an odd number of a label the first half gets one more.

    Args:
        labels: 0 or 1 of each text.
        seed: of the halves.

    Raises:
        ValueError: there are fewer than two texts of a label.
    """
    draw = random.Random(seed)
    first: list[int] = []
    second: list[int] = []
    for value in (0, 1):
        members = [i for i, label in enumerate(labels) if label == value]
        if len(members) < 2:
            raise ValueError(f"Two texts or more of each label are needed. Received: {len(members)} of label {value}.")
        draw.shuffle(members)
        first.extend(members[: (len(members) + 1) // 2])
        second.extend(members[(len(members) + 1) // 2 :])
    return sorted(first), sorted(second)
