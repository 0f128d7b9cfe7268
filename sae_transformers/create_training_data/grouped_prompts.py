"""Prompts grouped by what a model answered, as SpARE publishes them: JSON, a row for each prompt.

    grouped = read_grouped_prompts("grouped_prompts", questions)
    context = [one for one in grouped if one.from_context]

The columns are those of SpARE's `grouped_prompts/Kshot-seedS-results.json`
(https://github.com/yuzhaouoe/SAE-based-representation-engineering, commit 9008a05).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .knowledge_conflict import ConflictQuestion, conflict_prompt

# Demonstrations as SpARE names them -> as `knowledge_conflict.STYLES` does. The last letter is the question's context.
PROMPT_TYPES = {"dss_s": "sub_sub", "dso_s": "sub_org", "doo_s": "org_org"}
COLUMNS = (
    "sub_answer", "org_answer", "pred_answer", "sub_answer_em", "org_answer_em", "item_idx", "demonstration_ids",
    "prompt_type",
)  # fmt: skip
LOSSES = ("ss_loss", "so_loss")


class GroupedPrompt(NamedTuple):
    """A prompt and what a model answered.

    row: of the question. shown: rows of the demonstrations, in order. style: of these, see `STYLES`.
    answer: the model's. from_context, from_memory: whether it is an accepted answer of either side.
    context_loss, memory_loss: mean cross-entropy of the whole prompt with the first accepted answer of either side, in
    nats; None where it was not measured.
    """

    row: int
    shown: tuple[int, ...]
    style: str
    answer: str
    from_context: bool
    from_memory: bool
    context_loss: float | None = None
    memory_loss: float | None = None

    def prompt(self, questions: Sequence[ConflictQuestion]) -> str:
        """The prompt, of all questions."""
        return conflict_prompt(questions[self.row], [questions[row] for row in self.shown], self.style)


def grouped_rows(grouped: Sequence[GroupedPrompt], questions: Sequence[ConflictQuestion]) -> list[dict[str, Any]]:
    """Prompts as SpARE writes them: those of one question together, in the order of `PROMPT_TYPES`.

    `ss_loss` and `so_loss` are None where they were not measured.
    """
    types = {style: name for name, style in PROMPT_TYPES.items()}
    places = {style: place for place, style in enumerate(types)}
    first = {row: place for place, row in reversed([*enumerate(one.row for one in grouped)])}
    return [
        {
            "sub_answer": list(questions[one.row].sub_answer),
            "org_answer": list(questions[one.row].org_answer),
            "pred_answer": one.answer,
            "sub_answer_em": int(one.from_context),
            "org_answer_em": int(one.from_memory),
            "item_idx": one.row,
            "demonstration_ids": list(one.shown),
            "prompt_type": types[one.style],
            "ss_loss": one.context_loss,
            "so_loss": one.memory_loss,
        }
        for one in sorted(grouped, key=lambda one: (first[one.row], places[one.style]))
    ]


def read_grouped_prompts(path: str | Path, questions: Sequence[ConflictQuestion]) -> list[GroupedPrompt]:
    """Prompts of a file, or of all `.json` files of a folder, in the order of their names.

    Those of a file come style by style, as a run asks them: what is learnt from a file that a run wrote is what that
    run learnt.

    Args:
        path: a `.json` file or a folder of some.
        questions: that `item_idx` and `demonstration_ids` number, in the order of their file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is no list of such rows, or its rows are of other questions.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"Expected a .json of grouped prompts or a folder of some. Received: {str(path)!r}.")
    return [one for file in files for one in _read(file, questions)]


def _read(file: Path, questions: Sequence[ConflictQuestion]) -> list[GroupedPrompt]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected JSON in {file}. Received: {error}.") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"Expected a list of grouped prompts in {file}. Received: {type(rows).__name__}, or none.")
    styles = list(PROMPT_TYPES.values())
    found = [_prompt(row, number, file, questions) for number, row in enumerate(rows, 1)]
    return sorted(found, key=lambda one: styles.index(one.style))


def _prompt(row: Any, number: int, file: Path, questions: Sequence[ConflictQuestion]) -> GroupedPrompt:
    names = [name for name in COLUMNS if not isinstance(row, Mapping) or name not in row]
    if names:
        raise ValueError(
            f"Expected {', '.join(COLUMNS)} in each row of {file}. Received: no {names[0]} in row {number}."
        )
    if row["prompt_type"] not in PROMPT_TYPES:
        raise ValueError(
            f"`prompt_type` is one of {', '.join(PROMPT_TYPES)}. Received: {row['prompt_type']!r} in row {number} of "
            f"{file}."
        )
    numbered = [row["item_idx"], *row["demonstration_ids"]]
    if not all(isinstance(one, int) and 0 <= one < len(questions) for one in numbered):
        raise ValueError(
            f"Expected rows of {len(questions)} questions in {file}. Received: {numbered} in row {number}. Were all "
            f"questions given that the prompts were made of?"
        )
    question = questions[row["item_idx"]]
    if (list(question.sub_answer), list(question.org_answer)) != (row["sub_answer"], row["org_answer"]):
        raise ValueError(
            f"Expected the answers {list(question.sub_answer)} and {list(question.org_answer)} of question "
            f"{row['item_idx']}. Received: {row['sub_answer']} and {row['org_answer']} in row {number} of {file}: the "
            f"prompts are of other questions."
        )
    return GroupedPrompt(
        row["item_idx"],
        tuple(row["demonstration_ids"]),
        PROMPT_TYPES[row["prompt_type"]],
        str(row["pred_answer"]),
        bool(row["sub_answer_em"]),
        bool(row["org_answer_em"]),
        *(None if row.get(name) is None else float(row[name]) for name in LOSSES),
    )
