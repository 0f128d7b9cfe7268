"""A selection from a published cache: without a model, with one, and with the values learnt from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_transformers import SelectKnowledgeSettings, Steering, load, select_knowledge, select_published_knowledge
from sae_transformers.workflows.loading import Loaded
from sae_transformers.workflows.settings.select_knowledge import (
    BASELINES,
    FeatureSelectionSettings,
    PublishedKnowledgeSettings,
    QuestionSplitSettings,
    knowledge_config,
)
from sae_transformers.workflows.steering.knowledge import answers as answers_module
from sae_transformers.workflows.steering.knowledge import learning as learning_module
from sae_transformers.workflows.steering.knowledge.baselines.registry import METHODS
from sae_transformers.workflows.steering.select_knowledge import SelectKnowledgeResult
from tests.conflict_questions import write_selection_files
from tests.training.steering.test_published_features import write_cache, write_scores

ONE = FeatureSelectionSettings(proportions=(0.85,), strengths=(2.0,), legacy=True)
SETTINGS = SelectKnowledgeSettings(
    QuestionSplitSettings(test=3, dev=0, pool=20, shots=1, seeds=(1,)),
    FeatureSelectionSettings(proportions=(0.3,), strengths=(2.0,)),
    baselines=(),
)


def published(folder: Path, *layers: int, **more: object) -> SelectKnowledgeSettings:
    source = PublishedKnowledgeSettings(features=str(folder), feature_layers=layers)
    return SelectKnowledgeSettings(selection=ONE, published=source, **more)  # pyright: ignore[reportArgumentType]


def test_without_a_model(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", (3, 12))
    result = select_published_knowledge(published(tmp_path / "cache", 12, 3))
    assert [(one.sae, one.published.layer) for one in result.layers] == [(0, 12), (1, 3)]
    assert result.summary()[-1] == "to memory: proportion 0.85, strength 2; 8 edits"
    result.save(tmp_path / "out")
    steering = Steering.from_json((tmp_path / "out/towards-context.json").read_text())
    edits = {(edit.sae, edit.feature): (edit.op, edit.value) for edit in steering.feature_edits}
    assert edits[0, 3] == ("at_least", pytest.approx(2 * 2.1)) and edits[0, 1] == ("shrink", pytest.approx(2 * 1.1))
    assert steering.positions == "last_prompt"
    rows = json.loads((tmp_path / "out/selected.json").read_text())
    assert len(rows) == 8 and rows[0] == {
        "sae": 0, "layer": 12, "side": "context", "feature": 0, "information": 12.5, "expectation": 1.0,
    }  # fmt: skip
    assert (tmp_path / "out/features-1.safetensors").exists()


def test_scores_alone_are_a_selection_and_no_steering(tmp_path: Path) -> None:
    write_scores(tmp_path / "cache/layer7/mutual_information.pt")
    result = select_published_knowledge(published(tmp_path / "cache"))
    assert not result.steering and "with questions they are learnt from the model" in result.summary()[-1]
    assert [row["feature"] for row in result.rows()] == [0, 3, 1]
    result.save(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["results.json", "selected.json"]


def test_one_direction(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", (3,))
    result = select_published_knowledge(published(tmp_path / "cache", towards=("memory",)))
    assert list(result.steering) == ["memory"] and list(result.to_dict()["chosen"]) == ["memory"]


def test_what_cannot_be_selected_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected questions, or `features`"):
        select_published_knowledge(SelectKnowledgeSettings())
    write_cache(tmp_path / "cache", (3,))
    several = replace(published(tmp_path / "cache"), selection=FeatureSelectionSettings())
    with pytest.raises(ValueError, match="Received: 20 settings"):
        select_published_knowledge(several)
    with pytest.raises(ValueError, match=r"feature_layers=\(3,\) and no features"):
        PublishedKnowledgeSettings(feature_layers=(3,))
    with pytest.raises(ValueError, match=r"towards=\('both',\)"):
        SelectKnowledgeSettings(towards=("both",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_selection_files(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder / "base", str(folder / "sae1"))


@pytest.fixture(scope="module")
def learnt(folder: Path, loaded: Loaded) -> SelectKnowledgeResult:
    return select_knowledge(loaded.model, loaded.tokenizer, str(folder / "questions.jsonl"), SETTINGS)


def write_learnt(folder: Path, result: SelectKnowledgeResult, *, values: bool) -> None:
    """What a run found, as SpARE publishes it, with other functional values to tell them from learnt ones."""
    features, layer = result.features[0], folder / "layer1"
    layer.mkdir(parents=True)
    torch.save(
        {"mi_scores": features.mutual_information, "expectation": features.expectation},
        layer / "mutual_information.pt",
    )
    if values:
        torch.save(3 * features.values_a, layer / "use_context_weight.pt")
        torch.save(3 * features.values_b, layer / "use_parameter_weight.pt")


@pytest.mark.parametrize("values", [True, False])
def test_with_a_model(
    folder: Path, loaded: Loaded, learnt: SelectKnowledgeResult, tmp_path: Path, values: bool
) -> None:
    """Published values are taken as they are and nothing is asked for them; missing ones are learnt."""
    write_learnt(tmp_path, learnt, values=values)
    settings = replace(SETTINGS, published=PublishedKnowledgeSettings(features=str(tmp_path)))
    reports: list[tuple[int, int]] = []
    result = select_knowledge(
        loaded.model, loaded.tokenizer, str(folder / "questions.jsonl"), settings,
        progress=lambda done, total: reports.append((done, total)),
    )  # fmt: skip
    for side, steering in result.steering.items():
        expected = [(edit.feature, edit.op, edit.value) for edit in learnt.steering[side].feature_edits]
        found = [(edit.feature, edit.op, edit.value) for edit in steering.feature_edits]
        factor = 3 if values else 1
        assert found == [(feature, op, pytest.approx(factor * (value or 0))) for feature, op, value in expected]
    assert bool(result.learnt.grouped) is not values
    asked = 0 if values else 3 * (20 - 4)
    assert reports[-1] == (18 + asked, 18 + asked)


def test_a_cache_of_another_sae(folder: Path, loaded: Loaded, tmp_path: Path) -> None:
    write_cache(tmp_path, (1,))
    settings = replace(SETTINGS, published=PublishedKnowledgeSettings(features=str(tmp_path)))
    with pytest.raises(ValueError, match=r"1 SAEs, with \[\d+\] latents at the layers \[1\]. Received: .* with \[5\]"):
        select_knowledge(loaded.model, loaded.tokenizer, str(folder / "questions.jsonl"), settings)


@pytest.mark.parametrize(
    ("name", "layers", "towards", "proportion", "strength"),
    [
        ("spare-llama-2-7b", (12, 13, 14, 15), ("context", "memory"), 0.07, 2.0),
        ("spare-llama-3-8b", (13, 14, 15, 16), ("context", "memory"), 0.07, 2.0),
        ("spare-gemma-2-9b-context", (23, 24, 25, 26), ("context",), 0.01, 3.0),
        ("spare-gemma-2-9b-memory", (23, 24, 25, 29, 30, 31), ("memory",), 0.01, 1.8),
    ],
)
def test_published_settings(
    name: str, layers: tuple[int, ...], towards: tuple[str, ...], proportion: float, strength: float
) -> None:
    """Table 1.9 of the notes on SpARE's code: its scripts' own numbers."""
    config = knowledge_config(name)
    settings = SelectKnowledgeSettings.from_config(name, features="cache", test=7)
    assert settings.published.feature_layers == layers and settings.towards == towards
    assert (settings.selection.proportions, settings.selection.strengths) == ((proportion,), (strength,))
    assert settings.selection.legacy and settings.selection.activation == ("own" if "gemma" in name else "relu")
    assert settings.questions.test == 7 and settings.published.features == "cache"
    assert [str(layer) in sae for layer, sae in zip(layers, config["sae"], strict=True)] == [True] * len(layers)


def test_configs_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="spare-llama-2.* own configs are spare-gemma-2-9b-context, "):
        knowledge_config("spare-llama-2")
    file = tmp_path / "mine.yaml"
    for text, message in (
        ("proportion: [0.1]", "no setting 'proportion'; did you mean proportions"),
        ("- 1", "Received: list"),
        ("a: [", "is no YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            knowledge_config(file)
    with pytest.raises(ValueError, match="no setting 'model'"):
        SelectKnowledgeSettings.from_config("spare-llama-2-7b", model="mine")


def test_every_baseline_has_a_method() -> None:
    assert tuple(METHODS) == BASELINES


def test_one_direction_and_all_baselines(folder: Path, loaded: Loaded) -> None:
    settings = replace(SETTINGS, towards=("context",), baselines=BASELINES)
    hooks = [len(module._forward_hooks) for module in loaded.model.modules()]
    result = select_knowledge(loaded.model, loaded.tokenizer, str(folder / "questions.jsonl"), settings)
    names = ["demonstrations", "instruction", "CAD", "DoLa", "activation addition", "task vector", "SEA"]
    assert list(result.methods) == ["none", "SpARE, to context", *(f"{name}, to context" for name in names)]
    assert list(result.steering) == ["context"]
    assert [len(module._forward_hooks) for module in loaded.model.modules()] == hooks
    with pytest.raises(ValueError, match="`model` must be one of context. Received: model='memory'"):
        result.save(folder / "out", model="memory")


def test_learnt_again_from_its_own_grouped_prompts(
    folder: Path, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that a run writes gives its steering, and no prompt of the pool is answered again."""
    settings = replace(SETTINGS, selection=replace(SETTINGS.selection, weighting="loss"))
    questions = str(folder / "questions.jsonl")
    first = select_knowledge(loaded.model, loaded.tokenizer, questions, settings, out=tmp_path)
    (file,) = (tmp_path / "grouped_prompts").iterdir()
    assert file.name == "1shot-seed42-results.json" and len(json.loads(file.read_text())) == 3 * 16
    asked: list[int] = []
    keep = answers_module.short_answers
    monkeypatch.setattr(
        answers_module, "short_answers", lambda m, t, p, **o: asked.append(len(p)) or keep(m, t, p, **o)
    )
    monkeypatch.setattr(learning_module, "text_losses", None)  # they are in the file
    source = PublishedKnowledgeSettings(grouped=str(file))
    again = select_knowledge(loaded.model, loaded.tokenizer, questions, replace(settings, published=source))
    assert asked == [3, 3, 3]  # the test questions, unsteered and to both sides
    assert again.learnt.answered == first.learnt.answered
    for side, steering in again.steering.items():
        found, expected = (
            {(edit.feature, edit.op): edit.value for edit in one.feature_edits}
            for one in (steering, first.steering[side])
        )
        assert found == {key: pytest.approx(value, rel=1e-5) for key, value in expected.items()}
    pool = {row["item_idx"] for row in json.loads(file.read_text())}
    assert len(pool) == 16
