"""An SAE is in memory once while it loads, counted by every allocation and mapping of tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.modeling import repository_files, sae_files
from sae_transformers.modeling.conversion import FORMATS
from tests.tiny import tiny_base

D_SAE = 2**14
MOST = 1.1  # of the file


def changes(work: Callable[[], Any]) -> list[int]:
    """Bytes that tensors take, and give back (negative), in their order; a mapped file counts whole."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    assert kept is not None
    # `events()` has those within an operator as the operator's sum.
    found: Any = profile.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(sizes: list[int]) -> int:
    """The most that is alive at once."""
    alive = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return max(alive, default=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, base = tmp_path_factory.mktemp("loading"), tiny_base()
    base.save_pretrained(root / "base")
    config = SparseAutoencoderConfig(
        d_in=base.config.hidden_size, d_sae=D_SAE, activation="topk", k=8, layer=1, site="resid_post"
    )
    sae = SparseAutoencoder(config)
    sae.save_pretrained(root / "sae")
    model = SaeForCausalLM.from_base(str(root / "base"), saes=[sae])
    model.save_pretrained(root / "adapter")
    model.config.weights_scope = "full"
    model.save_pretrained(root / "full")
    tensors = {name: tensor for name, tensor in sae.state_dict().items() if name != "feature_max"}
    for form in FORMATS:
        if form.name in ("sparsify", "dictionary_learning", "saelens") and form.write is not None:
            form.write(sae.config, tensors, root / form.name)
    return {path.name: path for path in root.iterdir()}


def weight_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def loading(way: str, folders: dict[str, Path]) -> Callable[[], Any]:
    if way == "adapter":
        base = tiny_base()
        return lambda: SaeForCausalLM.from_pretrained(folders["adapter"], base_model=base, force=True)
    if way == "full":
        return lambda: SaeForCausalLM.from_pretrained(folders["full"])
    folder = weight_file(folders[way]).parent
    return lambda: SparseAutoencoder.from_pretrained(folder)


@pytest.mark.parametrize("way", ["sae", "adapter", "full", "saelens", "sparsify", "dictionary_learning"])
def test_a_mapped_sae_is_all_there_is(way: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (repository_files, sae_files):  # all tensors are large
        monkeypatch.setattr(module, "MAPPED_FROM_BYTES", 0, raising=False)
    size = weight_file(folders[way]).stat().st_size
    found = peak(changes(loading(way, folders)))
    assert 0.9 * size < found <= MOST * size, f"{found / size:.2f} of the file"


@pytest.mark.parametrize("way", ["sae", "adapter"])
def test_a_small_sae_is_read_once_into_memory_of_its_own(way: str, folders: dict[str, Path]) -> None:
    size = weight_file(folders[way]).stat().st_size
    taken = changes(loading(way, folders))
    own = [change for change in taken if abs(change) < 0.9 * size]  # without the mapping, of which no page is read
    assert len(own) < len(taken) and 0.9 * size < peak(own) <= MOST * size, f"{peak(own) / size:.2f} of the file"


def test_values_are_those_of_the_file(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded() -> list[dict[str, torch.Tensor]]:
        ways = ("sae", "adapter", "full")
        models = [loading(way, folders)() for way in ways]
        return [
            (models[0] if way == "sae" else model.saes[0]).state_dict()
            for way, model in zip(ways, models, strict=True)
        ]

    own = loaded()
    for module in (repository_files, sae_files):
        monkeypatch.setattr(module, "MAPPED_FROM_BYTES", 0)
    mapped = loaded()
    for one in (*own, *mapped):
        assert set(one) == set(own[0]) and all(torch.equal(one[name], own[0][name]) for name in one)


def test_a_mapped_model_can_be_saved_over_itself(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository_files, "MAPPED_FROM_BYTES", 0)
    model = SaeForCausalLM.from_pretrained(folders["adapter"])
    model.save_pretrained(tmp_path)
    model = SaeForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.saes[0].b_dec += 1.0
    model.save_pretrained(tmp_path)
    again = SaeForCausalLM.from_pretrained(tmp_path).saes[0]
    assert torch.equal(again.W_enc, model.saes[0].W_enc) and torch.equal(again.b_dec, model.saes[0].b_dec)
