"""Instructions before the prompts, in place of steering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .method import MethodInputs, MethodMaker, PreparedMethods

if TYPE_CHECKING:
    from ...modeling import SaeForCausalLM


@dataclass(frozen=True)
class PromptingOptions:
    """What a model is told.

    Args:
        more: an instruction for the concept, to compare with.
        less: an instruction against it.
    """

    PANEL: ClassVar[str] = "Suite steering"

    more: str = ""
    less: str = ""


@dataclass(frozen=True)
class Prompting(MethodMaker):
    """Method `prompt`: an instruction before every prompt, one for more of the concept and one for less.

    Args:
        more, less: instructions; an empty one is left out.
    """

    Options: ClassVar[type | None] = PromptingOptions

    more: str
    less: str = ""

    @classmethod
    def read(cls, options: PromptingOptions, inputs: MethodInputs) -> Prompting | None:
        """Instructions, where one was given."""
        return cls(options.more, options.less) if options.more.strip() or options.less.strip() else None

    def prepare(self, made: PreparedMethods) -> None:
        """A setting for each instruction."""
        from .over_strengths import prompt_methods

        made.methods["prompt"] = prompt_methods(made.prompts, self.more, self.less)
        made.facts["instructions"] = {"more": self.more, "less": self.less}

    def count(self, model: SaeForCausalLM) -> int:
        """A setting for each instruction."""
        return bool(self.more.strip()) + bool(self.less.strip())
