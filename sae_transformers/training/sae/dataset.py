"""Hidden states on disk, as a dataset: an index and safetensors shards that a harvest wrote, on any fsspec URL."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset, Sampler

FORMAT = "sae_transformers hidden states"


class HiddenStateShards(Dataset):
    """Hidden states of a finished harvest, read a batch at a time; local shards are mapped, not loaded.

    An item of index tensor (n,) is a dict: (n, width) by the name of each place, and `labels` (n, n_labels) where the
    harvest carried some.

    Args:
        url: a folder or any fsspec URL.
        places: those wanted; all by default.

    Raises:
        ValueError: no harvest, an unfinished or a damaged one, or a place that it does not hold.
    """

    def __init__(self, url: str | os.PathLike, places: Sequence[str] | None = None) -> None:
        self.url = str(url)
        self._fs, self._path = url_to_fs(self.url)
        self.index = self._read_json("index.json", "format", "Harvest hidden states there first")
        if self.index.get("format") != FORMAT or self.index.get("version") != 1:
            raise ValueError(f"{self.url} holds no harvest that this release reads. Received: {self.index}.")
        unfinished = "The harvest is not finished; run it again to go on"
        sizes = self._read_json("complete.json", "shards", unfinished)["shards"]
        widths: dict[str, int] = self.index["places"]
        if unknown := sorted(set(places or ()) - set(widths)):
            raise ValueError(
                f"{self.url} holds hidden states of {', '.join(widths)}. Received: places={unknown!r}. "
                f"Harvest those, or place the SAE where there are some."
            )
        self.widths = {place: widths[place] for place in (places or widths)}
        self.label_names: list[str] = list(self.index["labels"])
        self.model: str | None = self.index.get("model")
        self.sizes: list[int] = [int(size) for size in sizes]
        self._starts = torch.tensor([0, *self.sizes]).cumsum(0)  # (n_shards + 1,)
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self.shards_kept = 64
        if not len(self):
            raise ValueError(f"The harvest in {self.url} holds no tokens. Harvest longer or more texts.")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__(torch.tensor([index])).items()}

    def __getitems__(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        indices = torch.as_tensor(indices)
        shard_of = torch.searchsorted(self._starts, indices, right=True) - 1
        order = shard_of.argsort(stable=True)
        parts: dict[str, list[Tensor]] = {}
        for shard, count in zip(*(t.tolist() for t in torch.unique(shard_of, return_counts=True)), strict=True):
            done = len(next(iter(parts.values()))) if parts else 0
            taken = sum(len(p) for p in next(iter(parts.values()))) if done else 0
            rows = indices[order[taken : taken + count]] - self._starts[shard]
            for name, tensor in self._shard(shard).items():
                parts.setdefault(name, []).append(tensor[rows])
        back = order.argsort()
        return {name: torch.cat(values)[back] for name, values in parts.items()}

    # -- files -------------------------------------------------------------------------------------------------------

    def _read_json(self, name: str, key: str, advice: str) -> dict[str, Any]:
        try:
            values = json.loads(self._fs.cat_file(f"{self._path}/{name}"))
        except FileNotFoundError as error:
            raise ValueError(f"{self.url} has no {name}. {advice}.") from error
        except ValueError as error:
            raise ValueError(f"{self.url}/{name} is damaged: {error}.") from error
        if not isinstance(values, dict) or key not in values:
            raise ValueError(f"{self.url}/{name} is damaged: it has no `{key}`. Received: {values}.")
        return values

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        name = f"{self._path}/shard-{number:06d}.safetensors"
        wanted = [*self.widths, *(["labels"] if self.label_names else [])]
        try:
            if isinstance(self._fs, LocalFileSystem):
                with safe_open(name, framework="pt") as file:
                    tensors = {key: file.get_tensor(key) for key in wanted}
            else:
                stored = load(self._fs.cat_file(name))
                tensors = {key: stored[key] for key in wanted}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{name} is damaged: {error}. Delete it and run the harvest again.") from error
        except FileNotFoundError as error:
            raise ValueError(f"{name} is missing. Run the harvest again.") from error
        for key, tensor in tensors.items():
            expected = (self.sizes[number], self.widths.get(key, len(self.label_names)))
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{key} in {name} should be {expected}. Received: {tuple(tensor.shape)}.")
        _check_labels(tensors)
        self._kept[number] = tensors
        while len(self._kept) > self.shards_kept:
            self._kept.popitem(last=False)
        return tensors


class TensorTokens(Dataset):
    """Hidden states in memory, with the interface of `HiddenStateShards`.

    Args:
        tensors: (n_tokens, width) by the name of each place, and perhaps `labels` (n_tokens, n_labels).
        label_names: of the columns of `labels`.
    """

    def __init__(self, tensors: dict[str, Tensor], label_names: Sequence[str] = ()) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise ValueError(f"All tensors must have the same number of rows, 1 or more. Received: {lengths}.")
        if "labels" in tensors and tensors["labels"].shape[1:] != (len(label_names),):
            raise ValueError(
                f"`labels` needs a column for each of label_names={list(label_names)!r}. "
                f"Received: {tuple(tensors['labels'].shape)}."
            )
        _check_labels(tensors)
        self.tensors, self.label_names = tensors, list(label_names)
        self.widths = {name: tensor.shape[1] for name, tensor in tensors.items() if name != "labels"}
        self.sizes = [next(iter(lengths.values()))]

    def __len__(self) -> int:
        return self.sizes[0]

    def __getitems__(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: tensor[indices] for name, tensor in self.tensors.items()}


def _check_labels(tensors: dict[str, Tensor]) -> None:
    if "labels" in tensors:
        labels = tensors["labels"]
        wrong = labels[~((labels >= 0) & (labels <= 1) | (labels == -100))]
        if len(wrong):
            raise ValueError(f"`labels` must be 0 to 1, or -100 for unknown. Received: {float(wrong[0])!r}.")


class TokenBatches(Sampler):
    """Batches of token numbers, shuffled, as a function of the seed and the epoch alone.

    Shards come in random order and make windows; the tokens of a window are shuffled. So a batch touches the shards of
    one window, or of two where it spans their border. Nothing but the epoch is needed to go on in the middle of it.

    Args:
        sizes: tokens of each shard.
        batch_size: tokens of a batch; where there are fewer in all, one batch of them.
        window_tokens: a window ends with the shard that fills it.
        rank, world_size: this process takes batch `rank` of every `world_size`.
        drop_last: all batches have the same size, and all processes as many; else every token comes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        *,
        window_tokens: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        total = sum(sizes)
        if total < world_size:
            raise ValueError(f"Each process needs a token. Received: {total} tokens for {world_size} processes.")
        self.sizes, self.batch_size = torch.tensor(sizes), max(1, min(batch_size, total // world_size))
        self.window_tokens, self.seed, self.epoch = window_tokens, seed, 0
        self.rank, self.world_size = rank, world_size
        self.drop_last = drop_last
        self._starts = self.sizes.cumsum(0) - self.sizes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        total = int(self.sizes.sum())
        if self.drop_last:
            return total // self.batch_size // self.world_size
        return -((self.rank - -(-total // self.batch_size)) // self.world_size)  # both rounded up

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self._batches()):
            if self.drop_last and number >= len(self) * self.world_size:
                return
            if number % self.world_size == self.rank:
                yield batch

    def windows(self) -> list[list[int]]:
        """The shards of each window of this epoch."""
        order = torch.randperm(len(self.sizes), generator=self._generator(0)).tolist()
        windows, filled = [], self.window_tokens
        for shard in order:
            if filled >= self.window_tokens:
                windows.append([])
                filled = 0
            windows[-1].append(shard)
            filled += int(self.sizes[shard])
        return windows

    def _generator(self, number: int) -> torch.Generator:
        # Mixed, so that neither neighbouring seeds nor epochs share a permutation.
        mixed = ((self.seed * 1_000_003 + self.epoch) * 1_000_003 + number) % 2**63
        return torch.Generator().manual_seed(mixed)

    def _batches(self) -> Iterator[Tensor]:
        rest = torch.empty(0, dtype=torch.long)
        for number, shards in enumerate(self.windows(), 1):
            tokens = torch.cat([self._starts[s] + torch.arange(int(self.sizes[s])) for s in shards])
            tokens = tokens[torch.randperm(len(tokens), generator=self._generator(number))]
            *whole, rest = torch.cat([rest, tokens]).split(self.batch_size)
            yield from whole
            if len(rest) == self.batch_size:
                yield rest
                rest = rest[:0]
        if len(rest) and not self.drop_last:
            yield rest
