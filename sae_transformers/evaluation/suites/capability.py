"""The suite `capability`: what a model can still do, by lm-evaluation-harness: LAMBADA and MMLU from local data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..results import DataFile, SuiteResult, data_file
from .lambada import LambadaOptions
from .settings import CapabilitySettings
from .suite import Report, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..capability.tasks import MmluSubject
    from ..journal import Journal


@dataclass(frozen=True)
class CapabilityOptions:
    """Local data of lm-eval's tasks.

    Args:
        mmlu: archive or folder of MMLU.
        subjects: subjects of MMLU; by default all.
    """

    PANEL: ClassVar[str] = "Suite capability"

    mmlu: Path | None = None
    subjects: tuple[str, ...] | None = None
    settings: CapabilitySettings = field(default=CapabilitySettings(), metadata={"options": {"base": None}})
    words: LambadaOptions = LambadaOptions()


@dataclass(frozen=True)
class CapabilitySuite(Suite):
    """See `capability_suite`.

    Args:
        lambada: passages, of `read_lambada`; none to leave it out.
        mmlu: subject -> questions, of `read_mmlu`; None to leave it out.
        settings: how the tasks are run.
    """

    Options: ClassVar[type] = CapabilityOptions
    needs: ClassVar[tuple[str, ...]] = ("lambada", "mmlu")
    texts_of: ClassVar[tuple[str, ...]] = ("lambada", "mmlu")

    lambada: Sequence[str] = ()
    mmlu: Mapping[str, MmluSubject] | None = None
    settings: CapabilitySettings = CapabilitySettings()

    @classmethod
    def read(cls, options: CapabilityOptions, inputs: SuiteInputs) -> CapabilitySuite:
        """Passages and questions."""
        from ..capability.tasks import read_lambada, read_mmlu, require_lm_eval

        require_lm_eval()
        files: list[DataFile] = []
        passages: list[str] = []
        questions = None
        if (path := options.words.lambada) is not None:
            try:
                passages = read_lambada(path)
            except ValueError as error:
                raise ValueError(f"`lambada` must be JSON lines. Received: {str(path)!r}: {error}") from error
            files.append(data_file(path, rows=len(passages)))
        if options.mmlu is not None:
            questions = read_mmlu(options.mmlu, None if options.subjects is None else list(options.subjects))
            rows = {name: [one.test, one.shots] for name, one in questions.items()}
            files.append(source_file(options.mmlu, rows, sum(len(one.test) for one in questions.values())))
        settings = replace(options.settings, bootstrap=inputs.bootstrap)
        asked: dict[str, Any] = {
            "shots": settings.shots, "limit": settings.limit, "batch_size": settings.batch_size,
            **inputs.told("resamples", "seed"),
            "subjects": None if options.subjects is None else ",".join(options.subjects),
        }  # fmt: skip
        return cls(passages, questions, settings, asked=asked, data=files)

    def __call__(
        self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, *,
        report: Report | None = None, journal: Journal | None = None,
    ) -> SuiteResult:  # fmt: skip
        """Ask the base, the model without steering, and the model with its default."""
        from ..capability.suite import capability_suite

        return capability_suite(
            model, tokenizer, self.settings, lambada=self.lambada, mmlu=self.mmlu, report=report, journal=journal
        )
