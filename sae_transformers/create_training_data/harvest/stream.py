"""Hidden states straight into training, without a store."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...latents.texts import TextSource
from .blocks import Block, Harvester, HarvestSettings, KeepTokens
from .store import rank_and_world


class HiddenStateStream(IterableDataset):
    """Whole batches of hidden states, harvested as they are needed and shuffled inside a window of blocks.

    One iteration is one epoch: the blocks of this process (rank r of w has r, r + w, ...) in windows of
    `window_blocks`. The order within a window follows from (seed, epoch, window). Tokens of a window that do not fill
    a batch are dropped. For a `DataLoader` with `batch_size=None` and `num_workers=0`.

    Batches are {place: (batch_tokens, width), "labels": (batch_tokens, n_labels)}, in the dtype and on the device that
    the harvest gives; labels only where the source has some. `widths`, `label_names` and `model` say what there is,
    as those of `HiddenStateShards` do, so a `SaeTrainer` takes either.

    Args:
        model: a base model, on its device.
        tokenizer: of the base.
        source: rows of text.
        settings: see `HarvestSettings`; a block is `rows_per_shard` rows.
        batch_tokens: tokens of a batch. A source with fewer gives one smaller batch.
        window_blocks: blocks that are in memory, and shuffled, together.
        seed: of the order.
        keep: see `Harvester`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        source: TextSource,
        settings: HarvestSettings,
        *,
        batch_tokens: int = 2048,
        window_blocks: int = 4,
        seed: int = 0,
        keep: KeepTokens | None = None,
    ) -> None:
        for name, value in (("batch_tokens", batch_tokens), ("window_blocks", window_blocks)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of 1 or more. Received: {name}={value!r}.")
        self.harvester = Harvester(model, tokenizer, source, settings, keep=keep)
        self.source = source
        self.widths = self.harvester.reader.widths()
        self.label_names = list(source.labels)
        self.model: str | None = model.config.name_or_path or None
        self.batch_tokens, self.window_blocks, self.seed = batch_tokens, window_blocks, seed
        self.rank, self.world = rank_and_world()
        self.epoch = self.window = self.offset = 0

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from: epoch, window of this process, batches of it already given out."""
        return {"epoch": self.epoch, "window": self.window, "offset": self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there; the window is harvested again."""
        self.epoch, self.window, self.offset = state["epoch"], state["window"], state["offset"]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; nothing happens where this one is under way (a `Trainer` calls this after a resume too)."""
        if epoch != self.epoch:
            self.epoch, self.window, self.offset = epoch, 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The rest of the epoch.

        Raises:
            ValueError: a window has fewer tokens than a batch, though the source has more.
        """
        if get_worker_info() is not None:
            raise ValueError("The stream runs the model: use a DataLoader with num_workers=0.")
        first = self.window * self.window_blocks
        numbers = (self.rank + i * self.world for i in itertools.count(first))
        blocks = self.source.blocks(self.harvester.settings.rows_per_shard, numbers)
        following = next(blocks, None)
        while following is not None:
            members = [following, *itertools.islice(blocks, self.window_blocks - 1)]
            following = next(blocks, None)
            yield from self._window([self.harvester.tokens(*member) for member in members], last=following is None)
            self.window, self.offset = self.window + 1, 0
        if self.window == 0:
            raise ValueError(f"A source needs a block of rows for each process. Received: none for rank {self.rank}.")
        self.epoch, self.window, self.offset = self.epoch + 1, 0, 0

    def _window(self, blocks: list[Block], *, last: bool) -> Iterator[dict[str, Tensor]]:
        n_tokens, size = sum(len(block.row) for block in blocks), self.batch_tokens
        if n_tokens < size:
            if last and self.window:
                return
            if not last or not n_tokens:
                raise ValueError(
                    f"A window must hold a batch of {size} tokens. Received: {n_tokens} tokens in {len(blocks)} "
                    f"block(s) of {self.harvester.settings.rows_per_shard} rows; raise `window_blocks` or "
                    f"`rows_per_shard`."
                )
            size = n_tokens
        if self.offset >= n_tokens // size:
            return
        tensors = self._harvest(blocks)
        shuffled = random.Random(f"{self.seed} {self.epoch} {self.window} {self.rank}").getrandbits(63)
        order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(shuffled))
        for batch in order[: n_tokens // size * size].split(size)[self.offset :]:
            self.offset += 1
            yield {name: tensor[batch.to(tensor.device)] for name, tensor in tensors.items()}

    def _harvest(self, blocks: list[Block]) -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        for block in blocks:
            labels = {"labels": block.labels} if self.source.labels else {}
            parts.append({**self.harvester.hidden(block), **labels})
        device = self.harvester.reader.device
        return {name: torch.cat([part[name].to(device) for part in parts]) for name in parts[0]}
