"""Settings of `reduce_bias`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...evaluation.settings import BootstrapSettings
from ...latents.settings import ReadingSettings, check_choice, check_integers, check_numbers

FINDERS = ("swaps", "tokens", "contrast")


@dataclass(frozen=True)
class BiasSettings:
    """How features that go with gender are found and taken out, and what is measured.

    Args:
        find: `swaps`: features that change when gendered words are swapped; `tokens`: that tell gendered words from
            others; `contrast`: that tell female from male ones.
        words: gendered words, male:female, comma-separated; by default 26 pairs.
        counts: numbers of features that are taken out.
        op: `ablate`, or `clamp` to the mean activation on the texts.
        random_seeds: draws of as many random features, as a control.
        random_counts: numbers of these; by default those of `counts`.
        max_loss: what LAMBADA's log-perplexity may rise by, in nats, for a number to be chosen.
        max_texts: rows with gendered words that are used.
        max_pairs: pairs of each file or kind that are used, the first ones; by default all.
        max_choose: pairs of each file of WinoBias' development part; by default as `max_pairs`.
        max_lambada: texts of LAMBADA; one in four helps to choose, the others measure.
        reading: how these rows are read.
        bootstrap: of the intervals; its seed also draws the random features.
    """

    find: str = "swaps"
    words: str | None = None
    counts: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100)
    op: str = "ablate"
    random_seeds: int = 1
    random_counts: tuple[int, ...] | None = None
    max_loss: float = 0.05
    max_texts: int = 200
    max_pairs: int | None = None
    max_choose: int | None = None
    max_lambada: int = 400
    reading: ReadingSettings = field(default_factory=lambda: ReadingSettings(max_length=64, tokens_per_batch=1024))
    bootstrap: BootstrapSettings = field(default_factory=BootstrapSettings)

    def __post_init__(self) -> None:
        check_choice(self, "find", FINDERS)
        check_choice(self, "op", ("ablate", "clamp"))
        check_integers(self, random_seeds=0, max_texts=1, max_pairs=1, max_choose=1, max_lambada=1)
        check_numbers(self, "max_loss", least=float("-inf"))
        for name in ("counts", "random_counts"):
            numbers = getattr(self, name)
            if numbers is not None and (not numbers or min(numbers) < 0):
                raise ValueError(f"`{name}` must be numbers of features, 0 or more. Received: {name}={numbers!r}.")
