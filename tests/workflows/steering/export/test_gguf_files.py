"""Control vectors as GGUF: the layout by gguf's own reader, and damaged or hostile files."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from sae_transformers.workflows.steering.export.gguf_files import read_control_vector, write_control_vector
from tests.covering import fast

DIRECTIONS = {3: torch.linspace(-1, 1, 32), 1: torch.arange(32) / 7}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def raw(places: list[tuple[str, tuple[int, ...], int, int]], data: bytes = b"\0" * 128, **head: int) -> bytes:
    """A GGUF file of version 3 with one key, byte by byte."""
    counts = {"version": 3, "tensors": len(places), "keys": 1, **head}
    found = b"GGUF" + struct.pack("<IQQ", *counts.values())
    found += text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    for name, shape, kind, offset in places:
        found += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return found + b"\0" * (-len(found) % 32) + data


def test_the_layout_is_that_of_llama_cpp_and_repeng(tmp_path: Path) -> None:
    write_control_vector(tmp_path / "v.gguf", DIRECTIONS, "llama")
    read = GGUFReader(tmp_path / "v.gguf")
    assert read.fields["general.architecture"].contents() == "controlvector"
    assert read.fields["controlvector.model_hint"].contents() == "llama"
    assert read.fields["controlvector.layer_count"].contents() == 2
    assert [tensor.name for tensor in read.tensors] == ["direction.1", "direction.3"]
    for tensor in read.tensors:
        layer = int(tensor.name.split(".")[1])
        assert tensor.tensor_type.name == "F32" and list(tensor.shape) == [32]
        assert torch.equal(torch.from_numpy(tensor.data.copy()), DIRECTIONS[layer])
    found = read_control_vector(tmp_path / "v.gguf")
    assert found.model_hint == "llama" and list(found.directions) == [1, 3]
    assert all(torch.equal(found.directions[layer], DIRECTIONS[layer]) for layer in DIRECTIONS)


def test_a_file_of_the_vector_generator_is_read(tmp_path: Path) -> None:
    """llama.cpp's own writes a signed count, and other keys may stand beside it."""
    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_int32("controlvector.layer_count", 1)
    writer.add_array("tags", ["a", "b"])
    writer.add_custom_alignment(64)
    writer.add_tensor("direction.2", DIRECTIONS[3].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_control_vector(tmp_path / "v.gguf")
    assert found.model_hint == "qwen2" and torch.equal(found.directions[2], DIRECTIONS[3])


def test_block_0_and_a_missing_package_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="blocks 1, 2, .* to='baked_bias'. Received: layer=0"):
        write_control_vector(tmp_path / "v.gguf", {0: DIRECTIONS[1]}, "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf.*pip install 'sae-transformers\[gguf\]'"):
        write_control_vector(tmp_path / "v.gguf", DIRECTIONS, "llama")
    assert not list(tmp_path.iterdir())


ONE = ("direction.1", (32,), 0, 0)
BAD = {
    "no GGUF file": b"PK\3\4" + b"\0" * 60,
    "GGUF version 1": raw([ONE], version=1),
    "at most 4096 keys": raw([ONE], keys=2**60),
    "keys, 1099511627776 tensors": raw([ONE], tensors=2**40),
    "general.architecture='controlvector'. Received: 'llama'": raw([ONE]).replace(
        text("controlvector"), text("llama")
    ),
    "Received: none": raw([]),
    "Received: 'direction.0'": raw([("direction.0", (32,), 0, 0)]),
    "Received: 'direction.x'": raw([("direction.x", (32,), 0, 0)]),
    "Received: 'blk.0.attn_q.weight'": raw([("blk.0.attn_q.weight", (32,), 0, 0)]),
    "direction.1 of type 1": raw([("direction.1", (32,), 1, 0)]),
    "shape (4, 8)": raw([("direction.1", (4, 8), 0, 0)]),
    "shape (0,)": raw([("direction.1", (0,), 0, 0)]),
    "'direction.1' has 5 dimensions": raw([("direction.1", (2,) * 5, 0, 0)]),
    "would end at byte": raw([("direction.1", (2**40,), 0, 0)]),
    "of 256": raw([("direction.1", (32,), 0, 2**50)]),
    "two directions for one layer": raw([ONE, ONE]),
    "several widths. Received: [16, 32]": raw([ONE, ("direction.2", (16,), 0, 0)]),
    "NaN or infinite": raw([ONE], struct.pack("<f", float("nan")) * 32),
    "damaged or cut short": raw([ONE])[:60],
    "a text of 1,099,511,627,776 bytes": raw([ONE])[:24] + struct.pack("<Q", 2**40) + b"\0" * 99,
    "list of 1,099,511,627,776 values": raw([])[:24] + text("k") + struct.pack("<IIQ", 9, 0, 2**40),
    "unknown type 77": raw([])[:24] + text("k") + struct.pack("<I", 77),
    "can't decode": raw([])[:24] + struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 40,
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_damaged_and_hostile_files_end_in_a_clear_error(tmp_path: Path, reason: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(BAD[reason])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            read_control_vector(tmp_path / "bad.gguf")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert reason in str(caught.value) and "bad.gguf" in str(caught.value)


@pytest.mark.parametrize("step", fast([3, 17], 17))
def test_cuts_and_flipped_bytes_are_errors_or_vectors(tmp_path: Path, step: int) -> None:
    whole, file = raw([ONE, ("direction.2", (32,), 0, 0)]), tmp_path / "v.gguf"
    for length in range(0, len(whole), step):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="v.gguf"):
            read_control_vector(file)
    for place in range(0, len(whole), step):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        try:
            assert set(read_control_vector(file).directions) <= set(range(1, 10**6))
        except ValueError as error:
            assert "v.gguf" in str(error)
