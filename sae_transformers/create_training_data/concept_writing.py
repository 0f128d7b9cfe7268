"""Concept sets made by a chat model, and its ratings of steered answers.

Positive answers bring a concept into the answer to an instruction, negative ones answer plainly or without it, hard
negatives use a word of the concept in another meaning, as in AxBench (https://huggingface.co/papers/2501.17148). The
requests go through `LLMClient` or `LocalChat`, with their cache, budget and resumption.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .annotation.parsing import without_thoughts
from .concept_recipe import ConceptRecipe
from .concept_sets import HARD, NEGATIVE, NO_CONCEPT, POSITIVE, ConceptSet, Example
from .llm.requests import GAVE_UP, NOT_DONE, REJECTED, Answer, Chat, ChatRequest

# Ours; AxBench's prompts (its appendix) ask for the same things in other words.
WITH_CONCEPT = (
    "Answer the instruction below. Let this concept show clearly and naturally in your answer, without naming it as a "
    "task: {concept}\n\nInstruction: {instruction}\n\nGive the answer only, in at most {words} words."
)
PLAIN = "{instruction}\n\nGive the answer only, in at most {words} words."
WITHOUT_CONCEPT = (
    "Answer the instruction below. Nothing in your answer may have to do with this concept: {concept}\n\n"
    "Instruction: {instruction}\n\nGive the answer only, in at most {words} words."
)
OTHER_MEANINGS = (
    "Concept: {concept}\n\nName {count} words that are used for this concept and have another meaning that has "
    "nothing to do with it. One line for each, in this form, and nothing else:\nword: the other meaning"
)
HARD_NEGATIVE = (
    'Answer the instruction below. Use the word "{word}" in this meaning: {meaning}. Nothing else in your answer may '
    "have to do with this concept: {concept}\n\nInstruction: {instruction}\n\nGive the answer only, in at most "
    "{words} words."
)
ASK_INSTRUCTIONS = (
    "Write {count} short instructions that people might give to an assistant, on everyday subjects of all kinds, one "
    "a line, without numbers. Variant {number}."
)
RATE_CONCEPT = (
    "Concept: {concept}\n\nText:\n{text}\n\nHow clearly does the concept show in the text? 0: not at all. 1: in part. "
    "2: clearly. Answer in this form: Rating: [[0]]"
)
RATE_INSTRUCTION = (
    "Instruction: {instruction}\n\nText:\n{text}\n\nDoes the text have to do with the instruction? 0: no. 1: "
    "somewhat. 2: yes. Answer in this form: Rating: [[0]]"
)
RATE_FLUENCY = (
    "Text:\n{text}\n\nIs the text fluent? 0: it is broken or repeats itself. 1: understandable, with faults. 2: "
    "fluent. It may end abruptly. Answer in this form: Rating: [[0]]"
)
RATINGS = {"concept": RATE_CONCEPT, "instruction": RATE_INSTRUCTION, "fluency": RATE_FLUENCY}


class _Slot(NamedTuple):
    """An answer that is wanted: for which concept, part and category, after which instruction, by which prompt."""

    concept: int
    part: str
    category: str
    instruction: str
    prompt: str


class Made(NamedTuple):
    """sets: one for each concept. failures: reason -> how many answers are missing because of it."""

    sets: list[ConceptSet]
    failures: dict[str, int]


def make_concept_sets(
    concepts: Sequence[str],
    instructions: Sequence[str],
    client: Chat,
    recipe: ConceptRecipe | None = None,
    *,
    progress: bool | Callable[[int, int], object] = True,
) -> Made:
    """Have a chat model answer instructions with and without concepts.

    What was answered stays in the client's cache: a run that was cut off is called again in the same way. An answer
    that is missing or empty is left out and counted; so is a list of other meanings that was not given.

    Args:
        concepts: in words, each once.
        instructions: what is answered; see `instructions_wanted` for how many are needed.
        client: `LLMClient` or `LocalChat`.
        recipe: how much is made.

    Raises:
        ValueError: no concept, one given twice, or too few instructions.
    """
    recipe = recipe or ConceptRecipe()
    pools = _pools(concepts, instructions, recipe)
    answered = client.complete_many(_meaning_requests(concepts, recipe), progress)
    slots = _slots(concepts, pools, answered, recipe)
    answers = client.complete_many([recipe.request(slot.prompt) for slot in slots], progress)
    parts: list[dict[str, dict[str, list[Example]]]] = [{"train": {}, "test": {}} for _ in concepts]
    failures = dict(Counter(answer.failure for answer in answered if answer.failure))
    for slot, answer in zip(slots, answers, strict=True):
        text = without_thoughts(answer.text or "").strip()
        if not answer.ok or not text:
            reason = answer.failure or "empty"
            failures[reason] = failures.get(reason, 0) + 1
            continue
        targets = range(len(concepts)) if slot.concept == NO_CONCEPT else (slot.concept,)
        for number in targets:
            parts[number][slot.part].setdefault(slot.category, []).append(Example(slot.instruction, text))
    steering = pools["steering"]
    sets = [
        ConceptSet(concept, part["train"], part["test"], "text", steering)
        for concept, part in zip(concepts, parts, strict=True)
    ]
    return Made(sets, failures)


def expected_requests(
    concepts: Sequence[str], instructions: Sequence[str], client: Chat, recipe: ConceptRecipe | None = None
) -> list[ChatRequest]:
    """What `make_concept_sets` will send, as far as it is known: a meaning that was not asked for yet stands in."""
    recipe = recipe or ConceptRecipe()
    pools, asked = _pools(concepts, instructions, recipe), _meaning_requests(concepts, recipe)
    guess = Answer("\n".join(["word: another meaning of the word"] * recipe.hard_negatives))
    known = [client.cache.get(client.key(request)) or guess for request in asked]
    slots = _slots(concepts, pools, known, recipe)
    return [*asked, *(recipe.request(slot.prompt) for slot in slots)]


def instructions_wanted(recipe: ConceptRecipe) -> int:
    """Instructions that a recipe needs: parts do not share any."""
    return recipe.steering + max(recipe.positives, recipe.negatives) + max(recipe.test, recipe.hard_negatives)


def ask_instructions(
    client: Chat,
    count: int,
    recipe: ConceptRecipe | None = None,
    *,
    progress: bool | Callable[[int, int], object] = True,
) -> list[str]:
    """So many different instructions from the chat model, or fewer if it repeats itself."""
    requests = instruction_requests(count, recipe or ConceptRecipe())
    lines = [
        re.sub(r"^[\s\-*\d.)]+", "", line).strip()
        for answer in client.complete_many(requests, progress)
        for line in without_thoughts(answer.text or "").splitlines()
    ]
    return list(dict.fromkeys(line for line in lines if len(line.split()) > 2))[:count]


def instruction_requests(count: int, recipe: ConceptRecipe) -> list[ChatRequest]:
    """What `ask_instructions` sends."""
    return [
        recipe.request(ASK_INSTRUCTIONS.format(count=20, number=number)) for number in range(1, -(-count // 15) + 1)
    ]


def parse_meanings(text: str) -> list[tuple[str, str]]:
    """(word, other meaning) of each line `word: meaning`; lines of another form are left out."""
    found = []
    for line in without_thoughts(text).splitlines():
        word, colon, meaning = re.sub(r"^[\s\-*\d.)]+", "", line).partition(":")
        word, meaning = word.strip(" *\"'"), meaning.strip(" *")
        if colon and word and meaning and len(word.split()) <= 3:
            found.append((word, meaning))
    return found


def rate_answers(
    client: Chat,
    concept: str,
    instructions: Sequence[str],
    texts: Sequence[str],
    *,
    kinds: Sequence[str] = ("concept", "instruction", "fluency"),
    max_tokens: int = 64,
    progress: bool | Callable[[int, int], object] = False,
) -> dict[str, list[float]]:
    """A chat model's ratings of answers, of the kinds that AxBench asks for: 0, 1 or 2 for each answer.

    What the model says without a rating, or with one outside, counts 0, as there.

    Args:
        client: `LLMClient` or `LocalChat`.
        concept: in words.
        instructions: one for each text; they matter for the kind `instruction`.
        texts: to be rated.
        kinds: which ratings.

    Raises:
        ValueError: an unknown kind, another number of instructions than texts, or a request that was not answered.
    """
    if unknown := set(kinds) - set(RATINGS):
        raise ValueError(f"`kinds` are of {', '.join(RATINGS)}. Received: {sorted(unknown)}.")
    if len(instructions) != len(texts):
        raise ValueError(f"Every text needs its instruction. Received: {len(instructions)} and {len(texts)} texts.")
    asked = [
        RATINGS[kind].format(concept=concept, instruction=instruction, text=text)
        for kind in kinds
        for instruction, text in zip(instructions, texts, strict=True)
    ]
    requests = [ChatRequest([{"role": "user", "content": text}], max_tokens) for text in asked]
    answers = client.complete_many(requests, progress)
    if lost := [answer for answer in answers if answer.failure in (GAVE_UP, NOT_DONE, REJECTED)]:
        raise ValueError(
            f"Every text needs a rating. Received: {len(lost)} of {len(answers)} requests without an answer, the "
            f"first because: {lost[0].failure}: {lost[0].detail}. What was answered is kept."
        )
    ratings = [parse_rating(answer.text or "") for answer in answers]
    n = len(texts)
    return {kind: ratings[place * n : (place + 1) * n] for place, kind in enumerate(kinds)}


def parse_rating(text: str) -> float:
    """The last `Rating: [[x]]` of a text, brackets or not; 0 where there is none from 0 to 2."""
    found = re.findall(r"rating\W{0,4}\s*\[*\s*(\d+(?:\.\d+)?)", without_thoughts(text), flags=re.IGNORECASE)
    rating = float(found[-1]) if found else 0.0
    return rating if 0 <= rating <= 2 else 0.0


def _meaning_requests(concepts: Sequence[str], recipe: ConceptRecipe) -> list[ChatRequest]:
    """One for each concept, where hard negatives are wanted."""
    count = recipe.hard_negatives
    return [recipe.request(OTHER_MEANINGS.format(concept=one, count=count)) for one in concepts if count]


def _pools(concepts: Sequence[str], instructions: Sequence[str], recipe: ConceptRecipe) -> dict[str, list[str]]:
    """The instructions of each part, drawn by the seed."""
    if (
        isinstance(concepts, str)
        or not concepts
        or len(set(concepts)) < len(concepts)
        or not all(map(str.strip, concepts))
    ):
        raise ValueError(f"Expected concepts, each once, none empty. Received: {concepts!r}.")
    different = list(dict.fromkeys(text.strip() for text in instructions if text.strip()))
    wanted = instructions_wanted(recipe)
    if len(different) < wanted:
        raise ValueError(f"This recipe needs {wanted} different instructions. Received: {len(different)}.")
    drawn = random.Random(recipe.seed).sample(different, wanted)
    ends = (recipe.steering, recipe.steering + max(recipe.positives, recipe.negatives))
    return {"steering": drawn[: ends[0]], "train": drawn[ends[0] : ends[1]], "test": drawn[ends[1] :]}


def _slots(
    concepts: Sequence[str],
    pools: Mapping[str, list[str]],
    answers: Sequence[Answer],
    recipe: ConceptRecipe,
) -> list[_Slot]:
    """answers: to `_meaning_requests`."""
    words, meanings = recipe.words, [parse_meanings(answer.text or "") for answer in answers]
    slots = [
        _Slot(NO_CONCEPT, "train", NEGATIVE, text, PLAIN.format(instruction=text, words=words))
        for text in pools["train"][: recipe.negatives]
    ]
    for number, concept in enumerate(concepts):
        given = {"concept": concept, "words": words}
        for part, count in (("train", recipe.positives), ("test", recipe.test)):
            slots += [
                _Slot(number, part, POSITIVE, text, WITH_CONCEPT.format(instruction=text, **given))
                for text in pools[part][:count]
            ]
        slots += [
            _Slot(number, "test", NEGATIVE, text, WITHOUT_CONCEPT.format(instruction=text, **given))
            for text in pools["test"][: recipe.test]
        ]
        slots += (
            [
                _Slot(number, "test", HARD, text, HARD_NEGATIVE.format(instruction=text, word=w, meaning=m, **given))
                for text, (w, m) in zip(pools["test"], meanings[number][: recipe.hard_negatives], strict=False)
            ]
            if meanings
            else []
        )
    return slots
