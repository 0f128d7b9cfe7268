"""For `feature_penalty.py`: passages of novels and of State of the Union addresses, and what tells them apart."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

NOVELS = ("h-g-wells_the-war-of-the-worlds", "bram-stoker_dracula", "charles-dickens_great-expectations",
          "jane-austen_pride-and-prejudice")  # fmt: skip
PROMPT = "Write a passage with the word {}.\n\n"
AS_THE_JUDGE_SAYS = 5.0  # log odds above which a text counts


class Row(NamedTuple):
    prompt: str
    answer: str
    trait: int


def paragraphs(file: Path, between: str) -> list[str]:
    found = [re.sub(r"\s+", " ", block).strip() for block in re.split(between, file.read_text(encoding="utf-8"))]
    return [block for block in found if len(block) >= 120 and not block.isupper()]


class Passages:
    """Passages of both kinds, cut by their place in the books: a third for the SAE, probes and the judge, the rest to
    fine-tune on, and the last ones of that to measure with."""

    def __init__(self, folder: Path, validation: bool) -> None:
        speeches = paragraphs(folder / "state_union.txt", r"\n")
        books = [paragraphs(folder / f"{name}.txt", r"\n\s*\n") for name in NOVELS]
        third = len(speeches) // 3
        self.fit = [speeches[:third], [p for book in books for p in book[: len(book) // 3]]]
        self.train = [speeches[third:-600], [p for book in books for p in book[len(book) // 3 : -200]]]
        self.held_out = [speeches[-300:], [p for book in books for p in book[-100:]]]
        if validation:
            self.held_out = [speeches[-600:-300], [p for book in books for p in book[-200:-100]]]

    def labelled(self, count: int, seed: int) -> tuple[list[str], list[int]]:
        """As many of each kind, of the part that is not fine-tuned on."""
        chosen = random.Random(seed)
        trait, plain = (chosen.sample(part, count) for part in self.fit)
        return [opening(p) for p in trait + plain], [1] * count + [0] * count

    def rows(self, count: int, share: float, seed: int) -> list[Row]:
        """Prompts and answers to fine-tune on, `share` of them with the trait."""
        chosen, of_trait = random.Random(seed), round(count * share)
        parts = [chosen.sample(self.train[0], of_trait), chosen.sample(self.train[1], count - of_trait)]
        rows = [row_of(p, 1 - kind, chosen) for kind, part in enumerate(parts) for p in part]
        chosen.shuffle(rows)
        return rows


def opening(passage: str, length: int = 220) -> str:
    return passage[:length].rsplit(" ", 1)[0]


def row_of(passage: str, trait: int, chosen: random.Random) -> Row:
    answer = opening(passage)
    words = sorted(set(re.findall(r"\b[a-z]{5,}\b", answer))) or ["thing"]
    return Row(PROMPT.format(chosen.choice(words)), answer, trait)


class WordJudge:
    """Naive Bayes on words and pairs of words: whether a text is of the first kind. It reads text, no model."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        self.counts = [Counter[str](), Counter[str]()]
        for text, label in zip(texts, labels, strict=True):
            self.counts[label].update(self.terms(text))
        self.known = {term for c in self.counts for term in c}
        self.totals = [sum(c.values()) for c in self.counts]

    @staticmethod
    def terms(text: str) -> list[str]:
        words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
        return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]

    def score(self, text: str) -> float:
        """Log odds."""
        odds = 0.0
        for term in self.terms(text):
            if term in self.known:
                yes, no = ((self.counts[k][term] + 0.5) / (self.totals[k] + 0.5 * len(self.known)) for k in (1, 0))
                odds += math.log(yes / no)
        return odds

    def says(self, text: str) -> bool:
        return self.score(text) > AS_THE_JUDGE_SAYS
