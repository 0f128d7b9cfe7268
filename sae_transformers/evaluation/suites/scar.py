"""The suite `scar`: a conditioned latent by SCAR's protocol (https://huggingface.co/papers/2411.07122)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..results import SuiteResult
from .settings import ScarSettings
from .suite import CardFacts, Report, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..scorers.registry import Scorer
    from ..steering.scar import PromptRow


@dataclass(frozen=True)
class ScarOptions:
    """RealToxicityPrompts, and running text.

    Args:
        toxicity_prompts: .jsonl of RealToxicityPrompts, or rows with prompt, toxicity (0 to 1) and continuation.
        scar_texts: running text, such as paragraphs of WikiText; without, its perplexity and the first divergent
            token are not measured.
        scar_scorer: what scores toxicity, as `--scorer` takes it.
    """

    PANEL: ClassVar[str] = "Suite scar"

    toxicity_prompts: str | None = None
    scar_texts: str | None = None
    scar_scorer: str = "profanity"
    settings: ScarSettings = field(
        default=ScarSettings(), metadata={"options": {"sae": None, "scorer_name": None, "legacy": None}}
    )


@dataclass(frozen=True)
class ScarSuite(Suite):
    """See `scar_protocol.scar_suite`.

    Args:
        prompts: of RealToxicityPrompts.
        feature: the conditioned latent, or its concept's name; by default the first concept of SAE `settings.sae`.
        scorer: of toxicity.
        texts: running text.
        settings: how the protocol is followed.
    """

    Options: ClassVar[type] = ScarOptions
    needs: ClassVar[tuple[str, ...]] = ("toxicity_prompts",)
    texts_of: ClassVar[tuple[str, ...]] = ("prompts", "texts")
    card: ClassVar[CardFacts] = CardFacts(expected=False)

    prompts: Sequence[PromptRow]
    feature: int | str | None
    scorer: Scorer
    texts: Sequence[str] = ()
    settings: ScarSettings = ScarSettings()

    @classmethod
    def read(cls, options: ScarOptions, inputs: SuiteInputs) -> ScarSuite:
        """Prompts with their toxicity, and running text."""
        from ...latents.texts import open_text, read_column
        from ..scorers.registry import get_scorer
        from ..steering.scar import read_prompt_rows

        source = str(options.toxicity_prompts)
        rows = read_prompt_rows(open_text(source).rows(), source)
        files = [source_file(source, [list(row) for row in rows], len(rows))]
        texts: list[str] = []
        if options.scar_texts is not None:
            texts = read_column(options.scar_texts)
            files.append(source_file(options.scar_texts, texts, len(texts)))
        ask = inputs.ask() if options.scar_scorer.startswith("judge:") and inputs.ask is not None else None
        scorer = get_scorer(options.scar_scorer, ask=ask, seed=inputs.bootstrap.seed)
        sae, feature = (inputs.features or ((0, None),))[0]
        settings = replace(options.settings, bootstrap=inputs.bootstrap, sae=sae, scorer_name=options.scar_scorer)
        asked: dict[str, Any] = {**asdict(settings), "feature": inputs.feature_texts, **inputs.judge}
        return cls(rows, feature, scorer, texts, settings, asked=asked, data=files)

    def __call__(
        self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, *,
        report: Report | None = None, journal: object = None,
    ) -> SuiteResult:  # fmt: skip
        """Measure under every factor."""
        from ..steering.scar import scar_suite

        feature = self.feature
        if feature is None:
            concepts = list(model.config.sae_configs[self.settings.sae].concepts)
            if not concepts:
                raise ValueError("The suite 'scar' needs `feature`: the SAE has no concept. Received: none.")
            feature = concepts[0]
        return scar_suite(
            model, tokenizer, self.prompts, feature, self.scorer, self.settings, texts=self.texts, report=report
        )
