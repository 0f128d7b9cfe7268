"""The suite `intervention`: is a text that a feature steers nearer to the words that the feature writes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...latents.text_files import read_lines
from ..method_ids import MethodId, baseline_method
from ..results import DataFile, Measurement, SuiteResult, with_methods
from .settings import InterventionSettings
from .suite import CardFacts, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..features.interventions import Embed, FeatureWords, InterventionScores
    from ..journal import Watch

PROMPTS = ("What topic is on your mind?",)  # of the paper
NONE, STEERED, RANDOM = "none", "steered", "random feature"


@dataclass(frozen=True)
class InterventionOptions:
    """What is continued.

    Args:
        intervention_prompts: prompts, one a line; by default "What topic is on your mind?".
    """

    PANEL: ClassVar[str] = "Suite intervention"

    intervention_prompts: Path | None = None
    settings: InterventionSettings = field(
        default=InterventionSettings(), metadata={"options": {"batch_size": "generation_batch_size"}}
    )


@dataclass(frozen=True)
class InterventionSuite(Suite):
    """Steers with one feature after the other and compares the texts with each feature's top tokens.

    Methods are `steered`, `none` (no steering, the same random numbers) and `random feature`: the texts that the other
    features of the run made, against this feature's words. All are means over features, with bootstrap intervals:

    similarity                    of the texts to the feature's words
    similarity_change             steered less none, paired
    similarity_minus_random       steered less random feature, paired: the score
    passed                        share of texts that are nearer than the unsteered ones
    perplexity                    of the continuations, by the unsteered model

    The curve `by_feature` has a row for each. With a strength of 0 all similarities are that of `none`, exactly.
    The test is that of seansica/sae-vector-steering, whose texts are compared by BERT vectors and without a control.

    Args:
        prompts: each is continued with every feature.
        features: SAE, and latent or name of a concept, two or more; by default `settings.interventions` of one SAE,
            drawn among those that are known to fire.
        embed: texts -> vectors, for similarity="sentences".
        settings: how it is steered and compared.

    Raises:
        ValueError: fewer than two features, one that the model does not have, an SAE that does not write into the
            residual stream, or a prompt that does not fit.
    """

    Options: ClassVar[type] = InterventionOptions
    unasked: ClassVar[bool] = False
    texts_of: ClassVar[tuple[str, ...]] = ("prompts",)
    card: ClassVar[CardFacts] = CardFacts(expected=False)

    prompts: Sequence[str] = PROMPTS
    features: Sequence[tuple[int, int | str]] | None = None
    embed: Embed | None = None
    settings: InterventionSettings = InterventionSettings()

    @classmethod
    def read(cls, options: InterventionOptions, inputs: SuiteInputs) -> InterventionSuite:
        """Prompts, and what embeds sentences if that is asked for."""
        files: list[DataFile] = []
        prompts: Sequence[str] = PROMPTS
        if (path := options.intervention_prompts) is not None:
            prompts = read_lines(path)
            files.append(source_file(path, prompts, len(prompts)))
        generation = replace(options.settings.generation, seed=inputs.bootstrap.seed)
        settings = replace(options.settings, bootstrap=inputs.bootstrap, generation=generation)
        embed = inputs.sentences() if settings.similarity == "sentences" else None
        asked = {**asdict(settings), "feature": inputs.feature_texts}
        return cls(prompts, inputs.features, embed, settings, asked=asked, data=files)

    def steps(self, model: SaeForCausalLM) -> int:
        """Continuations."""
        return (1 + len(self._chosen(model))) * len(self.prompts) * self.settings.generation.samples_per_prompt

    def _chosen(self, model: SaeForCausalLM) -> list[tuple[int, int]]:
        """SAE and latent of each feature."""
        import torch

        from ...latents.text_latents import named_features

        settings = self.settings
        if self.features is not None:
            return list(named_features(model, self.features).values())
        number = settings.intervention_sae
        if not 0 <= number < len(model.saes):
            raise ValueError(
                f"`intervention_sae` must be one of the model's {len(model.saes)} SAEs, from 0. Received: {number!r}."
            )
        maxima = model.saes[number].feature_max.cpu()
        known = maxima.nonzero()[:, 0] if bool(maxima.any()) else torch.arange(len(maxima))
        generator = torch.Generator().manual_seed(settings.generation.seed)
        drawn = known[torch.randperm(len(known), generator=generator)[: settings.interventions]]
        return [(number, feature) for feature in drawn.sort().values.tolist()]

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """Every feature."""
        from ..features.interventions import feature_words, intervention_scores, similarities
        from ..generation.continuations import chat_prompts, continue_prompts
        from ..intervals import measured, resample_counts
        from ..steering.side_by_side import vector_steering
        from ..steering.sweep import perplexity

        settings, generation, chosen = self.settings, self.settings.generation, self._chosen(model)
        if len(chosen) < 2 or not self.prompts:
            raise ValueError(
                f"Expected 2 features or more, each the others' control, and a prompt. "
                f"Received: {len(chosen)} features, {len(self.prompts)} prompts."
            )
        words = feature_words(model, tokenizer, chosen, settings.top_words)
        steerings = [
            vector_steering(feature, settings.intervention_strength, unit=settings.intervention_unit, sae=sae)
            for sae, feature in chosen
        ]
        model.prepare_steering(steerings)
        asked = chat_prompts(tokenizer, self.prompts) if generation.chat else list(self.prompts)
        prompts = [prompt for prompt in asked for _ in range(generation.samples_per_prompt)]
        n, rows = len(chosen), len(prompts)
        made = continue_prompts(
            model, tokenizer, prompts * (n + 1), [way for way in (None, *steerings) for _ in prompts], generation,
            draws=list(range(rows)) * (n + 1), report=watch.report, journal=watch.journal,
        )  # fmt: skip
        near = similarities(settings.similarity, made.texts, words, model, tokenizer, self.embed).view(n + 1, rows, n)
        scores = intervention_scores(near[1:], near[0])
        draws = resample_counts(n, settings.bootstrap.resamples, settings.bootstrap.seed)
        found: list[Measurement] = []

        def add(metric: str, values: Tensor, method: str, better: str = "") -> None:
            drawn = draws @ values / n
            interval = "bootstrap over features"
            found.append(measured(metric, values.mean(), method, drawn, interval=interval, n=n, better=better))

        add("similarity", scores.unsteered, NONE)
        add("similarity", scores.steered, STEERED, "higher")
        add("similarity", scores.random, RANDOM)
        add("similarity_change", scores.steered - scores.unsteered, STEERED, "higher")
        add("similarity_minus_random", scores.steered - scores.random, STEERED, "higher")
        add("passed", scores.passed, STEERED, "higher")
        add("passed", scores.passed_random, RANDOM)
        losses, tokens = made.losses.view(n + 1, rows).sum(1), made.tokens.view(n + 1, rows).sum(1).double()
        found.append(Measurement("perplexity", perplexity(losses[:1], tokens[:1]), NONE, n=rows, better="lower"))
        found.append(Measurement("perplexity", perplexity(losses[1:], tokens[1:]), STEERED, n=n, better="lower"))
        known = [baseline_method("none", NONE), MethodId("steered", STEERED)]
        known.append(MethodId("random_feature", RANDOM, baseline=True))
        record = {
            "features": [list(one) for one in chosen], "prompts": len(self.prompts), "drawn": self.features is None,
            "strength": settings.intervention_strength, "unit": settings.intervention_unit,
            "similarity": settings.similarity, "top_words": settings.top_words, **asdict(generation),
            "resamples": settings.bootstrap.resamples,
        }  # fmt: skip
        kept = made.texts[rows : rows * (1 + min(n, settings.intervention_samples))]
        samples = [
            {
                "sae": chosen[i // rows][0],
                "feature": chosen[i // rows][1],
                "steered": text,
                "none": made.texts[i % rows],
            }
            for i, text in enumerate(kept)
        ]
        curves = {"by_feature": _by_feature(words, scores)}
        notes = ["`random feature`: the other features' texts against this feature's words; chance of `passed`."]
        return SuiteResult(self.name, record, with_methods(found, known), curves=curves, samples=samples, notes=notes)


def _by_feature(words: Sequence[FeatureWords], scores: InterventionScores) -> list[dict[str, Any]]:
    columns = scores._asdict()
    return [
        {
            "sae": one.sae, "feature": one.feature, "words": one.tokens,
            **{name: float(values[place]) for name, values in columns.items()},
        }
        for place, one in enumerate(words)
    ]  # fmt: skip
