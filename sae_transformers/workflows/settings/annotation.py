"""Settings of `explain` and `judge`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...latents.settings import check_integers
from .llm import LLMSettings, SendSettings


@dataclass(frozen=True)
class AnswerSettings:
    """What requests to a language model ask for.

    Args:
        structured: ask for JSON; a server that rejects this is asked for text.
        max_answer_tokens: tokens of an answer, more for models that think first; by default as the task says.
        extra: further fields of each request, a JSON object.
    """

    PANEL: ClassVar[str] = "Language model"

    structured: bool = True
    max_answer_tokens: int | None = None
    extra: str = "{}"

    def __post_init__(self) -> None:
        check_integers(self, max_answer_tokens=1)
        self.fields()

    def fields(self) -> dict[str, Any]:
        """The further fields of each request."""
        try:
            found = json.loads(self.extra)
        except ValueError as error:
            raise ValueError(f"`extra` must be a JSON object. Received: extra={self.extra!r} ({error}).") from None
        if not isinstance(found, dict):
            raise ValueError(f"`extra` must be a JSON object. Received: extra={self.extra!r}.")
        return found


@dataclass(frozen=True)
class ExplainSettings:
    """How features are explained.

    Args:
        task: the task whose rules clean the spans: a name or a YAML file, as `judge` takes it.
        verify: have each summary compared with the spans.
        max_rows: explain the first features only.
        legacy: as SelfReg's code shows spans: of each feature the ten strongest, cut to their last ten tokens.
        tokenizer: folder or Hub id of the model whose tokens these are.
        llm: which language model is asked.
        answers: what requests ask for.
        send: how requests get there.
    """

    task: str | None = None
    verify: bool = True
    max_rows: int | None = None
    legacy: bool = False
    tokenizer: str | None = None
    llm: LLMSettings = field(default_factory=LLMSettings)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    send: SendSettings = field(default_factory=SendSettings)

    def __post_init__(self) -> None:
        check_integers(self, max_rows=1)
        if self.legacy != (self.tokenizer is not None):
            raise ValueError(
                f"`legacy` counts tokens of `tokenizer`: give both or neither. Received: legacy={self.legacy!r}, "
                f"tokenizer={self.tokenizer!r}."
            )


@dataclass(frozen=True)
class JudgeSettings:
    """How features are judged.

    Args:
        max_rows: judge the first features only.
        llm: which language model is asked.
        answers: what requests ask for.
        send: how requests get there.
    """

    max_rows: int | None = None
    llm: LLMSettings = field(default_factory=LLMSettings)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    send: SendSettings = field(default_factory=SendSettings)

    def __post_init__(self) -> None:
        check_integers(self, max_rows=1)
