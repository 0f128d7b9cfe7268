"""Questions whose context says something else than what a model remembers, and prompts of them.

    questions = read_conflicts("nq_swap_dev.parquet")
    pool, rest = split_pool(questions, n_groups=128, seed=42)
    prompt = conflict_prompt(questions[rest[0]], demonstrations(questions, pool, 3, seed=42), "org_org")

The layout of NQ-Swap (https://huggingface.co/papers/2109.05052) and Macnoise, the prompts of SpARE
(https://huggingface.co/papers/2410.15999): a few demonstrations, then the question with the substituted context. What
the demonstrations do, answer from their context or against it, is what the model tends to do too.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..latents.text_input import text_source
from ..latents.texts import open_text

# Demonstrations: the context they show and the answer they give. The question itself shows the substituted context.
STYLES = {
    "sub_sub": ("sub", "sub"),  # answer from the context
    "sub_org": ("sub", "org"),  # answer against it
    "org_org": ("org", "org"),  # no conflict: what evaluation uses
}
# Macnoise (https://huggingface.co/papers/2305.01579) on the Hub, and the rows of its parts that SpARE takes, in order.
MACNOISE = "GWHed/dataset_macnoise"
MACNOISE_PARTS: dict[str, int | None] = {"train_chatgpt": 5120, "train": None}
COLUMNS = ("question", "org_context", "org_answer", "sub_context", "sub_answer")


class ConflictQuestion(NamedTuple):
    """A question with two contexts, and of each the answers that count: the original, remembered, and a substitute."""

    question: str
    org_context: str
    org_answer: tuple[str, ...]
    sub_context: str
    sub_answer: tuple[str, ...]

    def context(self, which: str) -> str:
        """The context of one side: `org` as it was, `sub` with the answer exchanged."""
        return self.org_context if which == "org" else self.sub_context

    def answers(self, which: str) -> tuple[str, ...]:
        """The answers that side's context supports."""
        return self.org_answer if which == "org" else self.sub_answer


def read_conflicts(source: Any) -> list[ConflictQuestion]:
    """Questions of rows with the columns question, org_context, org_answer, sub_context, sub_answer; answers are
    lists, or single texts.

    Args:
        source: the name of a file or a Hub data set, a `datasets.Dataset`, a DataFrame, a list of mappings, or of
            questions; `macnoise`, or what `read_macnoise` takes, is read as that has it.

    Raises:
        ValueError: a column is missing, a context is empty, a question has no answer, or there are no rows.
        TypeError: `source` holds no rows.
    """
    name = source if isinstance(source, str) else type(source).__name__
    if isinstance(source, Sequence) and source and all(isinstance(one, ConflictQuestion) for one in source):
        return list(source)
    if isinstance(source, str) and (source in ("macnoise", MACNOISE) or _files_of(source, "train_chatgpt")):
        return read_macnoise(MACNOISE if source == "macnoise" else source)
    rows = (open_text(source) if isinstance(source, str) else text_source(source)).rows()
    found = [_question(row, number, name) for number, row in enumerate(rows, 1)]
    if not found:
        raise ValueError(f"There are no questions. Received: {name!r}.")
    return found


def read_macnoise(source: str = MACNOISE, parts: Mapping[str, int | None] = MACNOISE_PARTS) -> list[ConflictQuestion]:
    """The questions of Macnoise in SpARE's order: 5,120 whose contexts a language model rewrote, then all of `train`.

    Its columns are those of NQ-Swap. It is scored by whether an answer is in the context
    (`evaluation.knowledge.in_context`), which may say it in several ways once it was rewritten.

    Args:
        source: the Hub data set, or a folder with its files, whose names begin with a part's, such as
            `train_chatgpt-00000-of-00001.parquet`.
        parts: how many rows of each are taken, the first ones; None for all.

    Raises:
        FileNotFoundError: a folder has no file of a part.
        ValueError: see `read_conflicts`.
    """
    found = []
    for part, count in parts.items():
        files = _files_of(source, part)
        if not files and Path(source).is_dir():
            raise FileNotFoundError(f"Expected files that begin with {part!r} in {source!r}. Received: none.")
        opened = [open_text(str(file)) for file in files] or [open_text(source, split=part)]
        rows = itertools.islice(itertools.chain.from_iterable(one.rows() for one in opened), count)
        found += [_question(row, number, f"{source} ({part})") for number, row in enumerate(rows, 1)]
    return found


def _files_of(folder: str, part: str) -> list[Path]:
    """Files of one part of a data set, which may lie in folders of their own."""
    if not Path(folder).is_dir():
        return []
    return sorted(file for file in Path(folder).rglob("*") if re.split(r"[-.]", file.name)[0] == part)


def question_groups(questions: Sequence[ConflictQuestion]) -> list[list[int]]:
    """Rows that ask the same question, in the order of their first."""
    groups: dict[str, list[int]] = {}
    for row, one in enumerate(questions):
        groups.setdefault(one.question, []).append(row)
    return list(groups.values())


def split_pool(
    questions: Sequence[ConflictQuestion], *, n_groups: int, seed: int, among: Iterable[int] | None = None
) -> tuple[list[int], list[int]]:
    """Rows to learn from and to take demonstrations of, and the rows of all other questions.

    Args:
        n_groups: questions of the pool; a question's rows are all on one side.
        seed: of the choice, numpy's RandomState.
        among: rows from whose questions the pool is chosen, such as those the model remembers; all by default.

    Returns:
        rows of the pool, by question and in the order chosen, and the other rows, ascending.

    Raises:
        ValueError: fewer questions than the pool needs, or none left outside.
    """
    groups = question_groups(questions)
    allowed = None if among is None else set(among)
    eligible = [i for i, rows in enumerate(groups) if allowed is None or allowed.intersection(rows)]
    if not 0 < n_groups <= len(eligible) or n_groups == len(groups):
        raise ValueError(
            f"The pool must leave questions outside and have at most {len(eligible)}. Received: n_groups={n_groups!r}."
        )
    order = list(range(len(eligible)))
    np.random.RandomState(seed).shuffle(order)
    chosen = [eligible[i] for i in order[:n_groups]]
    outside = set(range(len(groups))) - set(chosen)
    return [row for i in chosen for row in groups[i]], sorted(row for i in outside for row in groups[i])


def demonstrations(
    questions: Sequence[ConflictQuestion], pool: Sequence[int], shots: int, *, seed: int, avoid: int | None = None
) -> list[int]:
    """Rows of the pool to show before a question, each of another question.

    Args:
        pool: rows.
        shots: how many, 0 or more.
        seed: of the choice.
        avoid: a row whose question must not be shown.

    Raises:
        ValueError: the pool has too few questions.
    """
    avoided = None if avoid is None else questions[avoid].question
    groups: dict[str, list[int]] = {}
    for row in pool:
        if questions[row].question != avoided:
            groups.setdefault(questions[row].question, []).append(row)
    if not 0 <= shots <= len(groups):
        raise ValueError(
            f"`shots` must be at most {len(groups)}, the questions of the pool. Received: shots={shots!r}."
        )
    random = np.random.RandomState(seed)
    names = list(groups)
    return [groups[names[i]][0] for i in random.permutation(len(names))[:shots]]


def conflict_prompt(
    question: ConflictQuestion,
    shown: Sequence[ConflictQuestion] = (),
    style: str = "org_org",
    *,
    context: str | None = "sub",
    instruction: str = "",
) -> str:
    """The prompt of a question, which ends in `answer:`.

    Args:
        question: to be answered.
        shown: demonstrations, in order.
        style: of the demonstrations, see `STYLES`; their first answer is shown.
        context: of the question, `sub` or `org`; None for a closed book, with no context anywhere.
        instruction: a text before all, followed by an empty line.

    Raises:
        ValueError: an unknown style or context.
    """
    if style not in STYLES:
        raise ValueError(f"`style` must be one of {', '.join(STYLES)}. Received: style={style!r}.")
    if context not in ("sub", "org", None):
        raise ValueError(f"`context` must be 'sub', 'org' or None. Received: context={context!r}.")
    shown_context, shown_answer = STYLES[style]
    parts = [f"{instruction}\n\n"] if instruction else []
    for one in shown:
        answer = one.answers(shown_answer)[0]
        parts.append(f"{_asked(one, context and shown_context)} {answer}\n\n")
    return "".join([*parts, _asked(question, context)])


def _asked(one: ConflictQuestion, context: str | None) -> str:
    told = f"context: {one.context(context)}\n" if context else ""
    return f"{told}question: {one.question}\nanswer:"


def _question(row: Mapping[str, Any], number: int, source: str) -> ConflictQuestion:
    values: dict[str, Any] = {}
    for name in COLUMNS:
        value = row.get(name)
        if name.endswith("answer"):
            value = _answers(value)
        if value is None or not len(value):
            raise ValueError(
                f"Every row of {source!r} needs {', '.join(COLUMNS)}. Received: no {name} in row {number}, which has "
                f"{', '.join(map(str, row))}."
            )
        values[name] = value if name.endswith("answer") else str(value)
    return ConflictQuestion(**values)


def _answers(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):  # a list written into a cell of a .csv file, or one answer
        listed = value.strip().startswith("[")
        try:
            value = ast.literal_eval(value) if listed else [value]
        except (ValueError, SyntaxError):
            value = [value]
    return tuple(str(one) for one in (() if value is None else value) if str(one).strip())
