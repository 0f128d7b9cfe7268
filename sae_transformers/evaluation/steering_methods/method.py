"""What a method of steering is, where several are compared. No torch is imported here: the command line uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...latents.progress import Keep
    from ...modeling import SaeForCausalLM
    from ..steering.axbench import SteeringMethod

# In hidden norms, both ways.
STRENGTHS = (-0.4, -0.2, -0.1, -0.05, 0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class MethodInputs:
    """What the methods of a run are made of.

    Args:
        features: SAE, and latent or name of a concept; None for the concepts of the SAEs.
        fitting: texts with the concept and texts without, which nothing else is fitted to; None where there are none.
        strengths: in hidden norms, negative ones for less of the concept.
        op: what is done to a feature, see `FeatureEdit`.
        max_length: tokens of a fitting text; by default what the model reads, at most 256.
    """

    features: Sequence[tuple[int, int | str]] | None = None
    fitting: tuple[Sequence[str], Sequence[str]] | None = None
    strengths: Sequence[float] = STRENGTHS
    op: str = "direction"
    max_length: int | None = None


@dataclass
class PreparedMethods:
    """A model and the methods to be compared on it, as far as they are made.

    Args:
        model: to be measured; a method may put another in its place, with more SAEs on the same base.
        prompts: of the suite.
        methods: name -> its settings.
        facts: for the suite's record.
        first: SAE and number of the first latent; None as long as there is none.
        keep: has what was fitted before, and gets the rest; None keeps nothing.
    """

    model: SaeForCausalLM
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    methods: dict[str, SteeringMethod | Sequence[SteeringMethod]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    first: tuple[int, int] | None = None
    keep: Keep | None = None


class MethodMaker(ABC):
    """Makes a method for a model: a frozen dataclass in a file of its own, and a line that registers it.

    `Options` is a dataclass whose fields become options of the verb `evaluate`; None for a method without.
    """

    Options: ClassVar[type | None] = None

    @classmethod
    @abstractmethod
    def read(cls, options: Any, inputs: MethodInputs) -> MethodMaker | None:
        """The method as the options ask for it; None where they do not.

        Args:
            options: an instance of `Options`.
        """

    @abstractmethod
    def prepare(self, made: PreparedMethods) -> None:
        """Add the method's settings to `made`."""

    def count(self, model: SaeForCausalLM) -> int | None:
        """How many settings `prepare` adds; None where that is not known beforehand."""
        return None


METHODS: dict[str, type[MethodMaker]] = {}


def register_steering_method(name: str, maker: type[MethodMaker]) -> None:
    """Let the suite `steering` compare a method. In this order they are measured."""
    METHODS[name] = maker


def read_methods(options: Mapping[str, Any], inputs: MethodInputs) -> list[MethodMaker]:
    """Those of the registered methods that the options ask for. options: name -> instance of its `Options`."""
    made = (maker.read(options.get(name), inputs) for name, maker in METHODS.items())
    return [one for one in made if one is not None]


def prepare_methods(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    makers: Sequence[MethodMaker],
    keep: Keep | None = None,
) -> PreparedMethods:
    """Make methods for `compare_methods`.

    Args:
        model: in eval mode. A method may build another model on its base; measure the one that comes back.
        keep: has what a stopped run fitted, and gets the rest.

    Raises:
        ValueError: there is nothing to compare, or a feature that the model does not have.
    """
    made = PreparedMethods(model, tokenizer, prompts, keep=keep)
    for maker in makers:
        maker.prepare(made)
    if not made.methods:
        raise ValueError(
            "Expected a feature, a steering, labelled texts or an instruction to compare. Received: none of them."
        )
    return made
