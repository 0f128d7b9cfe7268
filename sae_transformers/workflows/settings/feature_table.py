"""Settings of `feature_table`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ...latents.settings import ReadingSettings, check_integers

EMBEDDINGS = ("input", "output", "none")


@dataclass(frozen=True)
class FeatureTableSettings:
    """What is said of each feature.

    Args:
        top_k: tokens at each end.
        fold_norm: count the gain of the final norm in the unembedding.
        centre: take the mean over the vocabulary out of the unembedding.
        match: regular expression: only tokens that match count, e.g. '^ ?[a-z]+$'.
        coherence: how alike the top tokens are: by the model's `input` or `output` embeddings, `none`, or a text file
            of word vectors.
        contexts: max-activating examples of each feature, from the spans.
        max_tokens: tokens of the text on which firing is counted.
        reading: how the text is read.
        journal: file that keeps the parts of a run that is stopped, so that the same call goes on from there.
    """

    top_k: int = 10
    fold_norm: bool = True
    centre: bool = True
    match: str | None = None
    coherence: str = "input"
    contexts: int = 5
    max_tokens: int = 100_000
    reading: ReadingSettings = field(default_factory=lambda: ReadingSettings(tokens_per_batch=4096))
    journal: Path | None = None

    def __post_init__(self) -> None:
        check_integers(self, top_k=1, contexts=0, max_tokens=1)
        if self.coherence not in EMBEDDINGS and not Path(self.coherence).is_file():
            raise ValueError(
                f"`coherence` must be input, output, none or a file. Received: coherence={self.coherence!r}."
            )
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise ValueError(f"`match` must be a regular expression. Received: {self.match!r} ({error}).") from error
