"""Sizes that a published config merely claims: refused by the headers of the weights, before memory or time is taken.

Each lie is told in a process that may take little more memory than it has.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_transformers import SaeForCausalLM, SaeForSequenceClassification, SparseAutoencoderConfig
from sae_transformers.modeling.stored_claims import Stored, check_layer_claims, check_sae_claims, stored_shapes
from tests.tiny import tiny_base, tiny_sae

HEADROOM = 2**30  # of address space; the lies ask for a hundred times as much, or more
SECONDS = 10.0


@contextlib.contextmanager
def little() -> Iterator[None]:
    """No more than `HEADROOM` of new memory, no more than `SECONDS` of processor time."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, start = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < SECONDS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; `sae` and `full`, models of each scope; `head`, a classifier with a feature head."""
    folder = tmp_path_factory.mktemp("claims")
    tiny_base(num_hidden_layers=2).save_pretrained(folder / "base")
    for scope in ("sae", "full"):
        model = SaeForCausalLM.from_base(str(folder / "base"), tiny_sae(layer=1), weights_scope=scope)
        model.save_pretrained(folder / scope)
    head = {"sae": 0, "hidden_size": 8}
    classifier = SaeForSequenceClassification.from_base(str(folder / "base"), tiny_sae(layer=1), feature_head=head)
    classifier.save_pretrained(folder / "head")
    return folder


def changed(saved: Path, scope: str, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    folder = Path(shutil.copytree(saved / scope, tmp_path / scope))
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def base_says(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["text_config"].update(values)


def sae_says(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["saes"][0].update(values)


# fmt: off
LIES: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "d_sae": ("full", sae_says(d_sae=10**12), r"d_sae=1000000000000|saes\.0\.\w+ .* config asks"),
    "d_sae of an adapter": ("sae", sae_says(d_sae=10**12), r"d_sae=1000000000000|saes\.0\.\w+ .* config asks"),
    "d_sae that just fits": ("full", sae_says(d_sae=10**8), r"saes\.0\.\w+ in .* its config asks for \(100000000"),
    "d_in": ("sae", sae_says(d_in=10**9, d_out=10**9), r"saes\.0\.\w+ in .* its config asks for .*1000000000"),
    "vocab_size": ("full", base_says(vocab_size=10**10), r"weight in .* config asks .*10000000000"),
    "hidden_size": ("full", base_says(hidden_size=2**22), r"config asks for|config\.json of .* asks for|text_config"),
    "intermediate_size": ("full", base_says(intermediate_size=10**9), r"mlp\.\w+\.weight in .* asks .*1000000000"),
    "layers without an end": ("full", base_says(num_hidden_layers=10**9), r"`text_config.num_hidden_layers` must be"),
    "layers of an adapter": ("sae", base_says(num_hidden_layers=10**9), r"`text_config.num_hidden_layers` must be"),
    "more layers than there are": ("full", base_says(num_hidden_layers=5000), r"`num_hidden_layers` in .* is 2\."),
    "labels without an end": ("full", lambda config: config.update(num_labels=10**9), "`num_labels` must be at most"),
    "labels of an adapter": ("head", lambda config: config.update(num_labels=10**9), "`num_labels` must be at most"),
    "heads' width": ("head", lambda c: c["feature_head"].update(hidden_size=10**10), "`feature_head.hidden_size` in"),
    "no attention heads": ("full", base_says(num_attention_heads=0), r"`text_config\.num_attention_heads` must"),
    "a model_type that is a list": ("full", base_says(model_type=["llama"]), r"`text_config\.model_type` must"),
    "a model_type that is none": ("full", base_says(model_type="no-such"), "does not describe a no-such"),
    "negative sizes": ("full", base_says(vocab_size=-5), r"`text_config\.vocab_size` must be at least 1"),
    "no SAEs, full": ("full", lambda config: config.pop("saes"), r"weights of SAE 0, .* `saes` with 0"),
    "no SAEs, adapter": ("sae", lambda config: config.pop("saes"), r"weights of SAE 0, .* `saes` with 0"),
    "an empty list of SAEs": ("full", lambda config: config.update(saes=[]), "holds the weights of SAE 0"),
    "SAEs that are null": ("sae", lambda config: config.update(saes=None), "holds the weights of SAE 0"),
}
# fmt: on


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_before_it_costs_anything(saved: Path, tmp_path: Path, lie: str) -> None:
    scope, change, told = LIES[lie]
    model = SaeForSequenceClassification if scope == "head" else SaeForCausalLM
    folder = changed(saved, scope, tmp_path, change)
    with little(), pytest.raises((ValueError, TypeError), match=told):
        model.from_pretrained(folder)


def test_a_repository_that_names_itself_as_its_base(saved: Path, tmp_path: Path) -> None:
    folder = changed(
        saved, "sae", tmp_path, lambda config: config.update(base_model_name_or_path=str(tmp_path / "sae"))
    )
    with (
        little(),
        pytest.raises(ValueError, match=r"base of .* is a model with SAEs, or itself.*base_model_name_or_path="),
    ):
        SaeForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="is a model with SAEs"):
        SaeForCausalLM.from_pretrained(saved / "sae", base_model=str(saved / "full"))


def test_weights_of_a_second_sae_are_not_left_out(saved: Path, tmp_path: Path) -> None:
    for scope in ("sae", "full"):
        folder = Path(shutil.copytree(saved / scope, tmp_path / scope))
        tensors = load_file(folder / "model.safetensors")
        tensors |= {
            name.replace("saes.0.", "saes.1."): tensor.clone() for name, tensor in tensors.items() if "saes.0" in name
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"weights of SAE 1, which its config\.json does not have.* with 1 entries"
        ):
            SaeForCausalLM.from_pretrained(folder)


def test_what_is_true_still_loads(saved: Path, tmp_path: Path) -> None:
    for scope in ("sae", "full"):
        SaeForCausalLM.from_pretrained(saved / scope)
    SaeForSequenceClassification.from_pretrained(saved / "head")
    longer = changed(saved, "full", tmp_path, base_says(max_position_embeddings=10**7))
    SaeForCausalLM.from_pretrained(longer)
    with pytest.raises(ValueError, match=r"embed_tokens|lm_head"):
        SaeForCausalLM.from_pretrained(changed(saved, "full", tmp_path / "other", base_says(vocab_size=101)))
    # Other sizes on purpose.
    wider = SaeForCausalLM.from_pretrained(tmp_path / "other" / "full", ignore_mismatched_sizes=True)
    assert wider.get_input_embeddings().weight.shape[0] == 101


def test_buffers_that_a_config_asks_for(tmp_path: Path) -> None:
    """GPT-2 makes a mask of the square of its longest text, which no file holds."""
    SaeForCausalLM.from_base(tiny_base("gpt2"), tiny_sae(layer=1), weights_scope="full").save_pretrained(
        tmp_path / "full"
    )
    SaeForCausalLM.from_pretrained(tmp_path / "full")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    config["text_config"]["n_positions"] = 10**6
    (tmp_path / "full" / "config.json").write_text(json.dumps(config))
    with little(), pytest.raises(ValueError, match=r"config\.json of .* asks for|wpe\.weight in .* config asks for"):
        SaeForCausalLM.from_pretrained(tmp_path / "full")


def test_a_name_that_is_longer_than_any(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a" * 1000: torch.zeros(2, 3)}, path)
    assert stored_shapes([str(path)]) == {"a" * 1000: (2, 3)}
    save_file({"a" * 1001: torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: a tensor's name has 1,001 characters"):
        stored_shapes([str(path)])


# -- by hand ---------------------------------------------------------------------------------------------------------


class Config:
    model_type = "made"

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def stored(*names: str) -> Stored:
    return Stored("here", {name: (2, 2) for name in names})


def test_blocks_are_counted_by_their_numbers() -> None:
    shards = stored(*(f"lm.model.layers.{n}.mlp.weight" for n in (0, 1, 2, 7)), "lm.head.weight")
    check_layer_claims(Config(num_hidden_layers=4), shards)
    for config in (Config(num_hidden_layers=5), Config(text_config=Config(n_layer=5)), Config(decoder_layers=10**8)):
        with pytest.raises(ValueError, match=r"more blocks than its weights have, which is 4"):
            check_layer_claims(config, shards)


def test_blocks_that_share_their_weights() -> None:
    """ALBERT's blocks are one, used again and again; without numbers a block has at least a tensor."""
    shared = stored(*(f"albert.groups.0.layers.0.{name}" for name in "abcdef"))
    check_layer_claims(Config(num_hidden_layers=6), shared)
    with pytest.raises(ValueError, match="which is 6"):
        check_layer_claims(Config(num_hidden_layers=7), shared)
    groups = stored(*(f"albert.groups.{n}.{name}" for n in range(2) for name in "abc"))
    check_layer_claims(Config(num_hidden_layers=6, num_hidden_groups=2), groups)


def test_new_saes_are_told_from_lost_ones() -> None:
    entry = SparseAutoencoderConfig(d_in=2, d_sae=4, layer=0)
    check_sae_claims([entry], stored("lm.head.weight"), may_lack=True)
    with pytest.raises(ValueError, match=r"missing \['saes\.0\.W_dec'"):
        check_sae_claims([entry], stored("lm.head.weight"))
    shapes = {"W_enc": (2, 4), "W_dec": (4, 2), "b_enc": (4,), "b_dec": (2,), "feature_max": (4,)}
    whole = {f"saes.0.{name}": shape for name, shape in shapes.items()}
    check_sae_claims([entry], Stored("here", whole))
    with pytest.raises(ValueError, match=r"saes\.0\.b_enc in here has shape \(5,\); its config asks for \(4,\)"):
        check_sae_claims([entry], Stored("here", {**whole, "saes.0.b_enc": (5,)}))
    check_sae_claims([entry], Stored("here", {**whole, "saes.0.b_enc": (5,)}, any_size=True))
    assert torch.get_default_device().type == "cpu"
