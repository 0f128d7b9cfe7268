"""The suite `capability`: what a model can still do, by lm-evaluation-harness: LAMBADA and MMLU from local data."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..method_ids import MethodId, baseline_method
from ..results import DataFile, Measurement, SuiteResult, data_file, with_methods
from .lambada import LambadaOptions
from .settings import CapabilitySettings
from .suite import Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..capability.tasks import MmluSubject
    from ..journal import Watch

BASE, UNSTEERED, DEFAULT = "base", "none", "default"


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
    """Runs lm-eval's LAMBADA and MMLU on a model without steering, with it, and on its bare base.

    lambada_accuracy      share of last words that are the most likely ones, token by token
    lambada_perplexity    exp of the mean negative log-probability of a last word
    mmlu_SUBJECT_accuracy share of questions whose right letter is the most likely one; mmlu_accuracy: of all subjects
    ..._change            the same less what it is without steering, on the same rows
    log_likelihood_difference  largest |difference| to the base of any log-likelihood; 0 for a model without steering

    The methods are `base`, `none` (the model, no steering) and the names of `steerings`. Prompts, answers and metrics
    are those of the installed lm-eval (https://github.com/EleutherAI/lm-evaluation-harness); LAMBADA is
    https://huggingface.co/papers/1606.06031, MMLU https://huggingface.co/papers/2009.03300.

    Args:
        lambada: passages, of `read_lambada`; none to leave it out.
        mmlu: subject -> questions, of `read_mmlu`; None to leave it out.
        settings: how the tasks are run.
        steerings: name -> `Steering`; by default the model's own as `default`, where it has one.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is nothing to ask, a name of a steering is taken, or steering that the model cannot do.
    """

    Options: ClassVar[type] = CapabilityOptions
    needs: ClassVar[tuple[str, ...]] = ("lambada", "mmlu")
    texts_of: ClassVar[tuple[str, ...]] = ("lambada", "mmlu")

    lambada: Sequence[str] = ()
    mmlu: Mapping[str, MmluSubject] | None = None
    settings: CapabilitySettings = CapabilitySettings()
    steerings: Mapping[str, Any] | None = None

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

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """The base, the model without steering, and the model with each steering."""
        from ...modeling import Steering
        from ..capability.answers import answer_measurements, answers_to, largest_difference
        from ..capability.lm_eval import harness_model
        from ..capability.tasks import require_lm_eval, write_tasks

        version, settings, steerings = require_lm_eval(), self.settings, self.steerings
        shots, limit, batch_size = settings.shots, settings.limit, settings.batch_size
        if steerings is None:
            steerings = {DEFAULT: model.steering} if model.steering else {}
        if taken := {BASE, UNSTEERED} & set(steerings):
            raise ValueError(f"Steerings need names other than {BASE!r} and {UNSTEERED!r}. Received: {sorted(taken)}.")
        chosen = {name: Steering.coerce(steering) for name, steering in steerings.items()}
        prepared = {name: model.prepare_steering(steering) for name, steering in chosen.items()}
        methods: dict[str, tuple[Any, Any]] = {BASE: (model.lm, None)} if settings.base else {}
        methods |= {UNSTEERED: (model, False)} | {name: (model, plan) for name, plan in prepared.items()}
        with tempfile.TemporaryDirectory(prefix="sae_transformers_") as folder:
            names = write_tasks(folder, self.lambada, self.mmlu, shots=shots)
            found = {}
            for name, (lm, steering) in methods.items():
                harness = harness_model(lm, tokenizer, steering=steering, batch_size=batch_size, report=watch.report)
                told = {
                    "method": name, "steering": chosen[name].to_dict() if name in chosen else None, "limit": limit,
                    "shots": shots, "batch_size": batch_size,
                }  # fmt: skip
                found[name] = {task: answers_to(harness, task, folder, told, watch.journal) for task in names}
        measurements: list[Measurement] = []
        for method, tasks in found.items():
            without = found[UNSTEERED] if method in prepared else None
            measurements += answer_measurements(method, tasks, without, settings.bootstrap)
            if settings.base and method != BASE:
                measurements.append(largest_difference(method, tasks, found[BASE]))
        known = [baseline_method("base", BASE), baseline_method("none", UNSTEERED)]
        measurements = with_methods(measurements, [*known, *(MethodId("steered", name) for name in prepared)])
        record = {
            "tasks": names, "shots": shots, "limit": limit, "batch_size": batch_size, **asdict(settings.bootstrap),
            "lm_eval": version,
            "rows": {name: len(answers.right) for name, answers in found[UNSTEERED].items()},
            "steerings": {name: steering.to_dict() for name, steering in chosen.items()},
        }  # fmt: skip
        notes = [
            f"Prompts and metrics are those of lm-eval {version} (lambada_openai, mmlu); the data is local.",
            "Texts begin as the tokenizer begins them; no chat template.",
        ]
        return SuiteResult(self.name, record, measurements, notes=notes)
