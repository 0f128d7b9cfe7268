"""Annotations beside SAEs: read when asked for, kept by saving, their descriptions as names of features."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import FeatureAnnotations, FeatureEdit, Gate, SaeForCausalLM, SparseAutoencoder, Steering
from sae_transformers.modeling.stored_annotations import annotations_file
from tests.invariants.published import clean_environment
from tests.tiny import prompt, tiny_base, tiny_sae

MEANT, WATER = "remarks that mean the opposite", "rivers"
NOTES = FeatureAnnotations.from_rows(
    [
        {"feature": 7, "description": MEANT}, {"feature": 9, "description": WATER},
        {"feature": 11, "description": WATER},
        {"feature": 3, "description": "the good"}, {"feature": 20, "description": "jokes and jests"},
    ]
)  # fmt: skip
OTHER = FeatureAnnotations.from_rows([{"feature": 0, "description": "trees"}])


def annotated(notes: Any = NOTES, **fields: Any) -> SparseAutoencoder:
    sae = tiny_sae(**{"layer": 1, "k": 4, "concepts": {"good": 3}, **fields})
    sae.annotations = notes
    return sae


def two(tmp_path: Path) -> SaeForCausalLM:
    tiny_base().save_pretrained(tmp_path / "base")
    return SaeForCausalLM.from_base(str(tmp_path / "base"), [annotated(), annotated(OTHER, layer=0, seed=2)]).eval()


def test_an_sae_keeps_its_annotations(tmp_path: Path) -> None:
    annotated().save_pretrained(tmp_path)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert "descriptions beside it" in repr(sae)
    assert sae.annotations.description(7) == MEANT and "5 described" in repr(sae)
    again = tmp_path / "again"
    SparseAutoencoder.from_pretrained(tmp_path).save_pretrained(again)  # not read: copied
    assert (again / annotations_file()).read_bytes() == (tmp_path / annotations_file()).read_bytes()
    SparseAutoencoder.from_pretrained(tmp_path).save_pretrained(tmp_path)  # onto itself
    assert FeatureAnnotations.load(tmp_path / annotations_file()).description(7) == MEANT
    sae.annotations = None
    sae.save_pretrained(tmp_path)
    assert not (tmp_path / annotations_file()).exists() and "described" not in repr(sae)


@pytest.mark.parametrize("scope", ["sae", "full"])
def test_a_model_keeps_those_of_each_sae(tmp_path: Path, scope: str) -> None:
    model = two(tmp_path)
    model.config.weights_scope = scope
    model.save_pretrained(tmp_path / "model")
    assert "annotations" not in (tmp_path / "model" / "config.json").read_text()
    back = SaeForCausalLM.from_pretrained(tmp_path / "model")
    assert [back.saes[n].annotations.description(f) for n, f in ((0, 7), (1, 0))] == [MEANT, "trees"]
    assert SparseAutoencoder.from_pretrained(tmp_path / "model" / "1").annotations.description(0) == "trees"
    back.saes[1].annotations = None
    back.save_pretrained(tmp_path / "model")
    assert (
        not (tmp_path / "model" / annotations_file(1)).exists() and (tmp_path / "model" / annotations_file()).exists()
    )


def test_a_whole_description_names_its_feature(tmp_path: Path) -> None:
    model = two(tmp_path)
    ids = prompt()
    named = model.generate(ids, steering=Steering([FeatureEdit(0, MEANT, "set", 9.0)]), max_new_tokens=6)
    numbered = model.generate(ids, steering=Steering([FeatureEdit(0, 7, "set", 9.0)]), max_new_tokens=6)
    assert torch.equal(named, numbered) and not torch.equal(named, model.generate(ids, max_new_tokens=6))
    assert torch.equal(model.detect(ids, feature=MEANT).per_text, model.detect(ids, feature=7).per_text)
    assert model.config.sae_configs[1].resolve_feature("Trees ") == 0
    assert model.config.sae_configs[0].resolve_feature("good") == 3
    gated = Steering([FeatureEdit(0, MEANT, "add", 9.0)], when=Gate(feature="the good", above=0.0))
    model.prepare_steering(gated)


def test_ambiguity_and_near_misses_are_told_with_the_candidates(tmp_path: Path) -> None:
    model = two(tmp_path)
    with pytest.raises(ValueError, match="Features 9, 11 of this SAE have that name: give one's number"):
        model.prepare_steering(Steering([FeatureEdit(0, WATER, "ablate")]))
    with pytest.raises(ValueError, match=f"described like it are 7 '{MEANT}'.*feature='the opposite remark'"):
        model.prepare_steering(Steering([FeatureEdit(0, "the opposite remark", "ablate")]))
    with pytest.raises(ValueError, match="it has 'good'. Received: feature='xyzzy'"):
        model.prepare_steering(Steering([FeatureEdit(0, "xyzzy", "ablate")]))
    many = FeatureAnnotations.from_rows([{"feature": n, "description": "same"} for n in range(60)])
    with pytest.raises(ValueError, match=r"Features 0, 1, .*, 19, \.\.\. of this SAE"):
        annotated(many).config.resolve_feature("same")


def test_annotations_given_later_count_and_copies_have_them(tmp_path: Path) -> None:
    model = two(tmp_path)
    model.saes[1].annotations = NOTES
    assert model.config.sae_configs[1].resolve_feature(MEANT) == 7
    twin = copy.deepcopy(model)
    twin.saes[0].annotations = None
    assert twin.config.sae_configs[0].annotations is None and model.config.sae_configs[0].annotations is NOTES
    assert copy.deepcopy(model.config) == model.config
    assert pickle.loads(pickle.dumps(model.config)).sae_configs[0].annotations.description(7) == MEANT


def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    annotated().save_pretrained(tmp_path)
    (tmp_path / annotations_file()).write_bytes(b"PAR1 no table PAR1")
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"annotations\.parquet is no Parquet file"):
        _ = sae.annotations
    assert sae.config.resolve_feature("good") == 3


WITHOUT_THE_LIBRARY = """
import json, sys

sys.modules["sae_transformers"] = None  # as if it was not installed
import torch
from transformers import AutoModelForCausalLM

folder, out, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = model.generate(ids, max_new_tokens=6)
model.save_pretrained(out)
print(json.dumps({
    "library": [name for name, one in sys.modules.items() if name.split(".")[0] == "sae_transformers" and one],
    "tokens": tokens.tolist(), "none": model.generate(ids, max_new_tokens=6, steering=False).tolist(),
    "annotations": model.saes[0].annotations is None, "shown": repr(model.saes[0]),
}))
"""


@pytest.mark.slow  # an interpreter of its own
def test_published_code_works_without_the_library_and_carries_the_file_along(tmp_path: Path) -> None:
    model = two(tmp_path)
    model.steering = Steering([FeatureEdit(0, MEANT, "set", 9.0), FeatureEdit(0, "good", "add", 2.0)])
    expected = model.generate(prompt(), max_new_tokens=6)
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["saes"][0]["feature_names"] == {"7": MEANT} and "feature_names" not in config["saes"][1]
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), json.dumps(prompt().tolist())]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_LIBRARY, *arguments], env=clean_environment(tmp_path / "home"),
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["library"] == [] and seen["annotations"] and "descriptions beside it" in seen["shown"]
    assert seen["tokens"] == expected.tolist() != seen["none"]
    for number in range(2):
        name = annotations_file(number)
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_name_of_the_steering_that_is_taken_becomes_a_number(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    model = SaeForCausalLM.from_base(str(tmp_path / "base"), [annotated(feature_names={"7": "irony"})])
    model.steering = Steering([FeatureEdit(0, MEANT, "set", 9.0)])
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["saes"][0]["feature_names"] == {"7": "irony"} and config["steering"]["edits"][0]["feature"] == 7
    assert SaeForCausalLM.from_pretrained(tmp_path / "model").steering
