import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from sae_transformers.create_training_data.harvest.blocks import Harvester, HarvestSettings
from sae_transformers.create_training_data.harvest.stream import HiddenStateStream
from sae_transformers.latents.texts import TextSource, rows_of_list
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import WIDTH, tiny_base

PLACE = "layers.1.resid_post"
SETTINGS = HarvestSettings(hook_points=(PLACE,), max_length=16, rows_per_shard=4, dtype="float32")


def labelled(count: int = 40) -> TextSource:
    return rows_of_list(word_texts(count), {"a": [i % 2 for i in range(count)]})


def stream(source: TextSource | None = None, **options: Any) -> HiddenStateStream:
    return HiddenStateStream(
        tiny_base(),
        word_tokenizer(),
        source or labelled(),
        SETTINGS,
        **{"batch_tokens": 16, "window_blocks": 2, **options},
    )


def tokens_by_block(source: TextSource) -> list[torch.Tensor]:
    harvester = Harvester(tiny_base(), word_tokenizer(), source, SETTINGS)
    blocks = source.blocks(4, itertools.count())
    return [harvester.hidden(harvester.tokens(*block))[PLACE] for block in blocks]


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True)
    )


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """Rows sorted by their first value, so that two orders of the same rows compare equal."""
    return rows[rows[:, 0].argsort()]


def test_an_epoch_has_every_token_of_full_batches_once() -> None:
    blocks = tokens_by_block(labelled())
    batches = list(stream())
    start = 0
    for window in range(5):
        expected = torch.cat(blocks[window * 2 : window * 2 + 2])
        count = len(expected) // 16
        found = torch.cat([b[PLACE] for b in batches[start : start + count]])
        assert found.shape == (count * 16, WIDTH)
        distance = (found[:, None] - expected).abs().amax(-1)
        nearest = distance.argmin(1)
        assert nearest.unique().numel() == len(found) and distance.amin(1).max() == 0
        assert not torch.equal(nearest, nearest.sort().values)  # shuffled
        start += count
    assert start == len(batches) and batches[0]["labels"].shape == (16, 1)


def test_labels_stay_with_their_tokens() -> None:
    source = rows_of_list(["w1 w2 w3", "w4 w5 w6"] * 8, {"a": [0, 1] * 8})
    batches = list(stream(source, batch_tokens=8))
    hidden, labels = (torch.cat([b[k] for b in batches]) for k in (PLACE, "labels"))
    tokens = tokens_by_block(source)[0][:4]  # two kept tokens of each of the two texts
    nearest = (hidden[:, None] - tokens).abs().amax(-1).argmin(-1)
    assert torch.equal((nearest >= 2).float(), labels[:, 0])


def test_order_follows_from_seed_epoch_and_window() -> None:
    one, other = stream(), stream()
    first, second = list(one), list(one)
    assert same(first, list(other)) and same(second, list(other))
    assert not torch.equal(first[0][PLACE], second[0][PLACE])
    assert not torch.equal(first[0][PLACE], next(iter(stream(seed=1)))[PLACE])
    late = stream()
    late.set_epoch(1)
    assert same(second, list(late))


@pytest.mark.parametrize("stop", [0, 1, 3, 7, 11])
def test_a_resumed_stream_gives_the_batches_that_were_left(stop: int) -> None:
    whole = stream()
    expected = [batch for _ in range(2) for batch in whole]
    before = stream()
    given = list(itertools.islice(before, stop))
    state = before.state_dict()
    assert set(state) == {"epoch", "window", "offset"} and all(isinstance(v, int) for v in state.values())
    after = stream()
    after.load_state_dict(state)
    after.set_epoch(state["epoch"])  # as a Trainer does; it must not start the epoch again
    rest = [batch for _ in range(2) for batch in after]
    assert same(given + rest, expected)


def test_a_resumed_second_epoch() -> None:
    before = stream()
    list(before)
    iterator = iter(before)
    given = [next(iterator) for _ in range(5)]
    after = stream()
    after.load_state_dict(before.state_dict())
    whole = stream()
    list(whole)
    assert same([*given, *after], list(whole))


def test_processes_share_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = labelled()
    blocks = tokens_by_block(source)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        own = stream(batch_tokens=1, window_blocks=10)
        assert (own.rank, own.world) == (rank, 2)
        found = torch.cat([batch[PLACE] for batch in own])
        torch.testing.assert_close(in_order(found), in_order(torch.cat(blocks[rank::2])))


def test_a_source_smaller_than_a_batch_gives_one_smaller_batch() -> None:
    batches = list(stream(labelled(3), batch_tokens=1000))
    assert len(batches) == 1 and len(batches[0][PLACE]) == len(tokens_by_block(labelled(3))[0])


def test_windows_smaller_than_a_batch_are_refused_and_a_small_rest_is_dropped() -> None:
    with pytest.raises(ValueError, match=r"batch of 1000 tokens. Received: \d+ tokens in 2 block"):
        list(stream(batch_tokens=1000))
    sizes = [len(t) for t in tokens_by_block(labelled(9))]  # the last window is one row
    assert len(list(stream(labelled(9), batch_tokens=20))) == sum(sizes[:2]) // 20
    with pytest.raises(ValueError, match="Received: 0 tokens in 1 block"):
        list(stream(rows_of_list(["", ""])))
    with pytest.raises(ValueError, match="Received: none for rank 0"):
        list(stream(rows_of_list([])))


def test_it_goes_through_a_data_loader_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(list(DataLoader(stream(), batch_size=None)), list(stream()))
    monkeypatch.setattr("sae_transformers.create_training_data.harvest.stream.get_worker_info", object)
    with pytest.raises(ValueError, match="num_workers=0"):
        list(stream())


@pytest.mark.parametrize("options", [{"batch_tokens": 0}, {"window_blocks": -1}, {"batch_tokens": 2.0}])
def test_wrong_options_are_refused(options: dict) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"Received: {name}={value}"):
        stream(**options)
