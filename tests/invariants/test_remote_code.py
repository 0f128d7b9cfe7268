"""A saved folder works where the library is not installed: every Auto class, pipelines, steering, saving again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sae_transformers.modeling.configuration_sae import AUTO_MAP
from tests.invariants import published
from tests.tiny import prompt, tiny_base

SCOPES = ("sae", "full")
CODE = {
    path.name
    for path in (Path(published.__file__).parents[2] / "sae_transformers" / "modeling").glob("*.py")
    if path.name != "__init__.py"
}


class Loaded(NamedTuple):
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    folder: Path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Saved here, loaded in another interpreter without the library: all repositories in one run."""
    folder = tmp_path_factory.mktemp("published")
    base = folder / "base"
    tiny_base().save_pretrained(base)
    published.tokenizer().save_pretrained(base)
    expected, repositories = {}, {}
    for scope in SCOPES:
        model = published.language_model(str(base), scope).eval()
        model.save_pretrained(folder / scope)
        found = {scope: published.language_model_answers(model, prompt())}
        head = published.classifier(str(base), scope).eval()
        head.save_pretrained(folder / f"{scope}_classifier")
        found[f"{scope}_classifier"] = published.classifier_answers(head, prompt())
        for name, answers in found.items():
            published.tokenizer().save_pretrained(folder / name)
            repositories[name] = {"repository": str(folder / name), "classifier": "classifier" in name}
            expected.update({f"{name}.{key}": value for key, value in answers.items()})
    out = folder / "out"
    facts, tensors = published.load_repositories(repositories, out, published.clean_environment(folder / "home"))
    return Loaded(facts, tensors, expected, folder)


@pytest.fixture(params=SCOPES)
def scope(request: pytest.FixtureRequest) -> str:
    return request.param


def test_nothing_of_the_library_was_imported(loaded: Loaded) -> None:
    assert loaded.facts["library_modules"] == []


def test_the_classes_come_from_the_repository(loaded: Loaded, scope: str) -> None:
    names = ["SaeConfig", "SaeForCausalLM", "SaeConfig", "Steering"]
    assert loaded.facts[scope]["classes"] == [f"transformers_modules:{name}" for name in names]
    assert loaded.facts[scope]["pipeline_class"] == "transformers_modules:SaeForCausalLM"
    assert loaded.facts[f"{scope}_classifier"]["pipeline_class"] == "transformers_modules:SaeForSequenceClassification"
    assert loaded.facts[scope]["training"] is False


@pytest.mark.parametrize(
    "answer", ["logits", "features", "detected", "gradient", "hidden", "tokens_none", "tokens_default"]
)
def test_the_answers_are_the_originals(loaded: Loaded, scope: str, answer: str) -> None:
    assert torch.equal(loaded.tensors[f"{scope}.{answer}"], loaded.expected[f"{scope}.{answer}"])


@pytest.mark.parametrize("form", ["object", "dict", "json"])
def test_steering_in_generate_by_objects_of_the_loaded_code_and_by_json(loaded: Loaded, scope: str, form: str) -> None:
    steered = loaded.expected[f"{scope}.tokens_steered"]
    assert torch.equal(loaded.tensors[f"{scope}.tokens_{form}"], steered)
    assert not torch.equal(steered, loaded.expected[f"{scope}.tokens_none"])


@pytest.mark.parametrize("name", published.MORE)
def test_all_that_steering_can_say(loaded: Loaded, scope: str, name: str) -> None:
    steered = loaded.expected[f"{scope}.tokens_{name}"]
    assert torch.equal(loaded.tensors[f"{scope}.tokens_{name}"], steered)
    assert not torch.equal(steered, loaded.expected[f"{scope}.tokens_none"])


def test_the_generation_configs_steering_survives_and_applies(loaded: Loaded, scope: str) -> None:
    assert loaded.facts[scope]["generation_config"] == published.DEFAULT.to_dict()
    assert loaded.facts[scope]["generation_config"]["receipt"] == published.RECEIPT
    assert not torch.equal(loaded.expected[f"{scope}.tokens_default"], loaded.expected[f"{scope}.tokens_none"])


@pytest.mark.parametrize("answer", ["tokens_pipeline", "tokens_pipeline_steered"])
def test_the_text_generation_pipeline_gives_the_same_tokens(loaded: Loaded, scope: str, answer: str) -> None:
    assert torch.equal(loaded.tensors[f"{scope}.{answer}"], loaded.expected[f"{scope}.{answer}"])


def test_the_classifier_and_its_pipeline(loaded: Loaded, scope: str) -> None:
    name = f"{scope}_classifier"
    for answer in ("logits", "steered"):
        assert torch.equal(loaded.tensors[f"{name}.{answer}"], loaded.expected[f"{name}.{answer}"])
    assert not torch.equal(loaded.expected[f"{name}.logits"], loaded.expected[f"{name}.steered"])
    assert loaded.facts[name]["labels"] == [3, "fine"]
    scores = loaded.expected[f"{name}.logits"][0].softmax(-1)
    found = [loaded.facts[name]["scores"][label] for label in ("bad", "fine", "good")]
    assert found == pytest.approx(scores.tolist(), abs=1e-5)


def test_a_language_model_becomes_a_classifier_and_a_config_a_model(loaded: Loaded, scope: str) -> None:
    assert loaded.facts[scope]["new_head"] == [2, 3]
    assert loaded.facts[scope]["from_config"] == [2, 9, 99]


def test_saved_again_by_remote_code_it_is_complete_and_loads_again(loaded: Loaded, scope: str) -> None:
    for name in (scope, f"{scope}_classifier"):
        files = set(loaded.facts[name]["files"])
        assert files >= CODE | {"README.md", "config.json", "model.safetensors"}
        assert ("generation_config.json" in files) == (name == scope)
        assert torch.equal(loaded.tensors[f"{name}.logits_again"], loaded.expected[f"{name}.logits"])
    assert loaded.facts[scope]["auto_map"] == AUTO_MAP
    assert torch.equal(loaded.tensors[f"{scope}.hidden_again"], loaded.expected[f"{scope}.hidden"])


def test_without_consent_it_is_refused(loaded: Loaded, scope: str) -> None:
    for key in ("refused", "refused_unasked"):
        assert "trust_remote_code=True" in loaded.facts[scope][key]


def test_an_adapter_sized_repository_holds_the_saes_and_the_way_to_its_base(loaded: Loaded) -> None:
    config = json.loads((loaded.folder / "sae" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(loaded.folder / "base")
    sizes = {s: (loaded.folder / s / "model.safetensors").stat().st_size for s in SCOPES}
    base = (loaded.folder / "base" / "model.safetensors").stat().st_size
    assert sizes["full"] - sizes["sae"] > 0.9 * base


def test_published_code_is_the_librarys_own_file_for_file(loaded: Loaded, scope: str) -> None:
    source = Path(published.__file__).parents[2] / "sae_transformers" / "modeling"
    for name in CODE:
        assert (loaded.folder / scope / name).read_text() == (source / name).read_text()
