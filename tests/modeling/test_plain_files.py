"""Pipes, devices and long files in a folder of somebody else: refused, not waited for and not read to their end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_transformers import SaeForCausalLM, SparseAutoencoder
from sae_transformers.modeling import plain_files
from sae_transformers.modeling.conversion import checkpoint
from sae_transformers.modeling.plain_files import check_header, opened_tensors, read_json, read_plain, written_tensors
from tests.modeling.conversion.families import FAMILIES
from tests.tiny import tiny_model, tiny_sae

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have names")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


STRANGE = (pipe, device)


@pytest.mark.parametrize("strange", STRANGE)
def test_what_never_ends_is_not_read(tmp_path: Path, strange: Callable[[Path], None]) -> None:
    strange(tmp_path / "config.json")
    for read in (read_plain, read_json):
        with pytest.raises(ValueError, match=r"config\.json', which is a pipe, a device or the like"):
            read(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json"), opened_tensors(tmp_path / "config.json"):
        pass


def test_links_and_bounds(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_bytes(b'{"a": 1}')
    (tmp_path / "link.json").symlink_to("real.json")  # as in the Hub's cache
    assert read_json(tmp_path / "link.json") == {"a": 1}
    assert read_plain(tmp_path / "link.json", most=8) == b'{"a": 1}'
    with pytest.raises(ValueError, match=r"link\.json is longer.* at most 7 bytes"):
        read_plain(tmp_path / "link.json", most=7)
    with pytest.raises(IsADirectoryError, match="which is a folder"):
        read_plain(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "nothing.json")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_json(tmp_path / "config.json")


def test_headers_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    length = check_header(path)
    monkeypatch.setattr(plain_files, "MAX_HEADER_BYTES", length)
    with opened_tensors(path) as stored:
        assert list(stored.keys()) == ["a"]
    monkeypatch.setattr(plain_files, "MAX_HEADER_BYTES", length - 1)
    with pytest.raises(ValueError, match=rf"model\.safetensors .* header would have {length}"), opened_tensors(path):
        pass
    for damaged in (b"", b"abc", (2**40).to_bytes(8, "little") + b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"), opened_tensors(path):
            pass


# -- readers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_of_every_format(tmp_path: Path, family: str, strange: Callable[[Path], None]) -> None:
    path = FAMILIES[family](tmp_path)
    for file in [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]:
        kept = file.read_bytes()
        file.unlink()
        strange(file)
        # Of Gemma Scope 2 some configs cannot be read; the path says the place too.
        passes = family.startswith("gemma_scope_2") and file.suffix == ".json"
        told = pytest.warns(UserWarning, match=file.name) if passes else pytest.raises(Exception, match=file.name)
        with told as found:
            SparseAutoencoder.from_pretrained(path)
        assert passes or isinstance(found.value, (ValueError, OSError))  # pyright: ignore[reportAttributeAccessIssue]
        file.unlink()
        file.write_bytes(kept)
    SparseAutoencoder.from_pretrained(path)


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_our_own_files(tmp_path: Path, name: str, strange: Callable[[Path], None]) -> None:
    tiny_sae(layer=1).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    strange(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=name):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("scope", ["sae", "full"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_models_files(tmp_path: Path, name: str, scope: str, strange: Callable[[Path], None]) -> None:
    model = tiny_model()
    model.lm.save_pretrained(tmp_path / "base")
    model.config.weights_scope, model.config.base_model_name_or_path = scope, str(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    strange(tmp_path / "model" / name)
    with pytest.raises((ValueError, OSError), match=name):
        SaeForCausalLM.from_pretrained(tmp_path / "model")


def test_our_own_config_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_sae(layer=1).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "metadata": {"note": "x" * 2**24}}))
    with pytest.raises(ValueError, match=r"config\.json is longer than such a file can be"):
        SparseAutoencoder.from_pretrained(tmp_path)


# -- pickles and zips -------------------------------------------------------------------------------------------------


def test_the_program_of_a_pickle_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FAMILIES["goodfire"](tmp_path)
    monkeypatch.setattr(checkpoint, "MAX_PROGRAM_BYTES", 100)
    with pytest.raises(ValueError, match=r"\.pth is refused: its pickle has \d+ bytes .* at most 100"):
        SparseAutoencoder.from_pretrained(path)


def test_shared_values_of_a_pickle_are_counted_as_often_as_they_are_met(tmp_path: Path) -> None:
    """Nine lists of eight references each are 134 million values for whoever walks or shows them."""
    nested: list = [1]
    for _ in range(9):
        nested = [nested] * 8
    path = FAMILIES["openai"](tmp_path)
    found = torch.load(path, weights_only=True)
    torch.save({**found, "activation_state_dict": {"k": nested}}, path)
    assert path.stat().st_size < 2**15
    with pytest.raises(ValueError, match=r"6\.pt is refused.* more than 131,072 values"):
        SparseAutoencoder.from_pretrained(path)


@pytest.mark.parametrize("name", ["numel", "note"])
def test_a_tensor_with_attributes_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    """They come before the methods of its class: 'str' object is not callable."""
    path = FAMILIES["goodfire"](tmp_path)
    found = torch.load(path, weights_only=True)
    tensor = found["encoder_linear.bias"]
    tensor.__dict__[name] = "hidden"
    torch.save(found, path)
    with pytest.raises(ValueError, match=rf"\.pth is refused: it .* Tensor with attributes of its own \({name}\)"):
        SparseAutoencoder.from_pretrained(path)


def test_what_torch_notes_on_a_state_dict_is_no_such_attribute(tmp_path: Path) -> None:
    path = FAMILIES["goodfire"](tmp_path)
    linear = torch.nn.Linear(3, 4)
    state = linear.state_dict()
    assert vars(state)
    for name, tensor in torch.load(path, weights_only=True).items():
        state[name] = tensor
    del state["weight"], state["bias"]
    torch.save(state, path)
    SparseAutoencoder.from_pretrained(path)


def test_the_directory_of_a_zip_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FAMILIES["gemma_scope"](tmp_path)
    monkeypatch.setattr(checkpoint, "MAX_DIRECTORY_BYTES", 64)
    with pytest.raises(ValueError, match=r"params\.npz is damaged.* directory would have .* at most 64"):
        SparseAutoencoder.from_pretrained(path)


def test_a_header_of_numpy_that_is_no_python(tmp_path: Path) -> None:
    """An unclosed bracket is a TokenError of Python's tokenizer."""
    path = FAMILIES["gemma_scope"](tmp_path) / "params.npz"
    data = path.read_bytes()
    assert data.count(b"'shape': (40,), }") == 2
    path.write_bytes(data.replace(b"'shape': (40,), }", b"'shape': (40,, ((", 1))
    with pytest.raises(ValueError, match=r"in .*params\.npz cannot be read as an array of numbers"):
        SparseAutoencoder.from_pretrained(path.parent)


# -- a full disk ------------------------------------------------------------------------------------------------------

FULL = """
import resource, sys
from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.conversion import FORMATS
from pathlib import Path
from tests.tiny import tiny_model, tiny_sae
sae, model = tiny_sae(layer=1, d_sae=1024), tiny_model(d_sae=1024)
model.config.base_model_name_or_path = "base"
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # no file may be longer
for what in sys.argv[2:]:
    folder = Path(sys.argv[1], what)
    try:
        if what in ("sparsify", "saelens"):
            form = next(form for form in FORMATS if form.name == what)
            folder.mkdir()
            form.write(sae.config, sae.state_dict(), folder)
        else:
            {"sae": sae, "model": model}[what].save_pretrained(folder)
    except OSError as error:
        print(what, "OSError", error)
"""


@pytest.mark.slow  # an interpreter of its own
def test_a_file_that_cannot_grow_is_an_os_error(tmp_path: Path) -> None:
    """safetensors has an error of its own for a disk without room, which is no OSError. One process for all."""
    kinds = ["sae", "saelens", "sparsify", "model"]
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), *kinds], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[kind, "OSError"] for kind in kinds], done.stdout
    assert all("cannot be written" in line for line in lines), done.stdout
    assert not [file for file in tmp_path.rglob("*.safetensors")]


def test_errors_of_writing_name_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"full/model\.safetensors cannot be written"),
        written_tensors("full/model.safetensors"),
    ):
        save_file({"a": torch.zeros(3)}, tmp_path / "nowhere" / "a.safetensors")


def test_files_that_a_failed_write_leaves_cut_short_go(tmp_path: Path) -> None:
    """safetensors before 0.8 leaves them; what is whole, and what was there before, stays."""
    save_file({"a": torch.zeros(3)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "earlier.safetensors").write_bytes(data[:-1])
    with pytest.raises(OSError, match="cannot be written"), written_tensors(tmp_path):
        (tmp_path / "part-1.safetensors").write_bytes(data)
        (tmp_path / "part-2.safetensors").write_bytes(data[:-1])
        save_file({"a": torch.zeros(3)}, tmp_path / "nowhere" / "part-3.safetensors")
    assert sorted(file.stem for file in tmp_path.glob("*")) == ["earlier", "part-1", "whole"]
    with pytest.raises(OSError, match="cannot be written"), written_tensors(tmp_path / "one.safetensors"):
        (tmp_path / "one.safetensors").write_bytes(data[:-1])
        save_file({"a": torch.zeros(3)}, tmp_path / "nowhere" / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()
