"""Whose words a chat's tokens are, as positions that steering takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT, USER = "assistant", "user"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # around what an assistant wrote, where a template marks it
WHAT_TO_DO = "Give the positions as [start, stop) pairs instead."


@dataclass(frozen=True)
class ChatTokens:
    """A chat as a model reads it.

    Attributes:
        input_ids: (1, n) int64.
        roles: of each of its n tokens, the role of the message that wrote it; None where the template did of its own.
        goes_on: whether what the model writes next is an assistant's.
    """

    input_ids: Tensor
    roles: tuple[str | None, ...]
    goes_on: bool

    def positions(self, *roles: str) -> tuple[tuple[int, int | None], ...]:
        """Where the tokens of some roles are: [start, stop) pairs for `Steering(positions=...)`, in order. With
        `assistant` they go on with what is generated.

        Raises:
            ValueError: no role, or one that the chat does not have.
        """
        known = sorted({role for role in self.roles if role} | ({ASSISTANT} if self.goes_on else set()))
        if not roles or set(roles) - set(known):
            raise ValueError(f"Expected roles of this chat: {', '.join(map(repr, known))}. Received: {roles!r}.")
        chosen = [*(role in roles for role in self.roles), self.goes_on and ASSISTANT in roles]
        starts = [place for place, inside in enumerate(chosen) if inside and not (place and chosen[place - 1])]
        stops = [place for place, inside in enumerate(chosen) if not inside and place and chosen[place - 1]]
        return tuple(zip(starts, [*stops, None], strict=False))


def chat_tokens(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> ChatTokens:
    """The tokens of a chat, and which role each is of.

    A user's or a system's message is all that the template writes for it, markers and the name of the role included;
    an assistant's is what follows the prompt to write, or what the template has between `{% generation %}` and
    `{% endgeneration %}`. Of no role are the first token of texts, that prompt, and a system's message that the
    template adds where none was given. Found by rendering the first so many messages, and told only where that is the
    beginning of the whole and a place between two tokens.

    Args:
        messages: dicts with `role` and `content`, as `apply_chat_template` takes them.
        tokenizer: with a chat template.
        add_generation_prompt: end with the prompt to write an assistant's message.
        variables: what else the template knows, such as `enable_thinking`.

    Raises:
        ValueError: no chat template, one that refuses the messages, or one that does not show where they are.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"Expected a tokenizer with a chat template. Received: {type(tokenizer).__name__} without.")
    messages = list(messages)
    if not messages or not all(isinstance(message, Mapping) and message.get("role") for message in messages):
        raise ValueError(f"`messages` must be dicts with a role, at least one. Received: messages={messages!r}.")
    chat = _Chat(messages, tokenizer, dict(variables or {}), add_generation_prompt)
    spans = chat.spans()
    ids, places = _token_places(tokenizer, chat.whole, {place for _, *span in spans for place in span})
    roles: list[str | None] = [None] * len(ids)
    for role, start, stop in spans:
        roles[places[start] : places[stop]] = [role] * (places[stop] - places[start])
    return ChatTokens(torch.tensor([ids]), tuple(roles), add_generation_prompt)


class _Chat:
    """Where in a rendered chat each message stands, in characters."""

    def __init__(
        self,
        messages: list[Any],
        tokenizer: PreTrainedTokenizerBase,
        variables: dict[str, Any],
        add_generation_prompt: bool,
    ) -> None:
        self.messages, self.tokenizer, self.variables = messages, tokenizer, variables
        whole, closed = self._rendered(messages, add_generation_prompt), self._rendered(messages)
        if whole is None or closed is None or not whole.startswith(closed):
            told = "refuses these messages" if whole is None or closed is None else "rewrites them for an answer"
            raise ValueError(f"The chat template {told}. Received: roles {[m['role'] for m in messages]}.")
        self.whole, self.closed = whole, closed

    def _rendered(self, messages: Sequence[Any], prompt: bool = False) -> str | None:
        """The text of some messages; None where the template refuses them."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **self.variables
            )
        except Exception:  # templates raise what they like
            return None
        return text if isinstance(text, str) else None

    def _beginning(self, messages: Sequence[Any], prompt: bool = False) -> int | None:
        """The length of some messages' text, if the whole begins with it."""
        text = self._rendered(messages, prompt)
        return len(text) if text is not None and self.closed.startswith(text) else None

    def spans(self) -> list[tuple[str, int, int]]:
        """Role, start and stop of each message, in order.

        Raises:
            ValueError: the template does not show where one is.
        """
        marked = self._generated() if GENERATION.search(self._template()) else None
        ends = [self._end(count) for count in range(1, len(self.messages) + 1)]
        found: list[tuple[str, int, int]] = []
        for number, message in enumerate(self.messages):
            role, stop = message["role"], ends[number]
            if role == ASSISTANT and marked is not None:
                continue
            start = self._start(number, ends)
            if start is None or stop is None or not start < stop:
                shown = "as a beginning of the whole text" if stop is None else "where it begins"
                raise ValueError(
                    f"The chat template does not show message {number} of role {role!r} {shown}, so its tokens are "
                    f"not known. {WHAT_TO_DO}"
                )
            found.append((role, start, stop))
        return sorted([*found, *(marked or ())], key=lambda span: span[1])

    def _template(self) -> str:
        return self.tokenizer.get_chat_template()

    def _end(self, count: int) -> int | None:
        """Where the first `count` messages end; None where the template does not show it."""
        if count == len(self.messages):
            return len(self.closed)
        end = self._beginning(self.messages[:count])
        if end is None:  # templates that leave out an earlier answer's thoughts show it where the next message begins
            after = self._beginning(self.messages[: count + 1])
            end = None if after is None else self._start_of_user(count, after)
        return end

    def _start(self, number: int, ends: Sequence[int | None]) -> int | None:
        message = self.messages[number]
        if message["role"] == ASSISTANT:
            return self._beginning(self.messages[:number], prompt=True)
        if number:
            return ends[number - 1]
        if message["role"] == USER:  # a template may write a system's message of its own before it
            return self._start_of_user(0, ends[0])
        first: Any = self.tokenizer.bos_token
        if not first or not self.closed.startswith(first):
            return 0
        longer = self._rendered([message, {"role": USER, "content": "a"}]) or self.closed
        return 0 if longer.count(first) > 1 else len(first)  # a token that begins every message is its marker

    def _start_of_user(self, number: int, end: int | None) -> int | None:
        """Where a user's message starts that ends at `end`: its text is as long as that of the same message at the end
        of another chat."""
        message = self.messages[number]
        if message["role"] != USER or end is None:
            return None
        # Some templates refuse two messages of a user in a row, others write an answer anew once it is followed.
        for before in ([message, {"role": ASSISTANT, "content": "a"}], [message]):
            known, with_it = self._rendered(before), self._rendered([*before, message])
            if known is not None and with_it is not None and with_it.startswith(known):
                text = with_it[len(known) :]
                return end - len(text) if self.closed[:end].endswith(text) else None
        return None

    def _generated(self) -> list[tuple[str, int, int]]:
        """The spans that the template marks as an assistant's."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"A chat template with {{% generation %}} needs a fast tokenizer, which knows where in a text its "
                f"tokens are. {WHAT_TO_DO} Received: {type(self.tokenizer).__name__}."
            )
        told: Any = self.tokenizer.apply_chat_template(
            self.messages, return_dict=True, return_assistant_tokens_mask=True, **self.variables
        )
        encoded = self.tokenizer(self.closed, add_special_tokens=False, return_offsets_mapping=True)
        offsets, inside = encoded["offset_mapping"], told["assistant_masks"]
        if encoded["input_ids"] != list(told["input_ids"]):
            raise ValueError(f"The tokens of the chat are not those of its text. {WHAT_TO_DO}")
        found: list[tuple[str, int, int]] = []
        for place, one in enumerate(inside):
            start, stop = offsets[place]
            if one and place and inside[place - 1]:
                found[-1] = (ASSISTANT, found[-1][1], stop)
            elif one:
                found.append((ASSISTANT, start, stop))
        wanted = sum(message["role"] == ASSISTANT for message in self.messages)
        if len(found) != wanted:
            raise ValueError(
                f"The chat template marks {len(found)} texts of an assistant by {{% generation %}}. Expected "
                f"{wanted}. {WHAT_TO_DO}"
            )
        return found


def _token_places(
    tokenizer: PreTrainedTokenizerBase, text: str, places: Iterable[int]
) -> tuple[list[int], dict[int, int]]:
    """The ids of a text, and how many tokens there are before each of some places in characters.

    Raises:
        ValueError: a place is inside a token.
    """

    def ids_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    whole, found = ids_of(text), {}
    for place in sorted(set(places)):
        before = ids_of(text[:place])
        if whole[: len(before)] != before:
            raise ValueError(
                f"A token reaches over the border of two messages, so it is of no one's. {WHAT_TO_DO} Received: "
                f"{text[max(0, place - 20) : place]!r} before the border, {text[place : place + 20]!r} behind it."
            )
        found[place] = len(before)
    return whole, found
