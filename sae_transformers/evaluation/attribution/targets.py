"""The number that features are attributed to: a token's logit, a difference of two, a label's, or a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...modeling import SaeForCausalLM, SaeForSequenceClassification
from ...modeling.modeling_sae import SaePreTrainedModel

Choice = str | int
TargetLike = Choice | Sequence[Choice] | Callable[[Any], Tensor] | None


class Target(NamedTuple):
    """name: as it is shown. ids: of the text, as far as it is read. of: a model's output for n rows -> (n,).

    options: of the call that the function is of.
    """

    name: str
    ids: list[int]
    of: Callable[[Any], Tensor]
    options: dict[str, Any]


def read_target(
    model: SaePreTrainedModel,
    tokenizer: Any,
    ids: Sequence[int],
    target: TargetLike,
    position: int | str | None,
) -> Target:
    """What `target` and `position` stand for.

    Args:
        ids: of the text.
        target: a token (its text or id), or two whose logits are subtracted, first less second; of a classifier a
            label; or a function from the model's output of n rows to (n,). None: the token that follows where
            `position` is a token of the text, else the one that the model finds most likely; of a classifier the
            label.
        position: of the token whose next token is meant, from the end where negative; by default the last. A string
            is a token of the text that is predicted itself.

    Raises:
        ValueError: no single token, no such token, label or position, or a model without an output of that kind.
        TypeError: something else.
    """
    if isinstance(model, SaeForSequenceClassification):
        if position is not None:
            raise ValueError(f"A classifier has one output for a text. Received: position={position!r}.")
        return _of_labels(model, list(ids), target)
    if callable(target):
        if position is not None:
            raise ValueError(
                f"A function of the output chooses its positions itself. Received also: position={position!r}."
            )
        return Target(getattr(target, "__name__", "function"), list(ids), target, {})
    if not isinstance(model, SaeForCausalLM):
        raise ValueError(f"{type(model).__name__} has no logits: give a function of its output. Received: {target!r}.")
    place, followed = _place(tokenizer, ids, position)
    ids = list(ids[: place + 1])  # later tokens do not reach it
    options = {"logits_to_keep": 1}
    if target is None:
        token = followed if followed is not None else _best(model, ids, options)
        return Target(_shown(tokenizer, token), ids, _logit((token,)), options)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens = tuple(_token(tokenizer, one, vocabulary) for one in _one_or_two(target, "token"))
    name = " - ".join(_shown(tokenizer, token) for token in tokens)
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"`target` must be two different tokens. Received: target={target!r}, both {tokens[0]}.")
    return Target(name, ids, _logit(tokens), options)


def scores_of(target: Target, output: Any, rows: int) -> Tensor:
    """The target of each row, (rows,).

    Raises:
        ValueError: the function gave something else.
    """
    found = target.of(output)
    if isinstance(found, Tensor) and found.ndim == 0 and rows == 1:
        found = found[None]
    if not isinstance(found, Tensor) or found.shape != (rows,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"The target function must return one number for each row of the batch, shape ({rows},), such as "
            f"`output.logits[:, -1, token]`. Received: {got}."
        )
    return found


def _logit(columns: tuple[int, ...]) -> Callable[[Any], Tensor]:
    def of(output: Any) -> Tensor:
        logits = output.logits if output.logits.ndim == 2 else output.logits[:, -1]
        first = logits[:, columns[0]]
        return first if len(columns) == 1 else first - logits[:, columns[1]]

    return of


def _one_or_two(target: Any, what: str) -> tuple[Any, ...]:
    choices = (target,) if isinstance(target, (str, int)) else tuple(target) if isinstance(target, Sequence) else None
    if choices is None or any(isinstance(one, bool) or not isinstance(one, (str, int)) for one in choices):
        raise TypeError(
            f"`target` must be a {what}, two of them, or a function of the model's output. Received: {target!r}."
        )
    if len(choices) > 2 or not choices or len(set(choices)) < len(choices):
        raise ValueError(f"`target` must be one {what} or two different ones. Received: target={target!r}.")
    return choices


# -- tokens ----------------------------------------------------------------------------------------------------------


def _place(tokenizer: Any, ids: Sequence[int], position: int | str | None) -> tuple[int, int | None]:
    """The last position that is read, and the token that follows it in the text where that is what was named."""
    if isinstance(position, str):
        texts = [str(tokenizer.decode([token])) for token in ids]
        found = [i for i, text in enumerate(texts) if text == position]
        found = found or [i for i, text in enumerate(texts) if text.strip() == position.strip()]
        if len(found) != 1 or not found[0]:
            problem = "is not a token of the text" if not found else f"stands at {found}"
            if found == [0]:
                problem = "is the first token, which nothing predicts"
            raise ValueError(
                f"`position` must name one token of the text after the first; {position!r} {problem}. The tokens are "
                f"{texts}. Or give the number of the token before it."
            )
        return found[0] - 1, int(ids[found[0]])
    place = len(ids) - 1 if position is None else position
    if isinstance(place, bool) or not isinstance(place, int) or not -len(ids) <= place < len(ids):
        raise ValueError(
            f"`position` must be from {-len(ids)} to {len(ids) - 1}: the text has {len(ids)} tokens. "
            f"Received: position={position!r}."
        )
    return place % len(ids), None


def _token(tokenizer: Any, choice: Choice, vocabulary: int) -> int:
    if isinstance(choice, int):
        if not 0 <= choice < vocabulary:
            raise ValueError(f"Token ids are from 0 to {vocabulary - 1}. Received: target={choice!r}.")
        return choice
    ids = tokenizer(choice, add_special_tokens=False)["input_ids"] if choice else []
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) == 1 and ids[0] == unknown and choice.strip() != tokenizer.unk_token:
        raise ValueError(f"`target` must be a token of the vocabulary. Received: {choice!r}, which it does not know.")
    if len(ids) == 1:
        return int(ids[0])
    parts = [str(tokenizer.decode([token])) for token in ids]
    other = choice[1:] if choice.startswith(" ") else f" {choice}"
    single = len(tokenizer(other, add_special_tokens=False)["input_ids"]) == 1 if other else False
    hint = f"{other!r} is one" if single else f"give the first, {parts[0]!r}" if parts else "give its id"
    raise ValueError(f"`target` must be one token; {hint}. Received: {choice!r}, which is {len(ids)}: {parts}.")


@torch.no_grad()
def _best(model: SaePreTrainedModel, ids: list[int], options: dict[str, Any]) -> int:
    logits = model(torch.tensor([ids], device=model.device), steering=False, use_cache=False, **options).logits
    return int(logits[0, -1].argmax())


def _shown(tokenizer: Any, token: int) -> str:
    return repr(str(tokenizer.decode([token])))


# -- labels ----------------------------------------------------------------------------------------------------------


def _of_labels(model: SaePreTrainedModel, ids: list[int], target: TargetLike) -> Target:
    if callable(target):
        return Target(getattr(target, "__name__", "function"), ids, target, {})
    names: Any = model.config.id2label
    known = {str(name): int(number) for number, name in names.items()}
    if target is None:
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=model.device), steering=False).logits[0]
        target = int(logits.argmax())
    numbers = []
    for choice in _one_or_two(target, "label"):
        number = known.get(choice, int(choice) if choice.isdecimal() else -1) if isinstance(choice, str) else choice
        if not 0 <= number < len(known):
            raise ValueError(f"Labels are {', '.join(known)} (0 to {len(known) - 1}). Received: target={choice!r}.")
        numbers.append(number)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"`target` must be two different labels. Received: target={target!r}.")
    return Target(" - ".join(str(names[number]) for number in numbers), ids, _logit(tuple(numbers)), {})
