"""Hidden states on disk and the order in which they are read, against stores written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save, save_file
from torch.utils.data import DataLoader

from sae_transformers.training.sae.dataset import HiddenStateShards, TensorTokens, TokenBatches

PLACES = {"layers.0.resid_post": 6, "layers.1.mlp_out": 4}
SIZES = [5, 0, 3, 0, 9, 1]


def shard_tensors(number: int, n: int, labels: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tensors = {place: torch.randn(n, width, generator=generator).bfloat16() for place, width in PLACES.items()}
    tensors["token"] = torch.arange(n, dtype=torch.int32)
    tensors["position"] = torch.arange(n, dtype=torch.int32)
    tensors["row"] = torch.arange(n, dtype=torch.int64)
    if labels:
        values = torch.tensor([0.0, 1.0, -100.0])
        tensors["labels"] = values[torch.randint(0, 3, (n, labels), generator=generator)]
    return tensors


def write_store(
    url: str, sizes: list[int] | None = None, labels: tuple[str, ...] = ("anger", "joy")
) -> dict[str, Any]:
    """A finished harvest as the format says; returns all rows of each tensor."""
    sizes = SIZES if sizes is None else sizes
    index = {
        "format": "sae_transformers hidden states", "version": 1, "model": "tiny", "revision": None, "places": PLACES,
        "dtype": "bfloat16", "labels": list(labels), "settings": {"rows_per_shard": 2},
    }  # fmt: skip
    shards = [shard_tensors(number, n, len(labels)) for number, n in enumerate(sizes)]
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(path, exist_ok=True)
    fs.pipe_file(f"{path}/index.json", json.dumps(index).encode())
    for number, tensors in enumerate(shards):
        fs.pipe_file(f"{path}/shard-{number:06d}.safetensors", save(tensors, {"block": str(number)}))
    fs.pipe_file(f"{path}/complete.json", json.dumps({"n_tokens": sum(sizes), "shards": sizes}).encode())
    return {name: torch.cat([s[name] for s in shards]) for name in (*PLACES, *(["labels"] if labels else []))}


@pytest.fixture(params=["local", "file", "memory"])
def store(request, tmp_path) -> Any:
    """(url, rows)."""
    url = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[request.param]
    return url, write_store(url)


def test_rows_are_those_written(store):
    url, rows = store
    data = HiddenStateShards(url)
    assert len(data) == 18 and data.sizes == SIZES and data.widths == PLACES and data.label_names == ["anger", "joy"]
    generator = torch.Generator().manual_seed(0)
    for indices in (torch.arange(18), torch.randperm(18, generator=generator), torch.tensor([17, 5, 5, 4, 0])):
        found = data.__getitems__(indices)
        assert found.keys() == rows.keys()
        for name, tensor in found.items():
            assert tensor.dtype == rows[name].dtype and torch.equal(tensor, rows[name][indices]), name
    assert torch.equal(data[7]["layers.0.resid_post"], rows["layers.0.resid_post"][7])


def test_some_places_and_no_labels(tmp_path):
    rows = write_store(str(tmp_path), labels=())
    data = HiddenStateShards(tmp_path, places=["layers.1.mlp_out"])
    found = data.__getitems__(torch.tensor([3, 12]))
    assert list(found) == ["layers.1.mlp_out"] and data.label_names == []
    assert torch.equal(found["layers.1.mlp_out"], rows["layers.1.mlp_out"][[3, 12]])


@pytest.mark.parametrize("kept", [1, 2, 64])
def test_few_shards_kept_at_a_time_change_nothing(store, kept):
    url, rows = store
    data = HiddenStateShards(url)
    data.shards_kept = kept
    for seed in range(5):
        indices = torch.randperm(18, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(data.__getitems__(indices)["labels"], rows["labels"][indices])
        assert len(data._kept) <= kept


def test_a_data_loader_reads_whole_batches_in_other_processes(tmp_path):
    rows = write_store(str(tmp_path))
    data = HiddenStateShards(tmp_path)
    batches = TokenBatches(data.sizes, 4, window_tokens=8)
    for workers in (0, 2):
        loader = DataLoader(data, batch_sampler=batches, collate_fn=lambda batch: batch, num_workers=workers)
        for batch, indices in zip(loader, batches, strict=True):
            assert torch.equal(batch["labels"], rows["labels"][indices])


def change_json(folder: Path, name: str, **changes: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("spoil", "received"),
    [
        (lambda f: (f / "index.json").unlink(), r"has no index\.json.*[Hh]arvest"),
        (lambda f: (f / "complete.json").unlink(), r"has no complete\.json.*not finished"),
        (lambda f: (f / "index.json").write_text('{"format'), r"index\.json is damaged"),
        (lambda f: (f / "complete.json").write_text(""), r"complete\.json is damaged"),
        (lambda f: (f / "complete.json").write_text("{}"), r"complete\.json is damaged"),
        (lambda f: (f / "index.json").write_text("[1]"), r"Received: \[1\]"),
        (lambda f: change_json(f, "index.json", version=2), "'version': 2"),
        (lambda f: change_json(f, "index.json", format="other"), "'format': 'other'"),
        (lambda f: change_json(f, "complete.json", shards=[0, 0]), "no tokens"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_store_that_cannot_be_read_is_refused(tmp_path, spoil, received):
    write_store(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=received):
        HiddenStateShards(tmp_path)


def test_a_place_that_was_not_harvested_is_refused(store):
    with pytest.raises(
        ValueError, match=r"layers\.0\.resid_post, layers\.1\.mlp_out.*places=\['layers\.9\.mlp_out'\]"
    ):
        HiddenStateShards(store[0], places=["layers.9.mlp_out", "layers.1.mlp_out"])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def without_a_place(file: Path) -> None:
    tensors = shard_tensors(4, 9, 2)
    del tensors["layers.1.mlp_out"]
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("spoil", "received"),
    [
        (truncate, r"shard-000004\.safetensors is damaged"),
        (lambda f: f.write_bytes(b""), r"shard-000004\.safetensors is damaged"),
        (lambda f: f.write_bytes(b"no shard at all, but a text of some length"), "is damaged"),
        (without_a_place, r"layers\.1\.mlp_out"),
        (lambda f: save_file(shard_tensors(4, 8, 2), f), r"\(9, 6\).*Received: \(8, 6\)"),
        (lambda f: save_file(shard_tensors(4, 9, 1), f), r"\(9, 2\).*Received: \(9, 1\)"),
        (lambda f: f.unlink(), r"shard-000004\.safetensors is missing"),
    ],
    ids=["truncated", "empty", "text", "place", "rows", "labels", "missing"],
)
@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_shard_is_named(tmp_path, spoil, received, remote):
    write_store(str(tmp_path))
    spoil(tmp_path / "shard-000004.safetensors")
    url = str(tmp_path)
    if remote:
        url = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(str(tmp_path), tmp_path.name, recursive=True)
    data = HiddenStateShards(url)
    assert len(data.__getitems__(torch.arange(8))["labels"]) == 8  # the others can be read
    with pytest.raises(ValueError, match=received):
        data.__getitems__(torch.tensor([2, 10]))


def test_tensors_in_memory():
    tensors = {"layers.0.resid_post": torch.randn(6, 3), "labels": torch.zeros(6, 1)}
    data = TensorTokens(tensors, ["anger"])
    assert len(data) == 6 and data.widths == {"layers.0.resid_post": 3} and data.sizes == [6]
    found = data.__getitems__(torch.tensor([4, 1]))
    assert torch.equal(found["layers.0.resid_post"], tensors["layers.0.resid_post"][[4, 1]])
    for bad in ({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)}, {"a": torch.zeros(0, 2)}):
        with pytest.raises(ValueError, match="Received: {'a': "):
            TensorTokens(bad)
    with pytest.raises(ValueError, match=r"\['anger', 'joy'\].*\(6, 1\)"):
        TensorTokens(tensors, ["anger", "joy"])


@pytest.mark.parametrize("value", [2.0, -1.0, float("nan")])
def test_labels_that_are_not_0_to_1_are_refused(tmp_path, value):
    labels = torch.tensor([[0.0], [1.0], [0.5], [-100.0], [value]])
    with pytest.raises(ValueError, match=f"{value}"):
        TensorTokens({"a": torch.zeros(5, 2), "labels": labels}, ["anger"])
    write_store(str(tmp_path), [5], labels=("anger",))
    save_file({**shard_tensors(0, 5, 1), "labels": labels}, tmp_path / "shard-000000.safetensors")
    with pytest.raises(ValueError, match=rf"{value}"):
        HiddenStateShards(tmp_path).__getitems__(torch.tensor([0]))


# -- order -----------------------------------------------------------------------------------------------------------

CORPORA = [[5, 0, 3, 0, 9, 1], [100], [1], [7] * 30, [0, 1], list(range(1, 40))]


@pytest.mark.parametrize("sizes", CORPORA, ids=lambda s: f"{len(s)}-{sum(s)}")
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("window", [1, 10, 10**9])
def test_every_token_comes_exactly_once_in_an_epoch(sizes, batch_size, window):
    batches = TokenBatches(sizes, batch_size, window_tokens=window, drop_last=False)
    found = list(batches)
    assert torch.cat(found).sort().values.tolist() == list(range(sum(sizes)))
    assert len(found) == len(batches)
    assert all(len(b) == min(batch_size, sum(sizes)) for b in found[:-1]) and 0 < len(found[-1]) <= batch_size
    dropped = TokenBatches(sizes, batch_size, window_tokens=window)
    whole = list(dropped)
    assert len(whole) == len(dropped) and len(whole) >= 1  # where there is less than a batch, one smaller batch
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=False))
    assert sum(sizes) - sum(map(len, whole)) < min(batch_size, sum(sizes))


def order(**settings: Any) -> list[int]:
    epoch = settings.pop("epoch", 0)
    batches = TokenBatches([10] * 20, 10, **{"window_tokens": 50, **settings})
    batches.set_epoch(epoch)
    return torch.cat(list(batches)).tolist()


def test_order_is_a_function_of_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = order()
    torch.manual_seed(2)
    assert order() == first
    different = [order(seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(o) for o in different}) == 16
    batches = TokenBatches([10] * 20, 10, window_tokens=50)
    for epoch in (3, 0, 3):  # whatever was read before
        batches.set_epoch(epoch)
        assert torch.cat(list(batches)).tolist() == order(epoch=epoch)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_batches_of_one_process(world_size):
    sizes: list[int] = [7] * 30
    settings: dict[str, Any] = {"window_tokens": 30, "seed": 5}
    alone = list(TokenBatches(sizes, 4, **settings))
    ranks = [TokenBatches(sizes, 4, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    found = [list(batches) for batches in ranks]
    steps = len(alone) // world_size
    assert {len(batches) for batches in found} == {steps} == {len(batches) for batches in ranks}
    for step, rank in ((s, r) for s in range(steps) for r in range(world_size)):
        assert torch.equal(found[rank][step], alone[step * world_size + rank])


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("total", [7, 8, 29, 30, 31])
def test_ranks_together_read_every_token_where_none_is_dropped(world_size, total):
    ranks = [
        TokenBatches([total], 4, window_tokens=9, rank=rank, world_size=world_size, drop_last=False)
        for rank in range(world_size)
    ]
    found = [list(batches) for batches in ranks]
    assert [len(batches) for batches in found] == [len(batches) for batches in ranks] and all(found)
    assert torch.cat([b for batches in found for b in batches]).sort().values.tolist() == list(range(total))


def test_ranks_share_a_corpus_of_less_than_a_batch_each():
    found = [list(TokenBatches([5], 4, window_tokens=9, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batches) for batches in found] == [1, 1]
    assert [len(batches[0]) for batches in found] == [2, 2]
    assert len(set(torch.cat([batches[0] for batches in found]).tolist())) == 4


def test_a_corpus_with_fewer_tokens_than_processes_is_refused():
    with pytest.raises(ValueError, match=r"3 tokens.*4"):
        TokenBatches([3], 4, window_tokens=9, rank=0, world_size=4)


def test_windows_hold_whole_shards_and_mix_their_tokens():
    sizes, window = [10] * 20, 40
    batches = TokenBatches(sizes, 10, window_tokens=window)
    windows = batches.windows()
    assert sorted(shard for shards in windows for shard in shards) == list(range(20))
    assert {len(shards) for shards in windows} == {4}
    found = torch.cat(list(batches)).view(5, 40)
    for tokens, shards in zip(found, windows, strict=True):
        assert set((tokens // 10).tolist()) == set(shards)
        assert all(len(set((batch // 10).tolist())) > 1 for batch in tokens.view(4, 10))
    batches.set_epoch(1)
    assert batches.windows() != windows


def test_tokens_are_shuffled_evenly():
    """In 300 epochs each of 10 tokens comes first about as often as any other."""
    batches, first = TokenBatches([4, 6], 10, window_tokens=10), []
    for epoch in range(300):
        batches.set_epoch(epoch)
        first.append(int(next(iter(batches))[0]))
    counts = torch.bincount(torch.tensor(first), minlength=10)
    assert counts.min() > 10 and counts.max() < 55
