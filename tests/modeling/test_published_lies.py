"""Lies in a published repository: of its config, its generation config, its index, its headers, and files that are
not there. Each is loaded in a process of its own: see `loader_process` for what it may take."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from tests.modeling.loader_process import Loader
from tests.tiny import tiny_base, tiny_sae

SOME, MANY = 12, 200
SCOPES = ("sae", "full", "shards")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VALUES: tuple[Any, ...] = (
    None, "x", "", -1, 0, 1, 2.5, 1e9, 10**12, 10**400, float("nan"), float("inf"), True, False, [], [1, 2], ["llama"],
    {}, {"a": 1}, "float64", "llama", "gpt2", "sae_transformer", [[[[1]]]], 3, 64, 32,
)  # fmt: skip
# What is made in lists, blocks and matrices; 10**8 of them would fit nowhere, 5000 would take minutes.
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim",
    "num_key_value_heads", "max_position_embeddings", "d_in", "d_sae", "k", "layer",
)  # fmt: skip


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every entry of nested dicts and lists, with what holds it."""
    entries = list(values.items() if isinstance(values, dict) else enumerate(values))
    inner = [pair for _, value in entries if isinstance(value, (dict, list)) for pair in places(value)]
    return [(values, key) for key, _ in entries] + inner


def config_lies(folder: Path, chance: random.Random, file: str = "config.json") -> None:
    values = json.loads((folder / file).read_text())
    for _ in range(chance.choice([1, 1, 3])):
        inside, key = chance.choice(places(values))
        if chance.random() < 0.15:
            del inside[key]
        else:
            inside[key] = chance.choice(VALUES)
    (folder / file).write_text(json.dumps(values))


def sizes_lie(folder: Path, chance: random.Random) -> None:
    values = json.loads((folder / "config.json").read_text())
    known = [(inside, key) for inside, key in places(values) if key in SIZES]
    for inside, key in chance.sample(known, chance.choice([1, 1, 2])):
        inside[key] = chance.choice([0, -3, 1, inside[key] * 2, inside[key] + 1, 5000, 2**22, 10**8, 10**10, 10**18])
    (folder / "config.json").write_text(json.dumps(values))


def generation_lies(folder: Path, chance: random.Random) -> None:
    config_lies(folder, chance, "generation_config.json")


def no_config(folder: Path, chance: random.Random) -> None:
    texts = ["", "{", "[]", "null", "3", "[" * 5000, '{"a": ' * 3000, "\x00" * 100, "{}"]
    (folder / chance.choice(["config.json", "generation_config.json"])).write_text(chance.choice(texts))


def gone(folder: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")))
    file.unlink()
    if chance.random() < 0.4:
        file.mkdir()


def base_lies(folder: Path, chance: random.Random) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["base_model_name_or_path"] = chance.choice(
        [str(folder), str(folder / "nothing"), "", "..", 3, None, str(folder.parent / "full"), "/dev/null"]
    )
    (folder / "config.json").write_text(json.dumps(config))


def tensors_change(folder: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = chance.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = chance.randrange(6)
    if kind == 0:
        tensors[name + chance.choice(["_", ".weight"])] = tensor
    elif kind == 1:
        tensors[name] = tensor.flatten()[:-1].clone()
    elif kind == 2:
        tensors[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[None].clone()
    elif kind == 3:
        tensors[name] = tensor.to(chance.choice([torch.int64, torch.bool, torch.float64, torch.uint8]))
    elif kind == 4:
        tensors[name] = torch.zeros(0)
    save_file(tensors, file, metadata={"format": "pt"})


def header_lies(folder: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.5:
        data[8 + chance.randrange(length)] = chance.randrange(256)
        file.write_bytes(data)
    else:
        file.write_bytes(data[: chance.choice([0, 5, 8, 8 + length // 2, 8 + length, len(data) - 1])])


def index_lies(folder: Path, chance: random.Random) -> None:
    if not (folder / INDEX).exists():
        shard = "model-00001-of-00001.safetensors"
        (folder / WEIGHTS).rename(folder / shard)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    config_lies(folder, chance, INDEX)


LIES: tuple[Callable[[Path, random.Random], None], ...] = (
    config_lies, config_lies, config_lies, sizes_lie, sizes_lie, sizes_lie, generation_lies, no_config, gone,
    base_lies, tensors_change, header_lies, index_lies,
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of each scope, with steering in its generation config."""
    folder = tmp_path_factory.mktemp("published")
    tiny_base(num_hidden_layers=2).save_pretrained(folder / "base")
    for scope in SCOPES:
        whole = "sae" if scope == "sae" else "full"
        sae = tiny_sae(layer=1, concepts={"good": 3})
        model = SaeForCausalLM.from_base(str(folder / "base"), sae, weights_scope=whole)
        model.generation_config.sae_steering = Steering([FeatureEdit(0, 3, "add", 1.0)]).to_dict()
        model.save_pretrained(folder / scope, max_shard_size="20KB" if scope == "shards" else "1GB")
    return folder


def lied(published: Path, folder: Path, seed: int) -> tuple[Path, str]:
    """A copy of a repository with a lie, and its name."""
    chance = random.Random(seed)
    copy = Path(shutil.copytree(published / chance.choice(SCOPES), folder / f"lie-{seed}"))
    lie = chance.choice(LIES)
    lie(copy, chance)
    return copy, lie.__name__


def names_something(text: str, copy: Path) -> bool:
    """Whether an error says which repository and file, or which field."""
    return str(copy) in text or bool(re.search(r"`[\w.]+`|\w+\.json", text))


def test_some_lies(published: Path, tmp_path: Path) -> None:
    refused = 0
    for seed in range(SOME):
        copy, lie = lied(published, tmp_path, seed)
        try:
            SaeForCausalLM.from_pretrained(copy)
        except (ValueError, TypeError, OSError) as error:
            refused += 1
            assert names_something(str(error), copy), f"{seed} {lie}: {error!r}"
    assert refused > SOME / 3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
def test_many_lies(published: Path, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with Loader("model", published / "full") as loader:
        for seed in range(SOME, SOME + MANY):
            copy, lie = lied(published, tmp_path, seed)
            found = loader.load(copy, copy)
            kind = found.kind
            if kind == "refused" and not names_something(found.text, copy):
                kind = "names nothing"
            counts[kind] += 1
            if kind not in ("loaded", "refused"):
                wrong.append(f"{seed} {lie}: {found._replace(kind=kind)}")
            shutil.rmtree(copy)
    print(dict(counts))  # for `pytest -rP`
    assert not wrong, "\n".join(wrong[:20])
    assert counts["refused"] > MANY / 3 and counts["loaded"] > 0
