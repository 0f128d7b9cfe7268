"""How features are searched for, which strengths are tried. No torch is imported here: the command line uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...latents.settings import check_choice, check_integers, check_numbers

STATISTICS = ("auroc", "mutual_information", "mean_difference")
SELECTIONS = ("input", "output", "combined", "confidence", "correlation", "effect", "attribution")
NEXT_TOKEN = ("output", "combined", "confidence", "effect")  # selections that raise a latent and read the next token
OUTCOME = ("correlation", "effect")  # selections that need texts of the model's own, and a score of each
ATTRIBUTION = "attribution"  # the selection that needs a backward pass over the labelled texts
NORMS = (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.6)  # of the hidden state
FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)
STRENGTHS: dict[str, tuple[float, ...]] = {"direction": NORMS, "set": NORMS, "at_least": NORMS, "scale": FACTORS}


@dataclass(frozen=True)
class SearchSettings:
    """Which features are tried.

    Args:
        statistic: how features are ranked by labelled texts: `auroc`, `mutual_information` or `mean_difference`.
        selection: ranking of the candidates: `input` (by the statistic), `output` (by output score), `combined` (by
            both), `confidence` (by how much they change the next token's confidence), `correlation` (with the scores
            of texts that the model writes), `effect` (by the last two) or `attribution` (by how much more they raise
            the likelihood of texts with the concept than of texts without).
        pool: best features by the statistic, which the selection ranks.
        top: features of each SAE that are tried by generating.
        outcome_samples: continuations of each prompt that chooses, whose scores features are correlated with; one
            without a temperature.
    """

    PANEL: ClassVar[str] = "Search"

    statistic: str = "auroc"
    selection: str = "combined"
    pool: int = 50
    top: int = 3
    outcome_samples: int = 16

    def __post_init__(self) -> None:
        check_choice(self, "statistic", STATISTICS)
        check_choice(self, "selection", SELECTIONS)
        check_integers(self, pool=1, top=1, outcome_samples=1)


@dataclass(frozen=True)
class OutputScoreSettings:
    """How a feature's effect on the next token is measured, as "SAEs are good for steering if you select the right
    features" (https://huggingface.co/papers/2505.20063) does, and https://huggingface.co/papers/2510.03659 after it.

    Args:
        prompt: neutral prompt, of the paper's code.
        amplification: times the largest activation of any latent at the prompt's last token.
        top_tokens: tokens that a decoder row points to.
        confidence_tokens: most probable next tokens whose log-probabilities delta token confidence takes the mean of.
    """

    prompt: str = "From my experience,"
    amplification: float = 10.0
    top_tokens: int = 20
    confidence_tokens: int = 1

    def __post_init__(self) -> None:
        check_integers(self, top_tokens=1, confidence_tokens=1)


@dataclass(frozen=True)
class StrengthSettings:
    """What is done with a feature, and how strongly.

    Args:
        ops: operations that are tried: `direction`, `set`, `at_least`, `scale`, `ablate`, `erase`.
        strengths: strengths from weak to strong, for all operations; by default 0.03 to 0.6 lengths of the hidden
            state, and factors of 2 to 32 for `scale`.
        lower: less of the concept in place of more.
    """

    PANEL: ClassVar[str] = "Strength"

    ops: tuple[str, ...] = ("direction", "set")
    strengths: tuple[float, ...] | None = None
    lower: bool = False

    def __post_init__(self) -> None:
        known = (*STRENGTHS, "ablate", "erase")
        if not self.ops or (self.strengths is None and not set(self.ops) <= set(known)):
            raise ValueError(
                f"`ops` must be of {', '.join(known)}, or others with `strengths`. Received: ops={self.ops!r}."
            )
        if self.strengths is not None and not self.strengths:
            raise ValueError(f"`strengths` must be numbers. Received: strengths={self.strengths!r}.")

    def by_op(self) -> dict[str, tuple[float, ...]] | None:
        """Operation -> its strengths, where they are not the usual ones."""
        return None if self.strengths is None else dict.fromkeys(self.ops, self.strengths)


CODE_FORMS = ("direction", "code")
CODE_LOSSES = ("preference", "likelihood")
CODE_UNITS = ("norm", "absolute", "max")


@dataclass(frozen=True)
class LearnSteeringSettings:
    """How the values of a sparse code are learnt.

    Args:
        loss: `preference`: DPO's, with the unsteered model as the reference; `likelihood`: of the chosen answers.
        form: `direction`: v * W_dec is added, nothing is read; `code`: a latent z becomes max(z + v, 0).
        unit: of the values: `norm` (of the hidden state), `absolute` or `max` (typical maxima).
        beta: of the preference loss: the larger, the less it takes to satisfy a pair.
        both_ways: with preferences, less of the values has to prefer the rejected answer (BiPO's two directions).
        l1: weight of the sum of the lengths that the values write.
        keep: so many values that write most stay after training; by default all.
        epochs, learning_rate, batch_size: of `Trainer`; the rate is in `unit` for a step and falls as a cosine.
        max_length: tokens of a prompt with an answer; longer answers are cut. By default 256, or what the model reads.
        report_share: of the rows, drawn by the seed, that are not trained on but reported.
        save_steps: steps between log entries, and between checkpoints.
        seed: of the split and of the order of rows.
    """

    loss: str = "preference"
    form: str = "direction"
    unit: str = "norm"
    beta: float = 0.1
    both_ways: bool = False
    l1: float = 0.0
    keep: int | None = None
    epochs: float = 3.0
    learning_rate: float = 0.005
    batch_size: int = 8
    max_length: int | None = None
    report_share: float = 0.2
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "loss", CODE_LOSSES)
        check_choice(self, "form", CODE_FORMS)
        check_choice(self, "unit", CODE_UNITS)
        check_integers(self, keep=1, batch_size=1, max_length=2, save_steps=1, seed=0)
        check_numbers(self, "beta", "epochs", "learning_rate", above=0)
        check_numbers(self, "l1", "report_share", least=0)
        if self.report_share >= 1:
            raise ValueError(f"`report_share` must be below 1. Received: report_share={self.report_share!r}.")
        if self.both_ways and self.loss != "preference":
            raise ValueError(f"`both_ways` needs the loss 'preference'. Received: loss={self.loss!r}.")
