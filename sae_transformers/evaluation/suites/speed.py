"""The suite `speed`: what the SAEs of a model cost in time and memory, against the bare base, within one run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..results import SuiteResult
from .settings import SpeedSettings
from .suite import CardFacts, Report, Suite, SuiteInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed."""

    settings: SpeedSettings = field(default=SpeedSettings(), metadata={"options": {"batch_size": None}})


@dataclass(frozen=True)
class SpeedSuite(Suite):
    """See `speed_suite`.

    Args:
        settings: what is timed.
    """

    Options: ClassVar[type] = SpeedOptions
    card: ClassVar[CardFacts] = CardFacts(of_model=False)

    settings: SpeedSettings = SpeedSettings()

    @classmethod
    def read(cls, options: SpeedOptions, inputs: SuiteInputs) -> SpeedSuite:
        """Nothing is read."""
        return cls(replace(options.settings, seed=inputs.bootstrap.seed))

    def identity(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """With the number of threads."""
        import torch

        settings = self.settings
        told = {"prompt_tokens": settings.prompt_tokens, "new_tokens": settings.generated_tokens}
        told |= {"repeats": settings.repeats, "seed": settings.seed, "threads": torch.get_num_threads()}
        return told if settings.batch_size == 1 else {**told, "batch_size": settings.batch_size}

    def __call__(
        self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, *,
        report: Report | None = None, journal: object = None,
    ) -> SuiteResult:  # fmt: skip
        """Time the base, the model, and the model with its default steering."""
        from ..speed import speed_suite

        return speed_suite(model, self.settings, report=report)

    def steps(self, model: SaeForCausalLM) -> int:
        """Repeats of `forward`, `generate` and `decode`."""
        return 3 * self.settings.repeats
