"""Files for `select-knowledge` and `select-behaviour`: questions that a tiny model answers, prompts of two kinds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from sae_transformers.create_training_data.knowledge_conflict import (
    STYLES,
    ConflictQuestion,
    conflict_prompt,
    demonstrations,
    split_pool,
)
from sae_transformers.evaluation.generation.short_answers import short_answers
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_sae


def words(draw: random.Random, n: int) -> str:
    return " ".join(draw.choices(WORDS, k=n))


def answered(base: Any, questions: list[ConflictQuestion]) -> list[ConflictQuestion]:
    """The questions with what the model answers as the context's answer, or as the remembered one, in turn.

    The demonstrations are of other questions, so that no prompt changes by this.
    """
    pool, rest = split_pool(questions, n_groups=20, seed=42)
    shown = pool[:4]
    result = list(questions)
    asked = [*enumerate(pool[4:]), *((4 * number, row) for number, row in enumerate(rest))]
    for number, row in asked:
        told = []
        for style in STYLES:
            first = demonstrations(questions, shown, 1, seed=42 + number % 4)
            prompt = conflict_prompt(questions[row], [questions[i] for i in first], style)
            told += short_answers(base, word_tokenizer(), [prompt])
        accepted = tuple(text or "none" for text in told)
        name = "sub_answer" if number % 2 else "org_answer"
        result[row] = questions[row]._replace(**{name: accepted})
    return result


def write_selection_files(folder: Path, *, with_questions: bool = True) -> Path:
    """base, sae0 and sae1 (layers 0 and 1), a.txt and b.txt, whose last words differ, and questions.jsonl."""
    draw = random.Random(0)
    word_tokenizer().save_pretrained(folder / "base")
    base = tiny_base(max_position_embeddings=256)
    base.save_pretrained(folder / "base")
    for layer in (0, 1):
        tiny_sae(seed=layer + 1, layer=layer, site="resid_post").save_pretrained(folder / f"sae{layer}")
    questions = [
        ConflictQuestion(f"{words(draw, 4)} {i}", words(draw, 6), (words(draw, 1),), words(draw, 6), (words(draw, 2),))
        for i in range(30)
    ]
    if with_questions:
        rows = [one._asdict() for one in answered(base, questions)]
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, word in (("a", "w3"), ("b", "w70")):
        lines = [f"{words(draw, 5)} {word} {word}" for _ in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
