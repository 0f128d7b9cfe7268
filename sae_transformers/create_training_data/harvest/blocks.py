"""What a harvest is, and its unit: a block of rows of text, whose hidden states depend on nothing outside it.

That is why a harvest can be spread over processes, stopped and resumed without a trace in its result.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.hidden_states import HiddenStateReader, kept_positions
from ...latents.image_texts import ImageTexts, image_choice, image_token_ids
from ...latents.texts import TextRows, TextSource
from ..packing import tokenize
from ..templates import templated_texts
from .settings import HarvestSettings as HarvestSettings

# (token ids, positions, source row numbers), (length,) each -> (length,) bool
KeepTokens = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(NamedTuple):
    """The tokens of a block of rows: what the model reads and what is kept of it.

    sequences: (length,) int64 each. keep: (n_kept,) int64 each.
    token, position: (n_tokens,) int32. row: (n_tokens,) int64. labels: (n_tokens, n_labels) float32.
    images: the rows, where they hold images.
    """

    sequences: list[Tensor]
    keep: list[Tensor]
    token: Tensor
    position: Tensor
    row: Tensor
    labels: Tensor
    images: ImageTexts | None = None


class Harvester:
    """From blocks of rows to hidden states.

    Args:
        model: a base model, on its device.
        tokenizer: of the base; its processor (`AutoProcessor`) where the source has images.
        source: rows of text, with or without images.
        settings: see `HarvestSettings`.
        keep: a further choice of tokens, `(token ids, positions, source rows) -> bool`, for one sequence at a time.
            A named function: the name stands for it in the index of a store.

    Raises:
        ValueError: a place is not in the model, `max_length` is more than the model can take, or there are images
            and no processor that reads them, or settings that do not go with images.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        source: TextSource,
        settings: HarvestSettings,
        *,
        keep: KeepTokens | None = None,
    ) -> None:
        if not settings.hook_points:
            raise ValueError("`hook_points` must name where hidden states are read. Received: hook_points=().")
        pack = settings.pack
        if pack is None:
            whole = settings.positions == "all" and not settings.templated
            pack = whole and not source.labels and source.images is None
        self.image_tokens = image_token_ids(model.config)
        self._check_images(tokenizer, source, replace(settings, pack=pack))
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and settings.max_length > limit:
            raise ValueError(
                f"`max_length` must be at most {limit} for this model. Received: max_length={settings.max_length!r}."
            )
        self.settings = replace(settings, pack=pack)
        self.reader = HiddenStateReader(model, settings.hook_points)
        self.tokenizer, self.source, self.keep = tokenizer, source, keep
        special = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        self.dropped_ids: Sequence[int] = special.all_special_ids if settings.drop_special_tokens else ()

    def _check_images(self, processor: Any, source: TextSource, settings: HarvestSettings) -> None:
        if source.images is None:
            if settings.image_tokens != "keep":
                raise ValueError(
                    f"`image_tokens` goes with a column of images. Received: "
                    f"image_tokens={settings.image_tokens!r}, images=None."
                )
            return
        if getattr(processor, "image_processor", None) is None or not self.image_tokens:
            raise ValueError(
                f"Images need a multimodal base and its processor (`AutoProcessor`). Received: "
                f"{type(processor).__name__} for the column {source.images!r}."
            )
        if settings.pack or settings.templated:
            raise ValueError(
                f"Rows with images are neither packed nor put into a template. Received: pack={settings.pack!r}, "
                f"template={settings.template!r}; leave it out."
            )

    def identity(self) -> dict[str, Any]:
        """All that decides the result but the places and the dtype, as JSON values."""
        settings = self.settings.identity()
        if self.source.images is None:
            del settings["image_tokens"]
        return {
            **settings,
            "keep": None if self.keep is None else f"{self.keep.__module__}.{self.keep.__qualname__}",
            "source": dict(self.source.facts),
            "compute_dtype": str(self.reader.model.dtype).removeprefix("torch."),
            "weights": weights_digest(self.reader.model),
        }

    def tokens(self, number: int, rows: TextRows) -> Block:
        """Tokens of block `number`; no model needed."""
        settings, first = self.settings, number * self.settings.rows_per_shard
        images, prefixes = None, None
        if settings.templated:
            ids, source, prefixes = self._in_template(rows, first)
        elif rows.images is None:
            ids, source = tokenize(
                self.tokenizer, rows.texts, first_row=first, max_length=settings.max_length, pack=bool(settings.pack)
            )
        else:
            images = ImageTexts(
                self.tokenizer, rows.texts, rows.images, first_row=first, max_length=settings.max_length
            )
            ids = images.ids
            source = [torch.full_like(sequence, row) for sequence, row in zip(ids, images.rows, strict=True)]
        keep = []
        for sequence, of, prefix in zip(ids, source, prefixes or [settings.prefix_tokens] * len(ids), strict=True):
            kept = kept_positions(
                sequence,
                positions=settings.positions,
                prefix_tokens=prefix,
                skip_first=settings.skip_first,
                dropped_ids=self.dropped_ids,
            )
            if images is not None:
                kept = kept[image_choice(sequence, self.image_tokens, settings.image_tokens)[kept]]
            if self.keep is not None:
                kept = kept[self.keep(sequence, torch.arange(len(sequence)), of).bool()[kept]]
            keep.append(kept)
        none = [torch.empty(0, dtype=torch.long)]
        row = torch.cat([of[kept] for of, kept in zip(source, keep, strict=True)] or none)
        return Block(
            ids,
            keep,
            token=torch.cat([s[kept] for s, kept in zip(ids, keep, strict=True)] or none).int(),
            position=torch.cat(keep or none).int(),
            row=row,
            labels=rows.labels[row - first],
            images=images,
        )

    def _in_template(self, rows: TextRows, first: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Of each text that is not empty its tokens in the template, their source row and the length of the prefix."""
        filled = [i for i, text in enumerate(rows.texts) if text.strip()]
        settings = self.settings
        found = templated_texts(
            self.tokenizer, [rows.texts[i] for i in filled], settings.template, settings.max_length
        )
        source = [torch.full_like(text.ids, first + i) for i, text in zip(filled, found, strict=True)]
        return [text.ids for text in found], source, [text.prefix for text in found]

    def hidden(self, block: Block, *, report: Callable[[int], object] | None = None) -> dict[str, Tensor]:
        """{place: (n_tokens, width)} in the stored dtype, on the model's device.

        Args:
            report: called with the number of kept tokens of each batch after it.
        """
        return self.reader.read(
            block.sequences,
            block.keep,
            dtype=getattr(torch, self.settings.dtype),
            tokens_at_once=self.settings.tokens_per_batch,
            report=report and (lambda members: report(sum(len(block.keep[i]) for i in members))),
            images=block.images,
        )

    def rows_for_tokens(self, max_tokens: int) -> int:
        """Rows of the fewest whole blocks with `max_tokens` kept tokens; only tokenizes.

        Raises:
            ValueError: `max_tokens` is not positive.
        """
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` must be 1 or more. Received: max_tokens={max_tokens!r}.")
        count, rows_read = 0, 0
        for number, rows in self.source.blocks(self.settings.rows_per_shard, itertools.count()):
            count += len(self.tokens(number, rows).row)
            rows_read += len(rows.texts)
            if count >= max_tokens:
                break
        return rows_read


def weights_digest(model: Any) -> str:
    """A short hash of the first values of every parameter: tells a fine-tuned model from its base."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            digest.update(name.encode())
            digest.update(parameter.detach().flatten()[:8].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
