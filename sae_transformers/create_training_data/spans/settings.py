"""What is taken from a text as spans. No torch is imported here: the command line uses it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ...latents.settings import ReadingSettings, check_choice, check_integers
from ..template_texts import PLACEHOLDER, check_template

ACTIVATIONS = ("relu", "own")
MAX_LENGTH = 256  # tokens, where the settings do not say


@dataclass(frozen=True)
class SpanSettings(ReadingSettings):
    """How max-activating examples are found. The original implementation has `include_peak=False`, `skip_first=0` and
    `outlier_ratio=None`.

    Args:
        top_n: spans of each latent, each from another text.
        window: tokens of a span; fewer where the text begins.
        include_peak: the span ends with the token of the maximum; otherwise with the token before it, so that a
            maximum at the first token gives an empty span.
        activation: `relu` of the pre-activations, whatever the SAE's activation is, or the SAE's `own`.
        min_score: weaker maxima are left out.
        template: the text the model reads, with `{text}` where a row goes, or toxicity, helpfulness or disease for
            ours. Only the row's own tokens count.
        last_tokens: only so many tokens at the end of a text count; by default all. Spans may begin before them.
        skip_first: leading tokens that the model reads and that do not count: the first is an outlier in norm.
        outlier_ratio: tokens whose hidden state is so many times as long as the median of their block do not count: a
            few in ten thousand are a hundred times as long, and would be the best span of most latents. 0: all count.
        max_length: tokens, template included; longer texts are cut at the end. By default 256, or what the model
            reads if that is less.
        rows_per_block: rows of text whose hidden states are in memory; a process takes a block at a time.
        tokens_per_batch: tokens of a forward pass, padding counted. It changes results by rounding only.
        pre_acts_at_once: elements of a (tokens, d_sae) array in memory.
        blocks_per_save: so many blocks at most are done again when a process was killed.
    """

    PANEL: ClassVar[str] = "Spans"

    top_n: int = 10
    window: int = 10
    include_peak: bool = True
    activation: str = "relu"
    min_score: float = 0.0
    template: str = PLACEHOLDER
    last_tokens: int | None = None
    outlier_ratio: float | None = 10.0
    rows_per_block: int = 256
    tokens_per_batch: int = 4096
    pre_acts_at_once: int = 2**22
    blocks_per_save: int = 16

    def __post_init__(self) -> None:
        check_integers(
            self, top_n=1, window=1, rows_per_block=1, tokens_per_batch=1, pre_acts_at_once=1, blocks_per_save=1,
            max_length=2, last_tokens=1, skip_first=0,
        )  # fmt: skip
        check_choice(self, "activation", ACTIVATIONS)
        if not 0 <= self.min_score < float("inf"):
            raise ValueError(f"`min_score` must be 0 or more. Received: min_score={self.min_score!r}.")
        if self.outlier_ratio == 0:
            object.__setattr__(self, "outlier_ratio", None)
        if self.outlier_ratio is not None and not self.outlier_ratio >= 1:
            raise ValueError(
                f"`outlier_ratio` must be 1 or more, or 0. Received: outlier_ratio={self.outlier_ratio!r}."
            )
        check_template(self.template)

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON values; the other sizes change it by rounding only."""
        sizes = ("tokens_per_batch", "pre_acts_at_once", "blocks_per_save")
        values = {name: value for name, value in asdict(self).items() if name not in sizes}
        if self.skip_first < 2:  # as it is stored since the time when it was a switch
            values["skip_first"] = bool(self.skip_first)
        return values

    @classmethod
    def from_identity(cls, values: Mapping[str, Any]) -> SpanSettings:
        """The settings of what `identity` gave."""
        return cls(**{**values, "skip_first": int(values["skip_first"])})
