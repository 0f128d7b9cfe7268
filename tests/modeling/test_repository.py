"""Saved folders: complete, whole, and when damaged refused with an error that says so. No pickle is ever loaded."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_transformers import FeatureEdit, SaeForCausalLM, SaeForSequenceClassification, SaeModel, Steering
from tests.tiny import prompt, tiny_base, tiny_sae

SCOPES = ("sae", "full")
WEIGHTS = "model.safetensors"
CLEAR = (ValueError, OSError, TypeError)  # a KeyError is not among them


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and a model of each scope made from it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_base(num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(folder / "base")
    for scope in SCOPES:
        model = SaeForCausalLM.from_base(str(folder / "base"), tiny_sae(layer=1), weights_scope=scope)
        model.save_pretrained(folder / scope)
    return folder


@pytest.fixture(params=SCOPES)
def scope(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def repository(saved: Path, scope: str, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved / scope, tmp_path / scope))


def load(folder: Path, **options: Any) -> Any:
    return SaeForCausalLM.from_pretrained(str(folder), **options)


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[f"saes.0.{name}"]
        else:
            tensors[f"saes.0.{name}"] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@torch.no_grad()
def test_an_undamaged_copy_loads(repository: Path, saved: Path) -> None:
    expected = SaeForCausalLM.from_base(str(saved / "base"), tiny_sae(layer=1))
    steering = Steering([FeatureEdit(feature=3, op="set", value=5.0)])
    model, info = load(repository, output_loading_info=True)
    assert torch.equal(model(prompt(), steering=steering).logits, expected(prompt(), steering=steering).logits)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_sharded_checkpoints_load(repository: Path, tmp_path: Path) -> None:
    model = load(repository)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    assert not (tmp_path / "sharded" / WEIGHTS).exists()
    again = load(tmp_path / "sharded")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_truncated_at_any_offset(repository: Path) -> None:
    whole = (repository / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    offsets = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for offset in offsets:
        (repository / WEIGHTS).write_bytes(whole[:offset])
        with pytest.raises(ValueError, match=r"damaged or cut short.*Download or save it again"):
            load(repository)


def test_bytes_after_the_end(repository: Path) -> None:
    with (repository / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="damaged"):
        load(repository)


def test_flipped_header_bytes_end_in_a_clear_error_or_a_load(repository: Path) -> None:
    whole = (repository / WEIGHTS).read_bytes()
    refused = 0
    for offset in (0, 1, 2, 3, 7, 8, 9, 12, 20, 31, 47):
        (repository / WEIGHTS).write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x15]) + whole[offset + 1 :])
        try:
            load(repository)
        except CLEAR as error:
            assert len(str(error)) > 20
            refused += 1
    assert refused >= 6


def test_a_missing_tensor_is_named(repository: Path) -> None:
    change_tensors(repository, W_dec=None)
    with pytest.raises(ValueError, match=r"does not fit its config: missing \['saes.0.W_dec'\]"):
        load(repository)


def test_a_tensor_of_the_wrong_shape_is_named(repository: Path) -> None:
    change_tensors(repository, b_enc=torch.zeros(63))
    with pytest.raises(ValueError, match=r"saes.0.b_enc[\s\S]*63"):
        load(repository)


def test_a_tensor_too_many_in_an_adapter_is_named(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "sae", tmp_path / "sae"))
    change_tensors(folder, W_gate=torch.zeros(3))
    with pytest.raises(ValueError, match=r"unexpected \['saes.0.W_gate'\]"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(repository: Path, value: float) -> None:
    bias = torch.zeros(64)
    bias[7] = value
    change_tensors(repository, b_enc=bias)
    with pytest.raises(ValueError, match=r"saes.0.b_enc in .* holds NaN"):
        load(repository)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"saes.0.W_dec": 3}}', "{}"])
def test_a_damaged_shard_index(repository: Path, text: str) -> None:
    (repository / WEIGHTS).unlink()
    (repository / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CLEAR, match=r"index\.json is damaged|holds no"):
        load(repository)


def test_a_missing_shard_is_named(repository: Path) -> None:
    (repository / WEIGHTS).unlink()
    index = {"weight_map": {"saes.0.W_dec": "model-00001-of-00001.safetensors"}}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="model-00001-of-00001.safetensors"):
        load(repository)


def test_no_weights_at_all(repository: Path) -> None:
    (repository / WEIGHTS).unlink()
    with pytest.raises(OSError, match=r"holds no model.safetensors"):
        load(repository)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"use_safetensors": True}])
@pytest.mark.parametrize("index", [False, True], ids=["file", "index"])
def test_a_pickle_is_refused_and_never_loaded(repository: Path, tmp_path: Path, options: dict, index: bool) -> None:
    trap = tmp_path / "sprung"
    (repository / WEIGHTS).unlink()
    (repository / "pytorch_model.bin").write_bytes(pickle.dumps({"saes.0.W_dec": Trap(trap)}))
    if index:
        (repository / "pytorch_model.bin").rename(repository / "part.bin")
        weight_map = {"weight_map": {"saes.0.W_dec": "part.bin"}, "metadata": {}}
        (repository / "pytorch_model.bin.index.json").write_text(json.dumps(weight_map))
    with pytest.raises(ValueError, match=r"[Pp]ickle.* can run code and is not read"):
        load(repository, **options)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists(), "the trap works"


def test_a_pickle_named_as_a_shard_or_as_safetensors_is_never_loaded(repository: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    (repository / WEIGHTS).write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match="damaged"):
        load(repository)
    (repository / WEIGHTS).rename(repository / "evil.bin")
    index = {"weight_map": {"saes.0.W_dec": "evil.bin"}, "metadata": {}}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="damaged"):
        load(repository)
    assert not trap.exists()


def test_a_base_that_is_gone(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "sae", tmp_path / "sae"))
    change_config(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"sae holds SAEs for the base '.*gone'.*`base_model=`"):
        load(folder)
    change_config(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"names no base. Pass `base_model=`"):
        load(folder)
    for base in (str(saved / "base"), SaeForCausalLM.auto_model.from_pretrained(saved / "base")):
        assert load(folder, base_model=base)(prompt()).logits.shape == (2, 9, 99)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 64), ("num_hidden_layers", 3), ("vocab_size", 120)],
)
def test_a_base_of_another_size(saved: Path, tmp_path: Path, field: str, value: int) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 2, field: value}
    other = tiny_base(**sizes)
    expected = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}[field]
    with pytest.raises(ValueError, match=f"made for a base with {field}={expected}.*Received.*{field}={value}"):
        load(saved / "sae", base_model=other)


def test_a_base_of_another_family(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type='llama'.*model_type='gpt2'"):
        load(saved / "sae", base_model=tiny_base("gpt2", num_hidden_layers=2))


def test_a_misspelled_option_is_refused(saved: Path, scope: str) -> None:
    with pytest.raises(TypeError, match="base_modle"):
        load(saved / scope, base_modle="x")


@pytest.mark.parametrize("name", ["a_file", "a_file/model", "/proc/model"])
def test_an_output_folder_that_cannot_be_written(saved: Path, scope: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "a_file").write_text("not a folder")
    target = tmp_path / name  # an absolute name replaces it
    with pytest.raises(OSError, match=rf"cannot be written; give another. Received: '{target}'"):
        load(saved / scope).save_pretrained(target)
    assert (tmp_path / "a_file").read_text() == "not a folder"


def test_a_card_of_the_users_is_kept(saved: Path, scope: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    load(saved / scope).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob("*.part"))


def test_an_adapter_without_a_named_base_warns_and_resized_embeddings_are_refused(tmp_path: Path) -> None:
    model = SaeForCausalLM.from_base(tiny_base(), tiny_sae(layer=1))
    with pytest.warns(UserWarning, match=r"`base_model=` to load"):
        model.save_pretrained(tmp_path / "a")
    model.config.base_model_name_or_path = "me/base"
    model.resize_token_embeddings(120)
    model.lm.requires_grad_(False)
    with pytest.raises(ValueError, match=r"weights_scope = 'full'"):
        model.save_pretrained(tmp_path / "b")


@pytest.mark.parametrize("head", [SaeModel, SaeForCausalLM, SaeForSequenceClassification])
def test_a_base_is_frozen_in_an_adapter_only(saved: Path, head, scope: str) -> None:
    options: dict[str, Any] = {"num_labels": 2} if head is SaeForSequenceClassification else {}
    model = head.from_base(str(saved / "base"), tiny_sae(layer=1), weights_scope=scope, **options)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("saes.") for n in trainable)
    frozen = {n for n, _ in model.named_parameters() if n.startswith("lm.")} - trainable
    assert (len(frozen) > 10) == (scope == "sae") and "lm.score.weight" not in frozen


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_random_damage_ends_in_a_clear_error_or_a_model(repository: Path, name: str, scope: str) -> None:
    """50 mutations of each file in each scope: flipped, replaced, inserted or removed bytes."""
    dice = random.Random(f"{name} {scope}")
    whole = (repository / name).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if name == WEIGHTS else len(whole)
    outcomes = []
    for _ in range(50):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 2, 8])):
            at = dice.randrange(min(header, len(damaged)) if dice.random() < 0.8 else len(damaged))
            kind = dice.choice(["flip", "digit", "insert", "remove"])
            if kind == "flip":
                damaged[at] ^= 1 << dice.randrange(8)
            elif kind == "digit":
                damaged[at] = dice.choice(b'0123456789"{}[],: -enul')
            elif kind == "insert":
                damaged.insert(at, dice.randrange(256))
            else:
                del damaged[at]
        (repository / name).write_bytes(damaged)
        try:
            model = load(repository)
        except CLEAR as error:
            assert len(str(error)) > 15, repr(error)
            outcomes.append("refused")
        else:
            assert all(bool(torch.isfinite(t).all()) for t in model.saes.state_dict().values())
            outcomes.append("loaded")
    assert set(outcomes) <= {"refused", "loaded"} and "refused" in outcomes


def test_the_scope_is_not_an_option_of_saving(saved, tmp_path):
    model = SaeForCausalLM.from_pretrained(str(saved / "sae"))
    with pytest.raises(TypeError, match="Received: weights_scope='full'"):
        model.save_pretrained(tmp_path / "new", weights_scope="full")
    assert not (tmp_path / "new").exists()
