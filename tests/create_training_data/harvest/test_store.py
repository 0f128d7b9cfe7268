import json
import math
import os
import resource
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sae_transformers.create_training_data.harvest import store as shards
from sae_transformers.create_training_data.harvest.blocks import Harvester, HarvestSettings
from sae_transformers.create_training_data.harvest.store import Harvested, harvest_to_store
from sae_transformers.latents.texts import TextSource, rows_of_list
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import WIDTH, prompt, tiny_base

PLACES = ("layers.0.mlp_out", "layers.1.resid_post")
SCRIPT = Path(__file__).parents[2] / "scripts" / "harvest_words.py"


def settings(**changes: Any) -> HarvestSettings:
    return HarvestSettings(
        **{"hook_points": PLACES, "max_length": 16, "rows_per_shard": 4, "dtype": "float32", **changes}
    )


def words(count: int = 10) -> TextSource:
    return rows_of_list(word_texts(count))


def harvest_words(folder: Path | str, source: TextSource | None = None, **changes: Any) -> Harvested:
    """Three blocks of ten texts, unless told otherwise."""
    return harvest_to_store(tiny_base(), word_tokenizer(), source or words(), settings(**changes), folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_script(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )


# -- what is in a store ----------------------------------------------------------------------------------------------


def test_a_store_holds_what_the_model_gives(tmp_path: Path) -> None:
    base, tokenizer = tiny_base(), word_tokenizer()
    labels = {"a": [i % 2 for i in range(10)], "b": [None, 1] * 5}
    texts = word_texts(10)
    result = harvest_to_store(base, tokenizer, rows_of_list(texts, labels), settings(), tmp_path, model_name="tiny")
    assert sorted(contents(tmp_path)) == [
        "complete.json",
        "index.json",
        *(f"shard-00000{i}.safetensors" for i in range(3)),
    ]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["format"] == "sae_transformers hidden states" and index["version"] == 1
    assert index["places"] == dict.fromkeys(PLACES, WIDTH)
    assert (index["model"], index["revision"], index["dtype"], index["labels"]) == (
        "tiny",
        None,
        "float32",
        ["a", "b"],
    )
    assert index["settings"]["pack"] is False and index["settings"]["compute_dtype"] == "float32"
    counts = []
    for number in range(3):
        path = tmp_path / f"shard-00000{number}.safetensors"
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"block": str(number)}
        shard = load_file(path)
        assert {n: t.dtype for n, t in shard.items()} == {
            **dict.fromkeys(PLACES, torch.float32),
            "token": torch.int32,
            "position": torch.int32,
            "row": torch.int64,
            "labels": torch.float32,
        }
        assert shard["row"].unique().tolist() == list(range(10))[number * 4 : number * 4 + 4]
        for row in shard["row"].unique().tolist():
            here = shard["row"] == row
            ids = torch.tensor([tokenizer(texts[row])["input_ids"]])
            assert shard["token"][here].tolist() == ids[0, 1:].tolist()
            assert shard["position"][here].tolist() == list(range(1, ids.shape[1]))
            assert shard["labels"][here].unique(dim=0).tolist() == [[row % 2, 1.0 if row % 2 else -100.0]]
            with torch.no_grad():
                expected = base(ids, output_hidden_states=True).hidden_states[2][0, 1:]
            torch.testing.assert_close(shard[PLACES[1]][here], expected, atol=1e-5, rtol=1e-5)
        counts.append(len(shard["row"]))
    complete = json.loads((tmp_path / "complete.json").read_text())
    assert complete == {"n_tokens": sum(counts), "shards": counts}
    size = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    assert result == Harvested(sum(counts), 3, size, True, sum(counts))


def test_packed_tokens_keep_their_rows(tmp_path: Path) -> None:
    harvest_words(tmp_path, max_length=8)
    shard = load_file(tmp_path / "shard-000001.safetensors")
    assert set(shard["row"].tolist()) == {4, 5, 6, 7} and shard["row"].diff().ge(0).all()
    assert shard["position"].tolist()[:8] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        1,
    ]  # sequences of eight, their first tokens left out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_dtypes_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    harvest_words(tmp_path / "full")
    harvest_words(tmp_path / "half", dtype=dtype)
    for name in ("shard-000000.safetensors", "shard-000002.safetensors"):
        full, half = load_file(tmp_path / "full" / name), load_file(tmp_path / "half" / name)
        for place in PLACES:
            assert torch.equal(half[place], full[place].to(getattr(torch, dtype)))


def test_empty_rows_give_no_tokens_and_keep_their_numbers(tmp_path: Path) -> None:
    texts = ["w1 w2", "", " ", "w3 w4", *[""] * 4, "w5 w6"]
    result = harvest_words(tmp_path, rows_of_list(texts), pack=False)
    assert [load_file(path)["row"].tolist() for path in sorted(tmp_path.glob("shard-*"))] == [[0, 3], [], [8]]
    assert load_file(tmp_path / "shard-000001.safetensors")[PLACES[0]].shape == (0, WIDTH)
    assert result.complete and result.n_tokens == 3


@pytest.mark.parametrize("texts", [["", " "], ["w1", "w2"], []])
def test_a_source_without_tokens_is_refused(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"No token is left of {len(texts)} rows"):
        harvest_words(tmp_path, rows_of_list(texts), pack=False)
    assert not (tmp_path / "complete.json").exists()


def test_max_tokens_takes_whole_blocks(tmp_path: Path) -> None:
    base, tokenizer = tiny_base(), word_tokenizer()
    counts = json.loads((tmp_path / "complete.json").read_text())["shards"] if harvest_words(tmp_path).complete else []
    for wanted, blocks in ((1, 1), (counts[0], 1), (counts[0] + 1, 2), (10_000, 3)):
        found = harvest_to_store(base, tokenizer, words(), settings(), tmp_path / str(wanted), max_tokens=wanted)
        assert found.n_shards == blocks and found.n_tokens == sum(counts[:blocks]) and found.complete
    with pytest.raises(ValueError, match="max_tokens=0"):
        harvest_to_store(base, tokenizer, words(), settings(), tmp_path / "0", max_tokens=0)


# -- interrupted, spread, resumed ------------------------------------------------------------------------------------


def test_any_number_of_processes_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest_words(tmp_path / "one")
    for world in (2, 5):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        results = []
        for rank in reversed(range(world)):
            monkeypatch.setenv("RANK", str(rank))
            results.append(harvest_words(tmp_path / str(world)))
        assert [r.complete for r in results] == [False] * (world - 1) + [True]
        assert sum(r.new_tokens for r in results) == results[-1].n_tokens
        assert contents(tmp_path / str(world)) == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_harvest_continues_to_the_same_files(tmp_path: Path) -> None:
    harvest_words(tmp_path / "whole")
    broken = tmp_path / "broken"
    process = run_script(broken, "stall")
    half = f".{shards.shard_name(1)}."
    while not any(name.startswith(half) and content for name, content in contents(broken).items()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    left = contents(broken)
    assert sorted(name for name in left if not name.startswith(half)) == ["index.json", "shard-000000.safetensors"]
    result = harvest_words(broken)
    assert result.complete and result.n_shards == 3
    assert result.new_tokens < result.n_tokens  # the first shard was not made again
    assert contents(broken) == contents(tmp_path / "whole")  # and nothing of the half one is left
    assert harvest_words(broken).new_tokens == 0


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    harvest_words(tmp_path / "whole")
    first, _, third = (path.stat().st_size for path in sorted((tmp_path / "whole").glob("shard-*")))
    assert third < first
    broken = tmp_path / "broken"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (third, limits[1]))  # no larger file can be written
    try:
        with pytest.raises(OSError, match=r"(?s)shard-000000.* could not be written .* too large.* 0 shard\(s\)"):
            harvest_words(broken)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(contents(broken)) == ["index.json"]
    assert harvest_words(broken).complete and contents(broken) == contents(tmp_path / "whole")


def test_an_error_in_writing_is_told_and_the_next_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict, path: Path, metadata: dict) -> None:
        if metadata["block"] == "1":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="shard-000001.* No space left on device. .* 1 shard"):
        harvest_words(tmp_path)
    assert sorted(contents(tmp_path)) == ["index.json", "shard-000000.safetensors"]
    monkeypatch.undo()
    assert harvest_words(tmp_path).complete


def test_a_store_behind_a_url() -> None:
    url = f"memory://{uuid.uuid4()}/store"
    assert harvest_words(url).complete
    fs = fsspec.filesystem("memory")
    names = [Path(str(name)).name for name in fs.ls(url, detail=False)]
    assert sorted(names) == ["complete.json", "index.json", *(f"shard-00000{i}.safetensors" for i in range(3))]
    fs.rm(f"{url}/shard-000001.safetensors")
    again = harvest_words(url)
    assert again.complete and 0 < again.new_tokens < again.n_tokens


def test_json_files_are_json(tmp_path: Path) -> None:
    store = shards.Store(tmp_path)
    store.write_json("a.json", {"x": [1.5, math.nan], "y": {"z": (math.inf, 2)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.5, None], "y": {"z": [None, 2]}}
    assert store.read_json("a.json")["x"] == [1.5, None]


def test_files_can_be_read_by_others_as_usual(tmp_path: Path) -> None:
    harvest_words(tmp_path)
    (tmp_path / "ordinary").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}


# -- stores that are refused -----------------------------------------------------------------------------------------


def late(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (positions > 2) & (rows != 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_points": PLACES[:1]}, f"places.{PLACES[1]} is 32 there and None now"),
        ({"rows_per_shard": 5}, "settings.rows_per_shard is 4 there and 5 now"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' there and 'bfloat16' now"),
        ({"skip_first": False}, "settings.skip_first is True there and False now"),
        ({"source": rows_of_list(word_texts(11))}, "settings.source.rows is 10 there and 11 now"),
    ],
)
def test_other_settings_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    harvest_words(tmp_path)
    with pytest.raises(ValueError, match=f"Received: url='{tmp_path}', where .*{message}"):
        harvest_words(tmp_path, **changes)
    harvest_words(tmp_path, tokens_per_batch=8)  # this one changes rounding only


def test_other_weights_labels_and_choices_of_tokens_are_refused(tmp_path: Path) -> None:
    harvest_words(tmp_path)
    with pytest.raises(ValueError, match="settings.weights is"):
        harvest_to_store(tiny_base(seed=1), word_tokenizer(), words(), settings(), tmp_path)
    with pytest.raises(ValueError, match=r"labels is \[\] there and \['a'\] now"):
        harvest_words(tmp_path, rows_of_list(word_texts(10), {"a": [1] * 10}), pack=True)
    with pytest.raises(ValueError, match="settings.keep is None there and '.*test_store.late' now"):
        harvest_to_store(tiny_base(), word_tokenizer(), words(), settings(), tmp_path, keep=late)


def test_broken_stores_are_refused(tmp_path: Path) -> None:
    harvest_words(tmp_path)
    shard = tmp_path / "shard-000001.safetensors"
    whole = shard.read_bytes()
    for wrong in (whole[:-1], b"", b"12345678abc"):
        shard.write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"shard-000001.safetensors of .* is broken \({len(wrong)} bytes\)"):
            harvest_words(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json of .* is no JSON"):
        harvest_words(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="with 3 shards and none"):
        harvest_words(tmp_path)


# -- settings and the choice of tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_points": "layers.1.resid_post"}, "hook_points='layers.1.resid_post'"),
        ({"hook_points": ("",)}, "hook_points="),
        ({"max_length": 1}, "max_length=1"),
        ({"rows_per_shard": 0}, "rows_per_shard=0"),
        ({"tokens_per_batch": True}, "tokens_per_batch=True"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"positions": "first"}, "positions='first'"),
        ({"positions": "after_prefix"}, "positions='after_prefix', prefix_tokens=0"),
        ({"prefix_tokens": 3}, "positions='all', prefix_tokens=3"),
        ({"positions": "after_prefix", "prefix_tokens": 16}, "prefix_tokens=16, max_length=16"),
        ({"positions": "last", "pack": True}, "positions='last'"),
        ({"template": "w8 {text}", "pack": True}, "template='w8 {text}'"),
        ({"template": "no place"}, "template='no place'"),
        ({"template": "w8 {text}", "positions": "after_prefix", "prefix_tokens": 3}, "prefix_tokens=3"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        settings(**changes)


def test_a_sequence_longer_than_the_model_can_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 128 for this model. Received: max_length=200"):
        harvest_words(tmp_path, max_length=200)


def kept(keep: Any = None, tokenizer: Any = None, **changes: Any) -> list[tuple[int, int]]:
    """(row, position) of the kept tokens of the rows `w1 w2 w3 w4`, `w5`, `w6 w7`."""
    source = rows_of_list(["w1 w2 w3 w4", "w5", "w6 w7"])
    harvester = Harvester(tiny_base(), tokenizer or word_tokenizer(), source, settings(**changes), keep=keep)
    block = harvester.tokens(0, source.read(0, 3))
    assert len(block.token) == len(block.row) == len(harvester.hidden(block)[PLACES[0]])
    return list(zip(block.row.tolist(), block.position.tolist(), strict=True))


def test_tokens_that_are_kept() -> None:
    assert kept(pack=False) == [(0, 1), (0, 2), (0, 3), (2, 1)]
    assert kept(pack=False, skip_first=False) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 1)]
    assert kept(positions="last") == [(0, 3), (2, 1)]
    assert kept(positions="after_prefix", prefix_tokens=2) == [(0, 2), (0, 3)]
    assert kept(pack=False, skip_first=False, keep=late) == [(0, 3)]
    assert kept() == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (2, 7), (2, 8)]  # packed: two end tokens
    assert kept(drop_special_tokens=True) == [(0, 1), (0, 2), (0, 3), (1, 5), (2, 7), (2, 8)]
    begins = word_tokenizer(begins=True)
    assert kept(tokenizer=begins, pack=False) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (2, 1), (2, 2)]

    around = {"template": "w8 w9 {text} w8"}  # never packed; no token of the template that comes first
    assert kept(**around, positions="last") == [(0, 6), (1, 3), (2, 4)]
    after = [(0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4)]
    assert kept(**around, positions="after_prefix") == after
    assert kept(**around, positions="after_prefix", tokenizer=begins) == [(row, at + 1) for row, at in after]
    assert kept(**around)[:7] == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 1)]


def test_states_in_a_template_are_those_of_the_whole_prompt(tmp_path: Path) -> None:
    wanted = settings(template="w8 w9 {text} w8", positions="after_prefix")
    assert "template" not in settings().identity() and wanted.identity()["template"] == "w8 w9 {text} w8"
    source = rows_of_list(["w1 w2", " ", "w5"])
    harvester = Harvester(tiny_base(), word_tokenizer(), source, wanted)
    block = harvester.tokens(0, source.read(0, 3))
    found = harvester.hidden(block)[PLACES[0]]
    whole = Harvester(tiny_base(), word_tokenizer(), rows_of_list(["w8 w9 w1 w2 w8", "w8 w9 w5 w8"]),
                      settings(pack=False, positions="after_prefix", prefix_tokens=2))  # fmt: skip
    rows = whole.tokens(0, whole.source.read(0, 2))
    torch.testing.assert_close(found, whole.hidden(rows)[PLACES[0]], rtol=1e-5, atol=1e-6)
    assert block.token.tolist() == rows.token.tolist() and block.row.tolist() == [0, 0, 0, 2, 2]


def test_the_store_does_not_depend_on_what_the_device_does_at_once(tmp_path: Path) -> None:
    for tokens_at_once in (1, 20, 1000):
        harvest_words(tmp_path / str(tokens_at_once), tokens_per_batch=tokens_at_once, pack=False)
    for number in range(3):
        name = shards.shard_name(number)
        parts = [load_file(tmp_path / folder / name) for folder in ("1", "20", "1000")]
        for other in parts[1:]:
            for key, tensor in parts[0].items():
                torch.testing.assert_close(other[key], tensor, atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    base = tiny_base()
    before = base(prompt()).logits
    harvest_to_store(base, word_tokenizer(), words(), settings(), tmp_path)
    assert torch.equal(base(prompt()).logits, before)


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_same_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    subprocess.run([*command, str(SCRIPT), str(tmp_path / "two"), "nothing"], check=True, timeout=300)
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "one"), "nothing"], check=True, timeout=300)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
