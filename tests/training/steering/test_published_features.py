"""SpARE's caches in the authors' layout and in folders of a layer each; files that are missing or wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_transformers.training.steering.functional_features import read_functional_features, scored, select_features
from sae_transformers.training.steering.published_features import read_published_features

SCORES = torch.tensor([0.5, 0.1, 0.3, 0.06, 0.04], dtype=torch.float64)
EXPECTATION = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0])


def write_scores(path: Path, layer: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"mi_scores": SCORES + layer, "expectation": EXPECTATION}, path)


def write_values(folder: Path, *sides: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for side in sides:
        sign = 1 if side == "context" else -1
        torch.save((sign * EXPECTATION).clamp(min=0) + 0.1, folder / f"use_{side}_weight.pt")


def write_cache(folder: Path, layers: tuple[int, ...]) -> Path:
    """As the authors have it of one model."""
    for layer in layers:
        write_scores(folder / "mutual_information" / f"layer-{layer} mi_expectation.pt", layer)
        write_values(folder / "func_weights/grouped_activations" / f"layer{layer}", "context", "parameter")
    return folder


def test_the_authors_layout(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "Llama", (3, 12))
    assert [one.layer for one in read_published_features(cache)] == [3, 12]
    found = read_published_features(cache, (12, 3))
    assert [(one.layer, float(one.mutual_information[0])) for one in found] == [(12, 12.5), (3, 3.5)]
    assert found[0].values is not None
    torch.testing.assert_close(found[0].values[0], torch.tensor([1.1, 0.1, 0.1, 2.1, 0.1]))
    torch.testing.assert_close(found[0].values[1], torch.tensor([0.1, 1.1, 0.1, 0.1, 3.1]))


def test_a_folder_each_layer_and_scores_alone(tmp_path: Path) -> None:
    write_scores(tmp_path / "layer7" / "mutual_information.pt")
    (only,) = read_published_features(tmp_path)
    assert only.layer == 7 and only.values is None
    first, second = select_features(scored(only), proportion=0.85, legacy=True)
    assert (first.tolist(), second.tolist()) == ([0, 3], [1])  # the toy of the paper's rule, by hand
    with pytest.raises(ValueError, match="use_parameter_weight.pt. Received: .'mutual_information.pt'"):
        read_functional_features(tmp_path / "layer7")
    write_values(tmp_path / "layer7", "context", "parameter")
    assert read_functional_features(tmp_path / "layer7").values_b[4] == pytest.approx(3.1)


def test_a_folder_without_a_layers_name_takes_the_one_that_is_given(tmp_path: Path) -> None:
    write_scores(tmp_path / "some" / "mutual_information.pt")
    assert [one.layer for one in read_published_features(tmp_path / "some")] == [None]
    assert [one.layer for one in read_published_features(tmp_path / "some", (5,))] == [5]


def test_what_is_missing_or_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_published_features(tmp_path / "nowhere")
    cache = write_cache(tmp_path / "cache", (3, 4))
    with pytest.raises(ValueError, match=r"has the layers \[3, 4\]. Received: layers \[5\]"):
        read_published_features(cache, (3, 5))
    with pytest.raises(
        ValueError, match=r"mi_expectation.pt' of a layer or more .* Received: \['use_context_weight.pt'"
    ):
        read_published_features(cache / "func_weights/grouped_activations/layer3")
    write_scores(cache / "more/layer3/mutual_information.pt")
    with pytest.raises(ValueError, match="one model, .* two files of layer 3"):
        read_published_features(cache)
    write_scores(tmp_path / "a/layer1/mutual_information.pt")
    write_values(tmp_path / "a/layer1", "context")
    with pytest.raises(ValueError, match="of layer 1. Received: use_context_weight.pt alone"):
        read_published_features(tmp_path / "a")
    write_values(tmp_path / "a/layer1", "parameter")
    torch.save(torch.zeros(3), tmp_path / "a/layer1/use_parameter_weight.pt")
    with pytest.raises(ValueError, match="one SAE. Received: latents .*'use_parameter_weight.pt': 3"):
        read_published_features(tmp_path / "a")
    torch.save({"x": 1}, tmp_path / "a/layer1/use_parameter_weight.pt")
    with pytest.raises(ValueError, match=r"Expected functional values \(d_sae,\) .* Received: dict"):
        read_published_features(tmp_path / "a")


@pytest.mark.parametrize("content", ["code", "text", "table"])
def test_nothing_but_tensors_is_read(tmp_path: Path, content: str) -> None:
    file = tmp_path / "layer1" / "mutual_information.pt"
    file.parent.mkdir()
    if content == "text":
        file.write_text("no tensors")
    else:
        torch.save({"mi_scores": Path("x")} if content == "code" else {"mi_scores": SCORES}, file)
    expected = (
        r"mi_scores and expectation.* Received: \['mi_scores'\]" if content == "table" else "written by torch.save"
    )
    with pytest.raises(ValueError, match=expected):
        read_published_features(tmp_path)
