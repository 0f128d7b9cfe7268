"""The suite `scar`: a conditioned latent by SCAR's protocol (https://huggingface.co/papers/2411.07122)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..method_ids import MethodId, baseline_method
from ..results import Measurement, SuiteResult, with_methods
from ..settings import GenerationSettings
from .settings import ScarSettings
from .suite import CardFacts, Suite, SuiteInputs, source_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..journal import Watch
    from ..scorers.registry import Scorer
    from ..steering.scar import PromptRow

UNSTEERED = "none"


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
    """Toxicity, likelihood and divergence under every factor on a latent, beside the model without its SAE.

    The protocol is that of the authors' code: factors on a conditioned latent, prompts of RealToxicityPrompts in bins
    of their toxicity or the most toxic ones alone, greedy continuations of 32 tokens, perplexity of the reference
    continuations and of running text with a stride, and the first divergent token (FDT) against the base and against
    factor 1. Not followed: padding is masked, continuations are cut where they end, a reference continuation begins
    without a beginning token, and windows of running text count by their tokens (`legacy` for the mean of windows).

    Measurements are `toxicity`, `toxicity_change` (paired), `toxicity_with_prompt`, `perplexity`,
    `reference_perplexity`, `text_perplexity`, `fdt_base`, `fdt_factor_1` for `none` and each factor; the curve is
    `by_bin`. Intervals are over all prompts of the bins.

    Args:
        prompts: of RealToxicityPrompts; prompts and continuations with a token each.
        feature: the conditioned latent, or its concept's name; by default the first concept of SAE `settings.sae`.
        scorer: of toxicity; it sees new text alone, and prompt and new text.
        texts: running text, such as paragraphs of WikiText; joined for perplexity, and each long enough gives a
            prefix of 50 tokens for FDT. None of the two is measured without.
        settings: how the protocol is followed; the seed of the bootstrap draws the prompts of a bin too.

    Raises:
        ValueError: no prompt in range, one that does not fit, a feature that the model does not have, or an option
            out of range.
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
        from ..steering.scar import read_prompt_rows

        source = str(options.toxicity_prompts)
        rows = read_prompt_rows(open_text(source).rows(), source)
        files = [source_file(source, [list(row) for row in rows], len(rows))]
        texts: list[str] = []
        if options.scar_texts is not None:
            texts = read_column(options.scar_texts)
            files.append(source_file(options.scar_texts, texts, len(texts)))
        sae, feature = (inputs.features or ((0, None),))[0]
        settings = replace(options.settings, bootstrap=inputs.bootstrap, sae=sae, scorer_name=options.scar_scorer)
        asked: dict[str, Any] = {**asdict(settings), "feature": inputs.feature_texts, **inputs.judge}
        scorer = inputs.scorer(options.scar_scorer)
        return cls(rows, feature, scorer, texts, settings, asked=asked, data=files)

    def steps(self, model: SaeForCausalLM) -> int:
        """Continuations, and reference continuations that are scored."""
        return 2 * sum(map(len, self._bins().values())) * (1 + len(self.settings.factors))

    def _bins(self) -> dict[tuple[float, float], list[int]]:
        """Places of the prompts that are continued."""
        from ..steering.scar import toxicity_bins

        settings, toxicity = self.settings, [row.toxicity for row in self.prompts]
        if (least := settings.least_toxicity) is not None:
            return {(least, 1.0): [i for i, value in enumerate(toxicity) if value >= least]}
        seed = settings.bootstrap.seed
        return toxicity_bins(toxicity, width=settings.bin_width, most=settings.bin_prompts, seed=seed)

    def _feature(self, model: SaeForCausalLM) -> int | str:
        if self.feature is not None:
            return self.feature
        for concept in model.config.sae_configs[self.settings.sae].concepts:
            return concept
        raise ValueError("The suite 'scar' needs `feature`: the SAE has no concept. Received: none.")

    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """Under every factor."""
        import torch

        from ..generation.continuations import continue_prompts, prompt_ids
        from ..generation.log_likelihood import token_scores
        from ..intervals import resample_counts
        from ..scorers.registry import checked_scores
        from ..steering.scar import FDT_PREFIX, FDT_TOKENS, Adder, RunningText, scar_steering
        from ..steering.sweep import perplexity

        settings, feature, bins = self.settings, self._feature(model), self._bins()
        chosen = [self.prompts[place] for members in bins.values() for place in members]
        if not chosen:
            raise ValueError(f"Expected prompts in range. Received: 0 prompts of {len(self.prompts)} rows.")
        ways: dict[str, Any] = {UNSTEERED: None} | {
            f"factor {factor:g}": scar_steering(feature, factor, sae=settings.sae, keep_error=settings.keep_error)
            for factor in settings.factors
        }
        model.prepare_steering(list(ways.values()))
        n, prompts = len(chosen), [row.prompt for row in chosen]
        made = continue_prompts(
            model, tokenizer, prompts * len(ways), [way for way in ways.values() for _ in prompts],
            GenerationSettings(settings.continuation_tokens, temperature=0.0, batch_size=settings.rows_per_batch),
            report=watch.report, journal=watch.journal,
        )  # fmt: skip
        alone = checked_scores(self.scorer, made.texts).view(len(ways), n)
        whole = [f"{prompt}{text}" for prompt, text in zip(prompts * len(ways), made.texts, strict=True)]
        with_prompt = checked_scores(self.scorer, whole).view(len(ways), n)
        before = prompt_ids(model, tokenizer, prompts, 0)
        after = tokenizer([row.continuation for row in chosen], add_special_tokens=False)["input_ids"]
        references, firsts = [[*a, *b] for a, b in zip(before, after, strict=True)], [len(a) for a in before]
        running = RunningText(model, tokenizer, self.texts, settings)
        draws = resample_counts(n, **asdict(settings.bootstrap))
        measurements: list[Measurement] = []
        by_bin: list[dict[str, Any]] = []
        for number, (name, way) in enumerate(ways.items()):
            found = made.take(range(number * n, (number + 1) * n))
            scores = token_scores(model, references, firsts, steering=way or False, **watch._asdict()).log_p
            losses = -torch.stack([values.sum() for values in scores])
            counts = torch.tensor([len(values) for values in scores]).double()
            add = Adder(measurements, name, draws)
            add.mean("toxicity", alone[number])
            if number:
                add.mean("toxicity_change", alone[number] - alone[0])
            add.mean("toxicity_with_prompt", with_prompt[number])
            add.perplexity("perplexity", found.losses, found.tokens)
            add.perplexity("reference_perplexity", losses, counts)
            running.measure(add, way or False, watch.journal)
            start = 0
            for (low, high), members in bins.items():
                part = slice(start, start + len(members))
                start += len(members)
                by_bin.append({
                    "method": name, "low": low, "high": high, "n": len(members),
                    "toxicity": float(alone[number, part].mean()),
                    "toxicity_with_prompt": float(with_prompt[number, part].mean()),
                    "reference_perplexity": perplexity(losses[part], counts[part]),
                })  # fmt: skip
        running.compare(measurements, list(ways), settings.bootstrap)
        latent = model.config.sae_configs[settings.sae].resolve_feature(feature)
        known = [MethodId("factor", name, settings.sae, latent, str(feature)) for name in ways if name != UNSTEERED]
        measurements = with_methods(measurements, [baseline_method("none", UNSTEERED), *known])
        chosen_rows = json.dumps([list(row) for row in chosen])
        record = {
            "feature": feature, "sae": settings.sae, "factors": list(settings.factors),
            "keep_error": settings.keep_error, "prompts": n,
            "prompts_sha256": hashlib.sha256(chosen_rows.encode()).hexdigest(),
            "least_toxicity": settings.least_toxicity, "bin_width": settings.bin_width,
            "bin_prompts": settings.bin_prompts, "new_tokens": settings.continuation_tokens, "window": running.window,
            "stride": settings.stride, "text_tokens": len(running.ids), "fdt_texts": len(running.prefixes),
            "fdt_prefix": FDT_PREFIX, "fdt_tokens": FDT_TOKENS, "scorer": settings.scorer_name,
            "legacy": settings.legacy, "resamples": settings.bootstrap.resamples, "seed": settings.bootstrap.seed,
        }  # fmt: skip
        notes = [
            "Perplexity is the unsteered model's, of the continuations; that of references and text is the steered "
            "one's."
        ]
        return SuiteResult(self.name, record, measurements, curves={"by_bin": by_bin}, notes=notes)
