"""The suite `detection`: how well latents tell texts with a concept from texts without, beside simpler detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..method_ids import FEATURE, PRE_ACTIVATION, MethodId, feature_methods
from ..results import SuiteResult
from .labelled import LabelledOptions
from .settings import DetectionSettings
from .suite import MAX_LENGTH, CardFacts, Suite, SuiteInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..detection.detectors import Detector, Tree
    from ..journal import Watch


@dataclass(frozen=True)
class DetectionOptions:
    """Labelled texts, and how detectors are fitted."""

    rows: LabelledOptions = LabelledOptions()
    settings: DetectionSettings = DetectionSettings()


@dataclass(frozen=True)
class DetectionSuite(Suite):
    """Measures detectors on several splits of labelled texts into training, validation and test parts.

    Every text is scored by the mean over its tokens. Detectors, whose names are the methods of the result:

    - `toxicity of SAE 0`, `latent 17 of SAE 0`: the features that are given, by activation and `before activation`
    - `best latent of SAE 0`: the one with the highest AUROC on the training part
    - `random latent of SAE 0`: any that is active there, for scale
    - `5 latents of SAE 0`: k-sparse probing
    - `DiffMean at layers.14.resid_post`, `linear probe at ...`: on the hidden states; `bag of words`

    Metrics are `auroc`; `f1` and `accuracy`, each at the threshold that is best for it on the validation part;
    `auroc_minus_diffmean`, paired; and of decision trees (SCAR's monosemanticity, see `concept_tree`) `tree_depth`,
    `tree_nodes`, `tree_accuracy` on the test part, `tree_top_share`, the share of the splits in the first three
    levels that look at a latent, and `tree_root`, the share of trees that look at it first. All are means over the
    splits. Intervals resample texts and keep the splits and what was fitted; those of a tree's size are Student's.

    Args:
        texts: 3 or more of each label for each part; those without a token after the first ones are left out.
        labels: 0 or 1.
        features: SAE, and latent or name of a concept; the concepts of the SAEs by default, and may be empty.
        settings: how detectors are fitted and compared.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: too few texts of a label, a label that is neither 0 nor 1, or a feature the model does not have.
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

    def steps(self, model: SaeForCausalLM) -> int:
        """Texts, then splits."""
        return len(self.texts) + len(self.settings.seeds)

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """Every detector."""
        import torch

        from ...latents.context import reading_length
        from ...latents.text_latents import encode_text_means, named_features, text_ids
        from ..detection.detectors import (
            PARTS,
            Detectors,
            fit_split,
            measure_detectors,
            measure_trees,
            split_rows,
        )
        from ..intervals import resample_counts

        texts, labels, settings = self.texts, self.labels, self.settings
        max_length = reading_length(model, settings.reading.max_length, MAX_LENGTH)
        skip_first = settings.reading.skip_first
        named = named_features(model, self.features)
        if len(labels) != len(texts) or not set(labels) <= {0, 1}:
            raise ValueError(
                f"Expected a label, 0 or 1, for each of {len(texts)} texts. "
                f"Received: {len(labels)} labels, {sorted(set(labels))[:5]}."
            )
        rows, kept = text_ids(model, tokenizer, texts, max_length=max_length, least=skip_first + 1)
        truth, words = torch.tensor(labels)[kept], [texts[i] for i in kept]
        splits = [split_rows(truth, one) for one in settings.seeds]
        methods = list(feature_methods(named, self.features).values())
        asked = [[latent for sae, latent in named.values() if sae == number] for number in range(len(model.saes))]
        codes = encode_text_means(
            model, rows, asked=asked, skip_first=skip_first, tokens_at_once=settings.reading.tokens_per_batch,
            report=watch.report, keep=watch.keep,
        )  # fmt: skip
        detectors = Detectors(model, codes, words, truth, methods, asked, settings)
        found: dict[MethodId, list[Detector]] = {}
        trees: dict[MethodId, list[Tree]] = {}
        chosen: list[dict[str, Any]] = []
        for split, seed in zip(splits, settings.seeds, strict=True):
            fitted = fit_split(detectors, split, seed, watch.journal)
            for detector in fitted.detectors:
                found.setdefault(detector.method, []).append(detector)
                if detector.latents and detector.method.kind not in (FEATURE, PRE_ACTIVATION):
                    chosen.append({"seed": seed, "method": detector.method.label, "latents": detector.latents})
            for tree in fitted.trees:
                trees.setdefault(tree.method, []).append(tree)
            watch.done(1)
        counts = resample_counts(len(truth), **asdict(settings.bootstrap))
        notes = [
            "Each split: half of the texts of each label to fit and choose, a fifth to set thresholds, the rest to "
            "report. Splits overlap; intervals resample texts and keep splits and fits.",
            f"The first tokens of each text ({skip_first}) do not count.",
        ]
        if len(kept) < len(texts):
            notes.append(f"{len(texts) - len(kept)} of {len(texts)} texts are too short and left out.")
        record = {
            "features": [list(pair) for pair in named.values()], "ks": list(settings.ks),
            "choose_by": settings.choose_by, "trees": settings.trees, "seeds": list(settings.seeds),
            "parts": list(PARTS), "max_length": max_length, "skip_first": skip_first, **asdict(settings.bootstrap),
            "texts": len(truth), "positives": int(truth.sum()),
        }  # fmt: skip
        measured = measure_detectors(model, found, truth, splits, counts) + measure_trees(trees, truth, splits, counts)
        return SuiteResult(self.name, record, measured, curves={"chosen latents": chosen}, notes=notes)
