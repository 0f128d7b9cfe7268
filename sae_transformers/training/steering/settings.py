"""How features are searched for, which strengths are tried. No torch is imported here: the command line uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...latents.settings import check_choice, check_integers

STATISTICS = ("auroc", "mutual_information", "mean_difference")
SELECTIONS = ("input", "output", "combined")
NORMS = (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.6)  # of the hidden state
FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)
STRENGTHS: dict[str, tuple[float, ...]] = {"direction": NORMS, "set": NORMS, "at_least": NORMS, "scale": FACTORS}


@dataclass(frozen=True)
class SearchSettings:
    """Which features are tried.

    Args:
        statistic: how features are ranked by labelled texts: `auroc`, `mutual_information` or `mean_difference`.
        selection: ranking of the candidates: `input` (by the statistic), `output` (by what they do to the next
            token) or `combined`.
        pool: best features by the statistic whose output score is measured.
        top: features of each SAE that are tried by generating.
    """

    PANEL: ClassVar[str] = "Search"

    statistic: str = "auroc"
    selection: str = "combined"
    pool: int = 50
    top: int = 3

    def __post_init__(self) -> None:
        check_choice(self, "statistic", STATISTICS)
        check_choice(self, "selection", SELECTIONS)
        check_integers(self, pool=1, top=1)


@dataclass(frozen=True)
class OutputScoreSettings:
    """How a feature's effect on the next token is measured, as "SAEs are good for steering if you select the right
    features" (https://huggingface.co/papers/2505.20063) does.

    Args:
        prompt: neutral prompt, of the paper's code.
        amplification: times the largest activation of any latent at the prompt's last token.
        top_tokens: tokens that a decoder row points to.
        least: output score below which `combined` puts a feature last.
    """

    prompt: str = "From my experience,"
    amplification: float = 10.0
    top_tokens: int = 20
    least: float = 0.01


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
