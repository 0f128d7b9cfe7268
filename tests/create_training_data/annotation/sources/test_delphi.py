"""Runs of delphi's: explanations, scores and activations."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_transformers.create_training_data.annotation.sources.delphi import is_delphi, read_delphi
from tests.create_training_data.annotation.sources.layouts import write_bulk, write_delphi


def test_explanations_scores_and_activations(tmp_path: Path) -> None:
    folder = write_delphi(tmp_path)
    notes = read_delphi(folder, n_features=64)
    (one,) = notes.of(3)
    assert is_delphi(folder) and one[:3] == ("remarks that mean the opposite", "llama-3.1-70b", "delphi")
    assert one.score == pytest.approx((2 / 3 + 1) / 2) and notes.of(12)[0].score is None
    assert notes.description(40) == "<b>bold</b>" and notes.facts["score"] == "share right: detection, fuzz"
    assert [notes.number("maximum", n) for n in (3, 12, 40)] == [2.5, 4.0, 7.0]
    assert notes.number("frequency", 3) == pytest.approx(2 / 16) and notes.number("frequency", 5) is None
    assert notes.facts.get("maxima") is None


def test_a_run_of_several_modules_needs_one(tmp_path: Path) -> None:
    folder = write_delphi(tmp_path, "layers.1", ["layers.2"])
    with pytest.raises(ValueError, match=r"one of layers\.1, layers\.2. Received: module=None"):
        read_delphi(folder)
    with pytest.raises(ValueError, match="module='layers.3'"):
        read_delphi(folder, module="layers.3")
    assert read_delphi(folder, module="layers.2").number("maximum", 3) is None
    assert read_delphi(folder, module="layers.1").number("maximum", 3) == 2.5


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("explanations/layers.1_latent3.txt", "not JSON", r"latent3\.txt must hold JSON, as delphi writes it"),
        ("explanations/layers.1_latent3.txt", "[1]", r"latent3\.txt: `description` must be a text"),
        ("explanations/layers.1_latent64.txt", '"x"', "The SAE has 64 latents.*Received: 64"),
        ("scores/fuzz/layers.1_latent3.txt", '{"a": 1}', "must hold a list of objects"),
        ("latents/layers.1/0_31.safetensors", "x", "must hold `locations`, `activations` and `tokens`"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path: Path, file: str, text: str, told: str) -> None:
    folder = write_delphi(tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=told):
        read_delphi(folder, n_features=64)


def test_neuronpedias_folder_is_not_delphis(tmp_path: Path) -> None:
    assert not is_delphi(write_bulk(tmp_path / "bulk"))
