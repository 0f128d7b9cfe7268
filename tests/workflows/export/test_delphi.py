"""delphi's layout: explanations, spans as cached activations, neighbours; and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sae_transformers import open_annotations
from sae_transformers.workflows.export.delphi import module_of
from sae_transformers.workflows.export.known import KnownFeatures
from sae_transformers.workflows.settings.dashboard import ExportSettings
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_sae
from tests.workflows.export.world import HOSTILE, Made, made

SETTINGS = ExportSettings("delphi")


@pytest.fixture(scope="module")
def world() -> Made:
    return made()


@pytest.fixture(scope="module")
def folder(world: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delphi")
    world.found.export(path, SETTINGS)
    return path


def test_explanations_one_each(folder: Path) -> None:
    found = {file.name: json.loads(file.read_text()) for file in (folder / "explanations").iterdir()}
    assert found == {
        "layers.1_latent3.txt": "remarks that mean the opposite", "layers.1_latent5.txt": HOSTILE,
        "layers.1_latent9.txt": "names of rivers",
    }  # fmt: skip


def test_spans_are_rows_of_tokens_with_the_activations_of_their_feature(world: Made, folder: Path) -> None:
    cached = load_file(folder / "latents" / "layers.1" / "0_63.safetensors")
    tokens, places, values = cached["tokens"], cached["locations"], cached["activations"]
    assert places.dtype == np.uint16 and values.dtype == np.float16 and tokens.dtype == np.int64
    assert len(tokens) == len(world.spans.span) and (values > 0).all()
    tokenizer: Any = word_tokenizer()
    page = world.found.page
    spans = [(feature, span) for feature in world.found.features for span in page.spans.get(feature, ())]
    for row, (feature, span) in enumerate(spans):
        text = tokenizer.decode(tokens[row], skip_special_tokens=True)
        assert text.split() == "".join(span.tokens).split()
        own = places[:, 0] == row
        assert set(places[own, 2].tolist()) == {feature}
        assert float(values[own].max()) == pytest.approx(span.score, rel=2e-3)
        peak = places[own][values[own].argmax(), 1]
        assert tokenizer.decode([tokens[row, peak]]).strip() == span.tokens[span.peak].strip()


def test_neighbours_and_config(world: Made, folder: Path) -> None:
    near = json.loads((folder / "neighbours" / "layers.1-decoder_similarity.json").read_text())
    assert len(near) == 64 and [tuple(pair) for pair in near["3"]] == list(world.found.page.neighbours[3])
    config = json.loads((folder / "latents" / "layers.1" / "config.json").read_text())
    assert config["model_name"] == "org/Tiny-Llama-it" and config["ctx_len"] > 1


def test_what_we_write_we_read(world: Made, folder: Path) -> None:
    notes, sae = open_annotations(folder, n_features=64), world.found.sae
    assert sae is not None and notes.description(9) == "names of rivers" and notes.facts["sae"] == "layers.1"
    active = sorted(set(world.spans.feature.tolist()))
    assert [notes.number("maximum", n) for n in active] == pytest.approx(sae.feature_max[active].tolist(), rel=2e-3)


def test_spans_without_a_tokenizer_are_refused(world: Made, tmp_path: Path) -> None:
    bare = world.found.__class__(**{**vars(world.found), "tokenizer": None})
    with pytest.raises(ValueError, match="need the base's fast tokenizer"):
        bare.export(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("place", "module"),
    [
        ({"layer": 3}, "layers.3"), ({"layer": 3, "site": "mlp_out"}, "layers.3.mlp"),
        ({"layer": 3, "site": "attn_out"}, "layers.3.attn"), ({"hook": "model.layers.3.mlp"}, "model.layers.3.mlp"),
        ({}, "sae"),
    ],
)  # fmt: skip
def test_places_have_delphis_names(world: Made, place: dict[str, Any], module: str) -> None:
    assert module_of(KnownFeatures(world.found.page, [], tiny_sae(k=4, **place))) == module
