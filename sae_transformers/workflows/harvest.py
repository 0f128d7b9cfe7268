"""Hidden states of texts on disk: what SAEs and classifiers are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_utils import PreTrainedModel

from ..create_training_data.blocks import HarvestSettings, KeepTokens
from ..create_training_data.shards import Harvested, harvest_to_store
from ..latents.text_input import text_source


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
    show_progress: bool = False,
) -> Harvested:
    """Write a base's hidden states on texts to shards; the same call goes on where an earlier one was stopped.

    Args:
        model: the base, on its device.
        tokenizer: of the base; its processor where the texts come with images.
        texts: a list, a `Dataset`, a DataFrame, a `Path`, or what `open_text` gives: see `text_input.TEXTS`.
        out: a folder or any fsspec URL.
        settings: places, lengths and precision.
        text_column: of the text, where rows have columns.
        labels: columns of 0 and 1, carried to the tokens.
        keep: a further choice of tokens, see `Harvester`.
        max_tokens: use the first rows that give so many tokens, up to a whole shard.
        show_progress: a bar on a terminal.

    Raises:
        ValueError: the store has other settings, or no token is to be kept.
        TypeError: `texts` holds no texts.
    """
    source = text_source(texts, text_column=text_column, labels=labels)
    return harvest_to_store(
        model, tokenizer, source, settings, out, keep=keep, max_tokens=max_tokens, progress=show_progress
    )
