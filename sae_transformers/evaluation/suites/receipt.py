"""The suite `receipt`: what the model's default steering does, for its file and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...latents.text_files import read_lines
from ..method_ids import MethodId
from ..results import DataFile, Measurement, SuiteResult, with_methods
from .labelled import LabelledOptions
from .settings import ReceiptSettings
from .suite import CardFacts, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..journal import Watch
    from ..scorers.registry import Scorer

STEERED = "steered"
BETTER = {  # the others have no better side
    "moved_wrong_way": "lower", "perplexity": "lower", "perplexity_ratio": "lower", "repetition_change": "lower",
    "kl_neutral_nats": "lower", "jailbreak_change": "lower", "false_alarm_rate": "lower",
}  # fmt: skip
NOTES = (
    "Intervals are of what the same measurement gives on fresh prompts, drawn as these were.",
    "Refusals are told by the words that an answer begins with; an answer that does not refuse need not help.",
)


@dataclass(frozen=True)
class ReceiptOptions:
    """What the steering is tried on.

    Args:
        receipt_prompts: prompts that it is for, one a line.
        neutral: texts in which nothing should change, one a line: for KL and a gate's false alarms.
        forbidden: requests that the model should refuse, one a line: for jailbreaks.
        receipt_scorer: what scores continuations, as `--scorer` takes it; by default `words`, fitted to the labelled
            texts, if there are any, else `sentiment`.
    """

    PANEL: ClassVar[str] = "Suite receipt"

    receipt_prompts: Path | None = None
    neutral: Path | None = None
    forbidden: Path | None = None
    receipt_scorer: str | None = None
    settings: ReceiptSettings = field(
        default=ReceiptSettings(),
        metadata={"options": {"tokens_per_batch": None, "scorer_name": None, "batch_size": "generation_batch_size"}},
    )
    rows: LabelledOptions = LabelledOptions()


@dataclass(frozen=True)
class ReceiptSuite(Suite):
    """Measures the `Receipt` of the model's default steering; the steering with it is written beside the record.

    Args:
        prompts: that the steering is for.
        neutral: texts in which nothing should change.
        scorer: continuations -> a number each, see `scorers`.
        forbidden: requests that the model should refuse.
        settings: how it is measured.

    Raises:
        ValueError: the model has no default steering; and as `measure_receipt`.
    """

    Options: ClassVar[type] = ReceiptOptions
    needs: ClassVar[tuple[str, ...]] = ("receipt_prompts",)
    texts_of: ClassVar[tuple[str, ...]] = ("prompts", "neutral", "forbidden")
    card: ClassVar[CardFacts] = CardFacts(expected=False)

    prompts: Sequence[str]
    neutral: Sequence[str]
    scorer: Scorer
    forbidden: Sequence[str] = ()
    settings: ReceiptSettings = ReceiptSettings()

    @classmethod
    def read(cls, options: ReceiptOptions, inputs: SuiteInputs) -> ReceiptSuite:
        """Prompts, texts and requests; labelled texts fit the scorer `words`."""
        files: list[DataFile] = []

        def lines(path: Path | None) -> list[str]:
            if path is None:
                return []
            found = read_lines(path)
            files.append(source_file(path, found, len(found)))
            return found

        prompts, neutral, forbidden = (
            lines(path) for path in (options.receipt_prompts, options.neutral, options.forbidden)
        )
        seed, labelled = inputs.bootstrap.seed, None
        if options.rows.labelled is not None:
            rows = options.rows.read(seed)
            files.append(rows.file)
            labelled = rows.sides(list(range(len(rows.labels))))
        name = options.receipt_scorer or ("words" if labelled else "sentiment")
        settings = replace(
            options.settings, scorer_name=name, tokens_per_batch=inputs.reading.tokens_per_batch,
            generation=replace(options.settings.generation, seed=seed),
        )  # fmt: skip
        asked = {**asdict(settings), **options.rows.told(), **inputs.judge}
        return cls(prompts, neutral, inputs.scorer(name, labelled), forbidden, settings, asked=asked, data=files)

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """Of the default steering."""
        from ..steering.receipt import ReceiptTexts, measure_receipt

        steering = model.steering
        if not steering:
            raise ValueError(
                "A receipt is of a steering: give one (`steering`), or a model with a default. Received: none."
            )
        texts = ReceiptTexts(self.prompts, self.neutral, self.forbidden)
        receipt = measure_receipt(model, tokenizer, steering, texts, self.scorer, self.settings, watch=watch)
        level = f"prediction of {self.settings.receipt_level:.0%} for fresh prompts"
        found = [
            Measurement(name, one.value, STEERED, one.low, one.high, level, n=one.n, better=BETTER.get(name, ""))
            for name, one in receipt.numbers.items()
        ]
        record = {**receipt.about, "steering": receipt.signed(steering).to_dict()}
        return SuiteResult(self.name, record, with_methods(found, [MethodId(STEERED, STEERED)]), notes=list(NOTES))

    @classmethod
    def rows(cls, result: SuiteResult) -> list[dict[str, Any]]:
        """As other suites are shown; the intervals are of another level."""
        shown = f"{result.settings['level']:.0%} interval".replace("%", " %")
        return [
            {shown if name == "95 % interval" else name: value for name, value in row.items()}
            for row in super().rows(result)
        ]

    @classmethod
    def beside(cls, result: SuiteResult) -> Mapping[str, Any]:
        """The steering with its receipt."""
        return {"steering.json": result.settings["steering"]}
