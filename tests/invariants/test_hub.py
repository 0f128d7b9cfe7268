"""Published over HTTP with the real client, then loaded by repository id where the library cannot be imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from sae_transformers.modeling.configuration_sae import AUTO_MAP
from tests.invariants import published
from tests.loopback_hub import LoopbackHub

pytestmark = pytest.mark.hub  # twenty seconds and more in two other interpreters

CHECKOUT = Path(published.__file__).parents[2]
SCOPES = ("sae", "full")
ANSWERS = ("logits", "hidden", "features", "detected", "tokens_none", "tokens_default", "tokens_pipeline")


class Traffic(NamedTuple):
    hub: LoopbackHub
    folder: Path
    pushed: dict[str, Any]
    expected: dict[str, torch.Tensor]
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traffic]:
    """One process pushes, another without the library loads; each with a cache of its own."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as hub:
        env = hub.environment(folder / "author") | {"PYTHONPATH": str(CHECKOUT)}
        published.run_script("push_repositories.py", folder, folder=folder, env=env)
        tagged = {"revision": "v1", "code_revision": "v1"}
        repositories: dict[str, dict] = {}
        for scope in SCOPES:
            name = f"tester/{scope}"
            again = {"push_again": f"tester/{scope}_again"}
            repositories[scope] = {"repository": name, "options": tagged}
            repositories[f"{scope}_main"] = {"repository": name, **again}
            repositories[f"{scope}_classifier"] = {"repository": f"{name}_classifier", "classifier": True}
        env = {k: v for k, v in hub.environment(folder / "user").items() if k != "PYTHONPATH"}
        facts, tensors = published.load_repositories(repositories, folder / "out", env)
        pushed = json.loads((folder / "pushed.json").read_text())
        yield Traffic(hub, folder, pushed, load_file(folder / "answers.safetensors"), facts, tensors)


@pytest.fixture(params=SCOPES)
def scope(request: pytest.FixtureRequest) -> str:
    return request.param


def files(traffic: Traffic, name: str, revision: str = "main") -> dict[str, bytes]:
    return traffic.hub.repo("models", f"tester/{name}").resolve(revision).files


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_tag_gives_the_tagged_models_answers(traffic: Traffic, scope: str, answer: str) -> None:
    assert torch.equal(traffic.tensors[f"{scope}.{answer}"], traffic.expected[f"{scope}.{answer}"])


@pytest.mark.parametrize("answer", ANSWERS)
def test_without_revision_the_latest_answers(traffic: Traffic, scope: str, answer: str) -> None:
    assert torch.equal(traffic.tensors[f"{scope}_main.{answer}"], traffic.expected[f"{scope}_main.{answer}"])


def test_tag_and_main_are_different_models(traffic: Traffic, scope: str) -> None:
    assert not torch.equal(traffic.expected[f"{scope}.features"], traffic.expected[f"{scope}_main.features"])


@pytest.mark.parametrize("answer", ["logits", "steered", "logits_again"])
def test_the_classifier(traffic: Traffic, scope: str, answer: str) -> None:
    expected = traffic.expected[f"{scope}_classifier.{answer.removesuffix('_again')}"]
    assert torch.equal(traffic.tensors[f"{scope}_classifier.{answer}"], expected)


def test_all_of_it_is_remote_code(traffic: Traffic, scope: str) -> None:
    assert traffic.facts["library_modules"] == []
    for name in (scope, f"{scope}_main"):
        assert traffic.facts[name]["pipeline_class"] == "transformers_modules:SaeForCausalLM"
        assert set(c.partition(":")[0] for c in traffic.facts[name]["classes"]) == {"transformers_modules"}
        assert "trust_remote_code=True" in traffic.facts[name]["refused"]


def test_the_base_stays_the_one_the_saes_were_made_for(traffic: Traffic) -> None:
    """Main of the base has other weights now; the adapter's logits are still those of the commit it names."""
    config = json.loads(files(traffic, "sae")["config.json"])
    assert config["base_model_name_or_path"] == "tester/base"
    assert config["base_model_revision"] == traffic.pushed["base_commit"] != traffic.pushed["base_commit_later"]
    assert traffic.hub.repo("models", "tester/base").resolve("main").id == traffic.pushed["base_commit_later"]
    assert torch.equal(traffic.tensors["sae_main.logits"], traffic.expected["full.logits"])


@pytest.mark.parametrize("name", ["sae", "full", "sae_classifier", "full_classifier", "saved", "sae_again"])
def test_what_is_pushed(traffic: Traffic, name: str) -> None:
    held = files(traffic, name)
    config = json.loads(held["config.json"])
    assert config["auto_map"] == AUTO_MAP
    code = {path.name for path in (CHECKOUT / "sae_transformers" / "modeling").glob("*.py")} - {"__init__.py"}
    assert set(held) >= code | {"README.md", "model.safetensors"}
    card = held["README.md"].decode()
    assert "base_model: tester/base" in card and "sparse autoencoder(s) in its forward pass" in card
    assert f'from_pretrained("tester/{name}", trust_remote_code=True)' in card
    assert not any(path.endswith((".bin", ".pt", ".pth", ".pkl", ".part")) for path in held)
    for path, content in held.items():
        assert str(traffic.folder).encode() not in content and str(CHECKOUT).encode() not in content, path
        assert b"/tmp" not in content, path


@pytest.mark.parametrize("name", ["sae", "full", "saved", "sae_again"])
def test_the_generation_configs_steering_survives(traffic: Traffic, name: str) -> None:
    assert json.loads(files(traffic, name)["generation_config.json"])["sae_steering"] == published.DEFAULT.to_dict()


def test_save_pretrained_can_push_and_says_what_it_is_told(traffic: Traffic) -> None:
    held = files(traffic, "saved")
    for path in (traffic.folder / "local").iterdir():
        assert held.get(path.name) == (None if path.suffix == ".pt" else path.read_bytes())
    history = [commit.title for commit in traffic.hub.repo("models", "tester/saved").history("main")]
    assert history[0] == "by saving"
    history = [commit.title for commit in traffic.hub.repo("models", "tester/sae").history("main")]
    assert "first weights" in history


def test_remote_code_pushes_again_and_loads_again(traffic: Traffic, scope: str) -> None:
    assert torch.equal(traffic.tensors[f"{scope}_main.logits_pushed"], traffic.expected[f"{scope}_main.logits"])
    assert torch.equal(traffic.tensors[f"{scope}_main.logits_again"], traffic.expected[f"{scope}_main.logits"])


def test_no_transfer_but_plain_http(traffic: Traffic) -> None:
    assert not any("xet" in request or "lfs" in request for request in traffic.hub.requests)
    assert not any("pytorch_model.bin" in request and request.startswith("GET") for request in traffic.hub.requests)
