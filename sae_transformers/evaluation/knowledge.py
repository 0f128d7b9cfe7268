"""Does a model answer from the context or from memory: exact match with either answer, before and after steering."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = set(string.punctuation)


def normalized_answer(text: str) -> str:
    """An answer as it is compared: decomposed (NFD), lower case, without ASCII punctuation, articles, extra spaces.

    The usual normalisation of SQuAD (https://huggingface.co/papers/1606.05250) after Unicode's.
    """
    text = unicodedata.normalize("NFD", text).lower()
    text = "".join(character for character in text if character not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer equals one of those that count, both normalised."""
    return normalized_answer(answer) in {normalized_answer(one) for one in accepted}


def in_context(answer: str, context: str) -> bool:
    """Whether a normalised answer occurs in the normalised context: how SpARE scores Macnoise.

    An empty answer occurs nowhere; in SpARE's code it occurs everywhere.
    """
    found = normalized_answer(answer)
    return bool(found) and found in normalized_answer(context)


class Behaviours(NamedTuple):
    """Of each question whether the answer was the context's, and whether it was the remembered one."""

    context: list[bool]
    memory: list[bool]


def answer_behaviours(
    answers: Sequence[str],
    sub_answers: Sequence[Sequence[str]],
    org_answers: Sequence[Sequence[str]],
    contexts: Sequence[str] | None = None,
) -> Behaviours:
    """Score answers to questions with a substituted context.

    Args:
        answers: one a question.
        sub_answers: accepted answers of the context.
        org_answers: accepted remembered answers.
        contexts: score the context's side by `in_context`, in place of `sub_answers`.

    Raises:
        ValueError: lengths differ.
    """
    lengths = [len(answers), len(sub_answers), len(org_answers), *([] if contexts is None else [len(contexts)])]
    if len(set(lengths)) != 1:
        raise ValueError(f"Expected one entry a question everywhere. Received: lengths {lengths}.")
    if contexts is None:
        context = [exact_match(one, accepted) for one, accepted in zip(answers, sub_answers, strict=True)]
    else:
        context = [in_context(one, text) for one, text in zip(answers, contexts, strict=True)]
    return Behaviours(
        context, [exact_match(one, accepted) for one, accepted in zip(answers, org_answers, strict=True)]
    )


def knowledge_metrics(after: Behaviours, before: Behaviours | None = None) -> dict[str, float]:
    """Shares of questions answered each way, and what became of those the unsteered model answered each way.

    em_context, em_memory: EM_C and EM_M; neither: answers that match neither, such as broken ones. With `before`,
    em_a_to_b is the share with behaviour b after steering among the questions with behaviour a before: EM_{C->M} and
    so on of SpARE (https://huggingface.co/papers/2410.15999, section 4). NaN where no question had behaviour a.

    Raises:
        ValueError: no question, or `before` has another number of them.
    """
    n = len(after.context)
    if not n or (before is not None and len(before.context) != n):
        raise ValueError(
            f"Expected answers to the same questions, 1 or more. "
            f"Received: {n} and {n if before is None else len(before.context)}."
        )
    result = {"em_context": sum(after.context) / n, "em_memory": sum(after.memory) / n}
    result["neither"] = sum(not context and not memory for context, memory in zip(*after, strict=True)) / n
    if before is None:
        return result
    for was in Behaviours._fields:
        among = [i for i, had in enumerate(getattr(before, was)) if had]
        for now in Behaviours._fields:
            kept = sum(getattr(after, now)[i] for i in among)
            result[f"em_{was}_to_{now}"] = kept / len(among) if among else float("nan")
    return result
