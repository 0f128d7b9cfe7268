"""The suite `detection`: how well latents tell texts with a concept from texts without, beside simpler detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..results import SuiteResult
from .labelled import LabelledOptions
from .settings import DetectionSettings
from .suite import CardFacts, Report, Suite, SuiteInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM


@dataclass(frozen=True)
class DetectionOptions:
    """Labelled texts, and how detectors are fitted."""

    rows: LabelledOptions = LabelledOptions()
    settings: DetectionSettings = DetectionSettings()


@dataclass(frozen=True)
class DetectionSuite(Suite):
    """See `detection_suite`.

    Args:
        texts: 3 or more of each label for each part.
        labels: 0 or 1.
        features: SAE, and latent or name of a concept; the concepts of the SAEs by default.
        settings: how detectors are fitted and compared.
    """

    Options: ClassVar[type] = DetectionOptions
    needs: ClassVar[tuple[str, ...]] = ("labelled",)
    texts_of: ClassVar[tuple[str, ...]] = ("texts", "labels")
    card: ClassVar[CardFacts] = CardFacts(
        "text-classification", of_features=("auroc", "f1"), differences=r"_change$|_ratio$|_minus_|^tree_"
    )

    texts: Sequence[str]
    labels: Sequence[int]
    features: Sequence[tuple[int, int | str]] | None = None
    settings: DetectionSettings = DetectionSettings()

    @classmethod
    def read(cls, options: DetectionOptions, inputs: SuiteInputs) -> DetectionSuite:
        """Labelled rows."""
        rows = options.rows.read(inputs.bootstrap.seed)
        settings = replace(options.settings, reading=inputs.reading, bootstrap=inputs.bootstrap)
        asked = {
            **inputs.told(), "choose_by": settings.choose_by, "trees": settings.trees, "seeds": list(settings.seeds),
            "ks": list(settings.ks), "feature": inputs.feature_texts, **options.rows.told(),
        }  # fmt: skip
        return cls(rows.texts, rows.labels, inputs.features, settings, asked=asked, data=[rows.file])

    def __call__(
        self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, *,
        report: Report | None = None, journal: object = None,
    ) -> SuiteResult:  # fmt: skip
        """Measure every detector."""
        from ..detection.suite import detection_suite

        return detection_suite(
            model, tokenizer, self.texts, self.labels, self.settings, features=self.features, report=report
        )

    def steps(self, model: SaeForCausalLM) -> int:
        """Texts, then splits."""
        return len(self.texts) + len(self.settings.seeds)
