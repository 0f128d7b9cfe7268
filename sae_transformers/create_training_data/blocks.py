"""What a harvest is, and its unit: a block of rows of text, whose hidden states depend on nothing outside it.

That is why a harvest can be spread over processes, stopped and resumed without a trace in its result.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..latents.hidden_states import HiddenStateReader, kept_positions
from ..latents.image_texts import IMAGE_TOKENS, ImageTexts, image_choice, image_token_ids
from ..latents.texts import TextRows, TextSource
from .packing import tokenize

DTYPES = ("bfloat16", "float16", "float32")
POSITIONS = ("all", "last", "after_prefix")
# (token ids, positions, source row numbers), (length,) each -> (length,) bool
KeepTokens = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HarvestSettings:
    """What is harvested from a model and a text.

    Args:
        places: where hidden states are read, e.g. `layers.14.resid_post`, or module paths.
        max_length: tokens of a sequence.
        pack: join short texts to full sequences; None: where a text's own bounds do not matter, which is without
            labels and with `positions="all"`.
        positions: tokens that are kept: `all`, the `last` of each text, or those `after_prefix`.
        prefix_tokens: length of that prefix, beginning token included.
        skip_first: leave out position 0 of each sequence, an outlier in norm (see `kept_positions`).
        drop_special_tokens: leave out the tokenizer's special tokens.
        image_tokens: where rows hold images, `keep` the tokens that stand for their patches, `drop` them, or `only`
            those.
        dtype: stored as bfloat16, float16 or float32.
        rows_per_shard: rows of text in a block, which is a file of the store and what memory has to hold.
        tokens_at_once: of a forward pass, padding counted. As another value changes results by rounding only, a
            harvest may be resumed with it.
    """

    places: tuple[str, ...]
    max_length: int = 256
    pack: bool | None = None
    positions: str = "all"
    prefix_tokens: int = 0
    skip_first: bool = True
    drop_special_tokens: bool = False
    image_tokens: str = "keep"
    dtype: str = "bfloat16"
    rows_per_shard: int = 256
    tokens_at_once: int = 4096

    def __post_init__(self) -> None:
        if isinstance(self.places, str) or not self.places or not all(isinstance(p, str) and p for p in self.places):
            raise ValueError(
                f"`places` must be a list such as ['layers.14.resid_post']. Received: places={self.places!r}."
            )
        object.__setattr__(self, "places", tuple(self.places))
        for name, minimum in (("max_length", 2), ("rows_per_shard", 1), ("tokens_at_once", 1), ("prefix_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"`{name}` must be an integer of {minimum} or more. Received: {name}={value!r}.")
        for name, known in (("dtype", DTYPES), ("positions", POSITIONS), ("image_tokens", IMAGE_TOKENS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(known)}. Received: {name}={getattr(self, name)!r}."
                )
        if (self.positions == "after_prefix") != bool(self.prefix_tokens):
            raise ValueError(
                f"`prefix_tokens` goes with positions='after_prefix'. Received: positions={self.positions!r}, "
                f"prefix_tokens={self.prefix_tokens!r}."
            )
        if self.prefix_tokens >= self.max_length:
            raise ValueError(
                f"`prefix_tokens` must be less than `max_length`. Received: prefix_tokens={self.prefix_tokens!r}, "
                f"max_length={self.max_length!r}."
            )
        if self.pack and self.positions != "all":
            raise ValueError(f"Packed texts have no positions of their own. Received: positions={self.positions!r}.")


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
        pack = settings.pack
        if pack is None:
            pack = not source.labels and settings.positions == "all" and source.images is None
        self.image_tokens = image_token_ids(model.config)
        self._check_images(tokenizer, source, replace(settings, pack=pack))
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and settings.max_length > limit:
            raise ValueError(
                f"`max_length` must be at most {limit} for this model. Received: max_length={settings.max_length!r}."
            )
        self.settings = replace(settings, pack=pack)
        self.reader = HiddenStateReader(model, settings.places)
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
        if settings.pack:
            raise ValueError("Rows with images are not packed. Received: pack=True; leave it out.")

    def identity(self) -> dict[str, Any]:
        """All that decides the result but the places and the dtype, as JSON values."""
        skipped = ("places", "dtype", "tokens_at_once", *(("image_tokens",) if self.source.images is None else ()))
        settings = {k: v for k, v in asdict(self.settings).items() if k not in skipped}
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
        images = None
        if rows.images is None:
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
        for sequence, of in zip(ids, source, strict=True):
            kept = kept_positions(
                sequence,
                positions=settings.positions,
                prefix_tokens=settings.prefix_tokens,
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

    def hidden(self, block: Block, *, report: Callable[[int], object] | None = None) -> dict[str, Tensor]:
        """{place: (n_tokens, width)} in the stored dtype, on the model's device.

        Args:
            report: called with the number of kept tokens of each batch after it.
        """
        return self.reader.read(
            block.sequences,
            block.keep,
            dtype=getattr(torch, self.settings.dtype),
            tokens_at_once=self.settings.tokens_at_once,
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
