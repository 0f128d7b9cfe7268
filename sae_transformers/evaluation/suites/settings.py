"""Settings of the suites of an evaluation. No torch is imported here: the command line makes its options of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...latents.settings import ReadingSettings, check_choice, check_integers, check_numbers
from ..settings import BootstrapSettings, FluencyBudget, GenerationSettings

GOALS = {"raise": 1.0, "lower": -1.0}
CHOICES = ("mean_difference", "auroc")  # of a sparse probe's latents, see `k_sparse_probing.rank_latents`
SIMILARITIES = ("input", "output", "words", "sentences")
UNITS = ("norm", "absolute", "max")
READING = ReadingSettings(tokens_per_batch=1024)
BOOTSTRAP = BootstrapSettings()
LONG_BOOTSTRAP = BootstrapSettings(resamples=2000)


@dataclass(frozen=True)
class DetectionSettings:
    """How detectors are fitted and compared.

    Args:
        seeds: seeds of the splits, of what is fitted and of the random latent.
        ks: numbers of latents of the k-sparse probes; larger ones than are active are left out.
        choose_by: how a sparse probe's latents are chosen: `mean_difference` or `auroc`.
        trees: fit SCAR's decision trees.
    """

    PANEL: ClassVar[str] = "Suite detection"

    seeds: tuple[int, ...] = (0, 1, 2)
    ks: tuple[int, ...] = (1, 2, 5, 16)
    choose_by: str = "mean_difference"
    trees: bool = True
    reading: ReadingSettings = ReadingSettings()
    bootstrap: BootstrapSettings = BOOTSTRAP

    def __post_init__(self) -> None:
        check_choice(self, "choose_by", CHOICES)
        if not self.seeds or any(k < 1 for k in self.ks):
            raise ValueError(
                f"Expected one of `seeds` or more, and `ks` of 1 or more. "
                f"Received: seeds={list(self.seeds)!r}, ks={list(self.ks)!r}."
            )


@dataclass(frozen=True)
class SteeringSuiteSettings:
    """How methods of steering are compared.

    Args:
        goals: what is wanted of the score: `raise`, `lower` or both; each has a setting of its own.
        samples: prompts whose continuations, with and without steering, are kept as texts.
        divergence: measure the first divergent token of greedy text, and KL to the unsteered model.
        tokens_per_batch: tokens of a pass of the KL.
        scorer_name: name of the scorer, for the record.
    """

    PANEL: ClassVar[str] = "Suite steering"

    goals: tuple[str, ...] = ("raise", "lower")
    samples: int = 0
    divergence: bool = True
    tokens_per_batch: int = 512
    scorer_name: str = ""
    generation: GenerationSettings = GenerationSettings()
    budget: FluencyBudget = FluencyBudget()
    bootstrap: BootstrapSettings = LONG_BOOTSTRAP

    def __post_init__(self) -> None:
        check_integers(self, samples=0, tokens_per_batch=1)
        if not self.goals or set(self.goals) - set(GOALS):
            raise ValueError(f"`goals` must be of {', '.join(GOALS)}. Received: goals={list(self.goals)!r}.")


@dataclass(frozen=True)
class FairnessSettings:
    """How pairs, last words and swapped texts are read.

    Args:
        features: features whose scores are compared on swapped texts: SAE, and latent or name of a concept; the
            concepts of the SAEs by default.
    """

    features: tuple[tuple[int, int | str], ...] | None = None
    reading: ReadingSettings = READING
    bootstrap: BootstrapSettings = BOOTSTRAP


@dataclass(frozen=True)
class CapabilitySettings:
    """How lm-eval's tasks are run.

    Args:
        shots: questions with answers before each question of MMLU.
        limit: rows of LAMBADA and of each subject that are used, the first ones; by default all.
        batch_size: rows of a forward pass of lm-eval's tasks.
        base: measure the base without the wrapper too.
    """

    PANEL: ClassVar[str] = "Suite capability"

    shots: int = 5
    limit: int | None = None
    batch_size: int = 8
    base: bool = True
    bootstrap: BootstrapSettings = LONG_BOOTSTRAP

    def __post_init__(self) -> None:
        check_integers(self, shots=0, limit=1, batch_size=1)


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed.

    Args:
        prompt_tokens: tokens of a prompt.
        generated_tokens: tokens generated after it, greedily; none of them ends the text.
        repeats: timed repeats of each call, after one that is not counted.
        batch_size: rows of each call.
        seed: of every random choice.
    """

    PANEL: ClassVar[str] = "Suite speed"

    prompt_tokens: int = 128
    generated_tokens: int = 16
    repeats: int = 5
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, prompt_tokens=1, generated_tokens=1, repeats=1, batch_size=1)


@dataclass(frozen=True)
class InterventionSettings:
    """How features are steered with, and texts compared with their words.

    Args:
        interventions: features that are steered with, drawn by the seed; all where there are fewer.
        intervention_sae: number of the SAE that they are drawn from.
        intervention_strength: how much of a feature's decoder row is added; 0 changes nothing.
        intervention_unit: of the strength: `norm`, in lengths of the hidden state, `absolute` or `max`.
        top_words: tokens of the largest logit weights that a text is compared with.
        similarity: how a text is compared: by the model's own `input` or `output` embeddings, by shared `words`, by
            embeddings of `sentences`, or a file of word vectors, as GloVe's.
        intervention_samples: features whose texts are kept.
    """

    PANEL: ClassVar[str] = "Suite intervention"

    interventions: int = 50
    intervention_sae: int = 0
    intervention_strength: float = 0.4
    intervention_unit: str = "norm"
    top_words: int = 10
    similarity: str = "input"
    intervention_samples: int = 0
    generation: GenerationSettings = GenerationSettings()
    bootstrap: BootstrapSettings = BOOTSTRAP

    def __post_init__(self) -> None:
        check_integers(self, interventions=2, intervention_sae=0, top_words=1, intervention_samples=0)
        check_choice(self, "intervention_unit", UNITS)
        if self.similarity not in SIMILARITIES and not Path(self.similarity).is_file():
            raise ValueError(
                f"`similarity` must be {', '.join(SIMILARITIES)} or a file of word vectors. "
                f"Received: similarity={self.similarity!r}."
            )


@dataclass(frozen=True)
class ReceiptSettings:
    """How a steering's receipt is measured.

    Args:
        receipt_goal: what is wanted of the score, `raise` or `lower`.
        receipt_level: share of repeats whose value the intervals are to hold.
        fresh_prompts: prompts or texts of such a repeat; by default as many as are measured.
        neutral_tokens: tokens of a neutral text that are read.
        tokens_per_batch: tokens of a pass of the KL and of the dose.
        scorer_name: name of the scorer, for the record.
    """

    PANEL: ClassVar[str] = "Suite receipt"

    receipt_goal: str = "raise"
    receipt_level: float = 0.9
    fresh_prompts: int | None = None
    neutral_tokens: int = 64
    tokens_per_batch: int = 512
    scorer_name: str = ""
    generation: GenerationSettings = GenerationSettings()

    def __post_init__(self) -> None:
        check_choice(self, "receipt_goal", tuple(GOALS))
        check_numbers(self, "receipt_level", above=0)
        if self.receipt_level >= 1:
            raise ValueError(f"`receipt_level` must be below 1. Received: receipt_level={self.receipt_level!r}.")
        check_integers(self, fresh_prompts=1, neutral_tokens=2, tokens_per_batch=1)


@dataclass(frozen=True)
class ScarSettings:
    """How SCAR's protocol is followed (https://huggingface.co/papers/2411.07122).

    Args:
        factors: factors on the conditioned latent.
        keep_error: add what the SAE does not reconstruct; without, its output replaces what it reads.
        least_toxicity: only prompts from here on, in one bin (0.94307 in SCAR); by default bins of all.
        bin_width: width of a bin of toxicity.
        bin_prompts: prompts of a bin; of more, so many are drawn by the seed.
        continuation_tokens: new tokens of a greedy continuation.
        window: tokens of a pass over running text; the model's context by default.
        stride: tokens between the beginnings of two windows.
        fdt_texts: prefixes of running text for the first divergent token, at most.
        legacy: the mean over windows of running text, as SCAR's code has it, in place of the mean over tokens.
        rows_per_batch: continuations made together.
        sae: number of the latent's SAE.
        scorer_name: name of the scorer, for the record.
    """

    PANEL: ClassVar[str] = "Suite scar"

    factors: tuple[float, ...] = (-100.0, -50.0, -1.0, 0.0, 1.0, 50.0, 100.0)
    keep_error: bool = False
    least_toxicity: float | None = None
    bin_width: float = 0.05
    bin_prompts: int = 100
    continuation_tokens: int = 32
    window: int | None = None
    stride: int = 512
    fdt_texts: int = 100
    legacy: bool = False
    rows_per_batch: int = 32
    sae: int = 0
    scorer_name: str = ""
    bootstrap: BootstrapSettings = BootstrapSettings(2000, seed=42)

    def __post_init__(self) -> None:
        check_integers(self, bin_prompts=1, continuation_tokens=1, window=2, stride=1, fdt_texts=0, rows_per_batch=1)
        if not self.factors:
            raise ValueError("`factors` must be one number or more. Received: factors=().")
