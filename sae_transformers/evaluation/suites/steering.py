"""The suite `steering`: what each method of steering gains of a concept and costs, against no steering."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...latents.text_files import read_lines
from ..results import SuiteResult
from ..settings import FluencyBudget, GenerationSettings
from ..steering_methods.method import METHODS, STRENGTHS, MethodInputs, MethodMaker, prepare_methods, read_methods
from .labelled import LabelledOptions
from .settings import SteeringSuiteSettings
from .suite import Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..journal import Watch
    from ..scorers.registry import Scorer


# Option names of nested settings, None for fields that are no options; the verb's own batch size is another suite's.
OPTIONS = {"divergence": None, "scorer_name": None, "batch_size": "generation_batch_size"}


def method_options() -> Any:
    """A dataclass instance with the options of each registered method, by the method's name."""
    fields = [
        (name.replace(" ", "_"), maker.Options, field(default=maker.Options()))
        for name, maker in METHODS.items()
        if maker.Options is not None
    ]
    return dataclasses.make_dataclass("MethodOptions", fields, frozen=True)()


@dataclass(frozen=True)
class SteeringOptions:
    """Prompts, and what is compared on them.

    Args:
        prompts: prompts, one a line; half of them choose, half report.
        scorer: what scores continuations: sentiment, profanity, words (fitted to half of the labelled texts),
            classifier:ID#LABEL, judge:CONCEPT, perspective. By default words with labelled texts, else sentiment.
        op: what is done to the feature, as `steer` takes it.
        strengths: strengths that are tried, in hidden norms; by default 0.05 to 0.4, both ways.
    """

    PANEL: ClassVar[str] = "Suite steering"

    prompts: Path | None = None
    scorer: str | None = None
    op: str = "direction"
    strengths: tuple[float, ...] | None = None
    methods: Any = field(default_factory=method_options)
    settings: SteeringSuiteSettings = field(default=SteeringSuiteSettings(), metadata={"options": OPTIONS})
    rows: LabelledOptions = LabelledOptions()


@dataclass(frozen=True)
class SteeringSuite(Suite):
    """Measures every setting of every method; see `compare_methods`.

    Args:
        prompts: two or more; half of them choose settings, half report.
        methods: what is compared, see `evaluation.steering_methods`.
        scorer: continuations -> a number each, see `scorers`.
        settings: how methods are compared.
    """

    Options: ClassVar[type] = SteeringOptions
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    texts_of: ClassVar[tuple[str, ...]] = ("prompts",)

    prompts: Sequence[str]
    methods: Sequence[MethodMaker]
    scorer: Scorer
    settings: SteeringSuiteSettings = SteeringSuiteSettings()

    @classmethod
    def read(cls, options: SteeringOptions, inputs: SuiteInputs) -> SteeringSuite:
        """Prompts; of labelled texts one half makes DiffMean's direction, the other the scorer."""
        from ...latents.splits import label_halves

        path, seed = options.prompts or Path(), inputs.bootstrap.seed
        prompts = read_lines(path)
        files, fitting, scoring = [source_file(path, prompts, len(prompts))], None, None
        if options.rows.labelled is not None:
            rows = options.rows.read(seed)
            files.append(rows.file)
            fitting, scoring = (rows.sides(half) for half in label_halves(rows.labels, seed))
        name = options.scorer or ("words" if scoring else "sentiment")
        strengths = STRENGTHS if options.strengths is None else options.strengths
        tokens = inputs.reading.tokens_per_batch
        settings = replace(
            options.settings, scorer_name=name, tokens_per_batch=tokens, bootstrap=inputs.bootstrap,
            generation=replace(options.settings.generation, seed=seed),
        )  # fmt: skip
        given = MethodInputs(inputs.features, fitting, strengths, options.op, inputs.reading.max_length)
        chosen = {method: getattr(options.methods, method.replace(" ", "_"), None) for method in METHODS}
        asked = {**_asked(settings), "strengths": list(strengths), "tokens_at_once": tokens, "op": options.op}
        for of_method in chosen.values():
            asked |= dataclasses.asdict(of_method) if of_method is not None else {}
        asked |= {"feature": inputs.feature_texts, **inputs.told("max_length"), **options.rows.told(), **inputs.judge}
        scorer, methods = inputs.scorer(name, scoring), read_methods(chosen, given)
        return cls(prompts, methods, scorer, settings, asked=asked, data=files)

    def identity(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Prompts stand in a chat template only where the tokenizer has one."""
        told = super().identity(tokenizer)
        return {**told, "chat": self.settings.generation.chat and bool(getattr(tokenizer, "chat_template", None))}

    def steps(self, model: SaeForCausalLM) -> int | None:
        """Rows: continuations of each sample, greedy ones to compare, and those whose distributions are compared."""
        counts = [maker.count(model) for maker in self.methods]
        generation = self.settings.generation
        passes = generation.samples_per_prompt + self.settings.divergence * (1 + (generation.temperature > 0))
        rows = passes * len(self.prompts)
        return None if None in counts else rows * (1 + sum(count or 0 for count in counts))

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """Make the methods and compare them; the model is as it was afterwards."""
        from ..steering.suite import compare_methods

        made = prepare_methods(model, tokenizer, self.prompts, self.methods, watch.keep)
        try:
            return compare_methods(made, self.scorer, self.settings, watch)
        finally:
            if made.model is not model:  # a method's model holds the same base and SAEs: they come back
                made.model.unwrap()
                model.rewrap()

    @classmethod
    def plot(cls, result: SuiteResult, path: str | Path) -> Path | None:
        """The Pareto plot of the half that reports."""
        from ..steering.plot import plot_steering

        rows = list(result.curves.get("reporting", ()))
        return plot_steering(rows, path) if rows else super().plot(result, path)


def _asked(settings: SteeringSuiteSettings) -> dict[str, Any]:
    generation: GenerationSettings = settings.generation
    budget: FluencyBudget = settings.budget
    return {
        "new_tokens": generation.max_new_tokens, "temperature": generation.temperature,
        "generation_seeds": generation.samples_per_prompt, "perplexity_limit": budget.perplexity_ratio,
        "repetition_limit": budget.added_repetition, "chat": generation.chat, "samples": settings.samples,
        "rows_at_once": generation.batch_size, "resamples": settings.bootstrap.resamples, "seed": generation.seed,
        "scorer": settings.scorer_name, "goals": list(settings.goals),
        **({} if generation.top_p == 1 else {"top_p": generation.top_p}),
    }  # fmt: skip
