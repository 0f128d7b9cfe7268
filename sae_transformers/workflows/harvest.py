"""Hidden states of texts on disk: what SAEs and classifiers are trained on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_utils import PreTrainedModel

from ..create_training_data.harvest.blocks import HarvestSettings, KeepTokens
from ..create_training_data.harvest.store import harvest_to_store, rank_and_world
from ..latents.output_files import shared_folder
from ..latents.text_input import text_source
from .results import Progress, Result


@dataclass(frozen=True)
class HarvestResult(Result):
    """What is in a store of hidden states.

    Args:
        out: the folder or URL.
        n_tokens, n_shards: in the store. n_bytes: of the shards.
        complete: whether all shards are there: False where other processes are still at work.
        new_tokens: harvested by this call, in `seconds`.
    """

    out: str
    n_tokens: int
    n_shards: int
    n_bytes: int
    complete: bool
    new_tokens: int
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """One: tokens, shards, bytes, new tokens, tokens/s."""
        counts = {"tokens": self.n_tokens, "shards": self.n_shards, "bytes": self.n_bytes}
        return [{**counts, "new tokens": self.new_tokens, "tokens/s": self.speed}]

    @property
    def speed(self) -> int | None:
        """Tokens a second; None where none was new."""
        return round(self.new_tokens / self.seconds) if self.new_tokens else None

    def summary(self) -> list[str]:
        """What was harvested, in a line."""
        speed = "-" if self.speed is None else f"{self.speed:,}"
        rank, world = rank_and_world()
        if not self.complete and world > 1:
            return [f"process {rank}: {self.new_tokens:,} tokens ({speed}/s); others are still at work"]
        return [f"{self.n_tokens:,} tokens in {self.n_shards:,} shards, {self.new_tokens:,} of them new ({speed}/s)"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def harvest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    texts: Any,
    out: str | Path,
    settings: HarvestSettings,
    *,
    text_column: str = "text",
    labels: Sequence[str] = (),
    keep: KeepTokens | None = None,
    max_tokens: int | None = None,
    model_name: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> HarvestResult:
    """Write a base's hidden states on texts to shards; the same call goes on where an earlier one was stopped.

    Args:
        model: the base, on its device.
        tokenizer: of the base; its processor where the texts come with images.
        texts: a list, a `Dataset`, a DataFrame, a `Path`, or what `open_text` gives: see `text_input.TEXTS`.
        out: a folder or any fsspec URL.
        settings: hook points, lengths and precision.
        text_column: of the text, where rows have columns.
        labels: columns of 0 and 1, carried to the tokens.
        keep: a further choice of tokens, see `Harvester`.
        max_tokens: use the first rows that give so many tokens, up to a whole shard.
        model_name, revision: of the base, for the index; by default what it was loaded from.
        progress: called with (rows done, rows) after each shard; 0 where their number is not known.

    Raises:
        ValueError: the store has other settings, or no token is to be kept.
        TypeError: `texts` holds no texts.
        BlockingIOError: another process of the same rank writes to `out`.
    """
    source = text_source(texts, text_column=text_column, labels=labels)
    start = time.perf_counter()
    with shared_folder(out, *rank_and_world()):
        found = harvest_to_store(
            model, tokenizer, source, settings, out, keep=keep, max_tokens=max_tokens, model_name=model_name,
            revision=revision, progress=progress,
        )  # fmt: skip
    return HarvestResult(str(out), *found, seconds=time.perf_counter() - start)
