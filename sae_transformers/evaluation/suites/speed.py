"""The suite `speed`: what the SAEs of a model cost in time and memory, against the bare base, within one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..method_ids import MethodId, baseline_method
from ..results import Measurement, SuiteResult, with_methods
from .settings import SpeedSettings
from .suite import CardFacts, Suite, SuiteInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM, Steering
    from ..journal import Watch


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed."""

    settings: SpeedSettings = field(default=SpeedSettings(), metadata={"options": {"batch_size": None}})


@dataclass(frozen=True)
class SpeedSuite(Suite):
    """Times forward passes and generation of the bare base, the wrapped model, the steered one and one that reports
    its features.

    Methods are `base` (the base model with every hook removed), `wrapped` (no steering), `steered`, `output_features`.
    All of them run once in every repeat, in turn, so that a busy neighbour hits all alike; the fastest repeat of each
    counts.

    forward_, generate_, decode_tokens_per_s   of the fastest repeat; all of them are in the curve `repeats`
    forward_, generate_, decode_time_ratio     of the fastest repeats, over the base's: of the process's CPU time on a
                                               CPU, where a neighbour's load moves the clock, else by the clock
    sae_bytes, base_bytes                      of the parameters and buffers
    peak_bytes                                 that a forward pass takes beyond what is loaded, on a GPU

    `forward` passes a prompt without a cache. `decode` is greedy generation step by step, which `output_features`
    needs, since `generate` does not report features.

    Args:
        settings: prompts are random tokens, whose texts do not matter.
        steering: the model's default by default. Without any, `steered` is left out.

    Raises:
        ValueError: more tokens than the model's context holds.
    """

    Options: ClassVar[type] = SpeedOptions
    card: ClassVar[CardFacts] = CardFacts(of_model=False)

    settings: SpeedSettings = SpeedSettings()
    steering: Steering | None = None

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

    def steps(self, model: SaeForCausalLM) -> int:
        """Repeats of `forward`, `generate` and `decode`."""
        return 3 * self.settings.repeats

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """The base, the model, and the model with its steering."""
        import torch

        from ..journal import result_of
        from ..speed import BASE, machine, model_calls, peak_memory, size_in_bytes, timed

        settings, steering = self.settings, model.steering if self.steering is None else self.steering
        calls = model_calls(model, settings, steering)
        found: list[Measurement] = []
        rows: list[dict[str, Any]] = []
        told = [asdict(settings), steering.to_dict() if steering else None]
        for kind, some in calls.items():
            times = timed(model, some, settings.repeats, watch, [kind, *told])
            per_row = settings.prompt_tokens if kind == "forward" else settings.generated_tokens
            for name, spent in times.items():
                rows += [{"call": kind, "method": name, "repeat": i, **one._asdict()} for i, one in enumerate(spent)]
                speed = settings.batch_size * per_row / min(one.seconds for one in spent)
                found.append(Measurement(f"{kind}_tokens_per_s", speed, name, n=settings.repeats, better="higher"))
            for name in [name for name in times if name != BASE]:
                ratio = min(one.cost for one in times[name]) / min(one.cost for one in times[BASE])
                found.append(Measurement(f"{kind}_time_ratio", ratio, name, n=settings.repeats, better="lower"))
        peaks = result_of(
            watch.journal, lambda: ["peak", *machine(model), *told], lambda: peak_memory(model, calls["forward"])
        )
        weights = MethodId("saes", f"{len(model.saes)} SAEs")
        found += [
            Measurement("sae_bytes", sum(map(size_in_bytes, model.saes)), weights.label, better="lower"),
            Measurement("base_bytes", size_in_bytes(model.lm), BASE, better="lower"),
            *(Measurement("peak_bytes", peak, name, better="lower") for name, peak in peaks.items()),
        ]
        methods = [MethodId(name, name) for name in calls["forward"] if name != BASE]
        record = {
            "batch_size": settings.batch_size, "prompt_tokens": settings.prompt_tokens,
            "new_tokens": settings.generated_tokens, "repeats": settings.repeats, "seed": settings.seed,
            "steering": steering.to_dict() if steering else None, "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        }  # fmt: skip
        notes = [
            "Speeds are of this machine, under whatever else ran on it; ratios within one run can be compared. On a "
            "CPU they are of the process's CPU time.",
            "Speeds of `generate` and `decode` count new tokens; the time includes the pass over the prompt.",
        ]
        if not steering:
            notes.append("No steering with an edit, the model's default or a given one: `steered` is not measured.")
        found = with_methods(found, [baseline_method("base", BASE), weights, *methods])
        return SuiteResult(self.name, record, found, curves={"repeats": rows}, notes=notes)
