"""Tokens that steering leaves alone, by their ids: special tokens, the first of a text, the markers of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMED_TOKENS = {
    "special": "all special tokens",
    "bos": "the token that texts begin with",
    "chat": "tokens of the vocabulary's additions that the chat template writes around messages",
}
LARGEST_ID = 2**31 - 1


def checked_tokens(values: Any) -> tuple[int | str, ...]:
    """Token ids and names of `NAMED_TOKENS`, each once, ids in order and then names.

    Raises:
        TypeError: no list. ValueError: an id that no token has, or an unknown name.
    """
    if isinstance(values, (str, int)) and not isinstance(values, bool):
        values = (values,)
    if not isinstance(values, Iterable) or isinstance(values, dict):
        raise TypeError(f"`exclude_tokens` must be a list of token ids and names. Received: {values!r}.")
    ids, names = set(), set()
    for value in values:
        if isinstance(value, str) and value in NAMED_TOKENS:
            names.add(value)
        elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_ID:
            ids.add(value)
        else:
            known = ", ".join(map(repr, NAMED_TOKENS))
            raise ValueError(f"`exclude_tokens` must hold token ids, or {known}. Received: {value!r}.")
    return (*sorted(ids), *sorted(names))


def named_token_ids(name: str, tokenizer: Any) -> list[int]:
    """The ids that a name stands for.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if name == "special":
        # Of Llama 3 the tokenizer's own list holds two of them.
        flagged = [token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items() if added.special]
        found = [*tokenizer.all_special_ids, *flagged]
    elif name == "bos":
        found = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    else:
        found = _chat_markers(tokenizer)
    if not found:
        raise ValueError(
            f"{type(tokenizer).__name__} knows no such token: {NAMED_TOKENS[name]}. Expected one that does, or token "
            f"ids. Received: exclude_tokens={name!r}."
        )
    return found


def ids_of(tokens: Sequence[int | str], tokenizer: Any) -> tuple[int | str, ...]:
    """Ids in place of names, each once.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    found = [[token] if isinstance(token, int) else named_token_ids(token, tokenizer) for token in tokens]
    return checked_tokens([token for ids in found for token in ids])


def known_ids(tokens: Sequence[int | str]) -> tuple[int, ...]:
    """Ids, where there are no names.

    Raises:
        ValueError: there is a name, which only a tokenizer knows.
    """
    if names := [name for name in tokens if isinstance(name, str)]:
        raise ValueError(
            f"A model knows tokens by their ids. Expected `steering.with_tokenizer(tokenizer)`, which gives them. "
            f"Received: exclude_tokens={names!r}."
        )
    return tuple(token for token in tokens if not isinstance(token, str))


def has_named_token(name: str, tokenizer: Any) -> bool:
    """Whether a tokenizer has what a name stands for."""
    try:
        return bool(named_token_ids(name, tokenizer))
    except ValueError:
        return False


def _chat_markers(tokenizer: Any) -> list[int]:
    """Ids of added tokens in a rendered chat whose messages hold none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template. Expected one, or token ids. Received: "
            f"exclude_tokens='chat'."
        )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    rendered = [_rendered(tokenizer, [{"role": "system", "content": "a"}, *turns]), _rendered(tokenizer, turns)]
    if all(ids is None for ids in rendered):
        raise ValueError(
            f"The chat template of {type(tokenizer).__name__} refuses a user's and an assistant's message. Expected "
            f"token ids. Received: exclude_tokens='chat'."
        )
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    words = ("a", "system", "user", "assistant")  # which a small vocabulary may not have
    added -= {token for word in words for token in tokenizer(word, add_special_tokens=False)["input_ids"]}
    return sorted({token for ids in rendered for token in ids or () if token in added})


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> list[int] | None:
    """Token ids of a chat, None where the template refuses it, as some do a system's message."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise what they like
        return None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class ExcludedTokens:
    """The excluded tokens of each row of a steering. ids: (E,) int64, sorted. rows: (R, E) bool, which are whose."""

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device) -> None:
        known = sorted({token for row in rows for token in row})
        self.ids = torch.tensor(known, dtype=torch.long, device=device)
        own = [set(row) for row in rows]
        self.rows = torch.tensor([[token in row for token in known] for row in own], device=device)

    def among(self, tokens: Tensor, table: Tensor) -> Tensor:
        """(batch, seq) bool: whether each token is excluded.

        Args:
            tokens: (batch, seq) ids.
            table: (batch,) row of each.
        """
        ids, tokens = self.ids.to(tokens.device), tokens.long().contiguous()
        place = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
        return (ids[place] == tokens) & self.rows.to(tokens.device)[table].gather(1, place)
