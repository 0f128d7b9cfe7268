"""AutoModel, causal language model and classifier read one checkpoint, and answer as the base's own heads do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from sae_transformers import FeatureEdit, SaeConfig, SaeForCausalLM, SaeForSequenceClassification, SaeModel, Steering
from tests.covering import covering
from tests.tiny import prompt, tiny_base, tiny_sae

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "opt", "gemma2", "phi")
HEADS = {"body": SaeModel, "lm": SaeForCausalLM, "classifier": SaeForSequenceClassification}
STEERING = Steering([FeatureEdit(feature=3, op="set", value=8.0)])
LABELS = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
ATTENTION = {
    "none": None,
    "right": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
    "left": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def make(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        tiny_base(architecture).save_pretrained(folder / "base")
        for scope in ("full", "sae"):
            model = SaeForCausalLM.from_base(str(folder / "base"), tiny_sae(layer=1, concepts={"good": 3}))
            model.config.weights_scope = scope
            model.save_pretrained(folder / scope)
        return folder

    return make


@pytest.fixture(params=ARCHITECTURES)
def saved(request: pytest.FixtureRequest, made: Callable[[str], Path]) -> Path:
    """`base`, `sae`, and `full`, a causal language model with its base inside."""
    return made(request.param)


def saved_with(name: str, values: Iterable[Any], *others: Iterable[Any]) -> Any:
    """Each architecture once, and each of the values, in the fast tests."""
    names = ["saved", *name.split()]
    return pytest.mark.parametrize(names, covering(ARCHITECTURES, values, *others), indirect=["saved"])


def inputs(padding: str = "none") -> dict[str, torch.Tensor]:
    mask, ids = ATTENTION[padding], prompt()
    if mask is None:
        return {"input_ids": ids}
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


@torch.no_grad()
@saved_with("padding", ATTENTION)
def test_one_checkpoint_for_all_heads(saved: Path, padding: str) -> None:
    expected = AutoModel.from_pretrained(saved / "base")(**inputs(padding), output_hidden_states=True)
    for name, head in HEADS.items():
        model, info = head.from_pretrained(str(saved / "full"), output_loading_info=True)
        missing = {"lm.score.weight"} if name == "classifier" else set()
        assert set(info["missing_keys"]) == missing and not info["unexpected_keys"], name
        states = model(**inputs(padding), output_hidden_states=True).hidden_states
        assert len(states) == len(expected.hidden_states)
        for ours, theirs in zip(states, expected.hidden_states, strict=True):
            assert torch.equal(ours, theirs), name
    body = SaeModel.from_pretrained(str(saved / "full"))(**inputs(padding))
    assert torch.equal(body.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_the_language_model_and_the_adapter_answer_as_the_base(saved: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    expected = base(**inputs("left"), labels=inputs("left")["input_ids"])
    for scope in ("full", "sae"):
        out = SaeForCausalLM.from_pretrained(str(saved / scope))(**inputs("left"), labels=inputs("left")["input_ids"])
        assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
        body = SaeModel.from_pretrained(str(saved / scope))(**inputs("left"))
        assert torch.equal(body.last_hidden_state, base(**inputs("left"), output_hidden_states=True).hidden_states[-1])


PROBLEMS = {
    "single_label_classification": torch.tensor([2, 0]),
    "multi_label_classification": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
    "regression": torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, 0.25]]),
}


@torch.no_grad()
@saved_with("problem padding", PROBLEMS, ["right", "left"])
def test_the_classifier_answers_as_the_bases_own(saved: Path, tmp_path: Path, problem: str, padding: str) -> None:
    torch.manual_seed(7)
    base = AutoModelForSequenceClassification.from_pretrained(saved / "base", problem_type=problem, **LABELS)
    expected = base(**inputs(padding), labels=PROBLEMS[problem])
    model = SaeForSequenceClassification.from_base(base, tiny_sae(layer=1))
    model.config.base_model_name_or_path = str(saved / "base")
    for scope in ("sae", "full"):
        model.config.weights_scope = scope
        model.save_pretrained(tmp_path / scope)
        loaded, info = SaeForSequenceClassification.from_pretrained(str(tmp_path / scope), output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.equal(loaded.lm.score.weight, base.score.weight)
        assert loaded.config.problem_type == loaded.lm.config.problem_type == problem
        assert loaded.config.num_labels == loaded.lm.config.num_labels == loaded.num_labels == 3
        assert loaded.config.id2label == LABELS["id2label"] and loaded.config.label2id == LABELS["label2id"]
        for one in (model, loaded):
            out = one(**inputs(padding), labels=PROBLEMS[problem])
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.loss, expected.loss) and torch.equal(out.lm_loss, expected.loss)


def test_a_language_models_adapter_as_a_classifier_warns_of_its_new_head(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"no trained head \(lm.score.weight\): it is new and needs training"):
        model = SaeForSequenceClassification.from_pretrained(str(saved / "sae"), num_labels=5)
    assert model(prompt()).logits.shape == (2, 5)
    assert model.config.num_labels == model.num_labels == 5
    assert bool(torch.isfinite(model.lm.score.weight).all()) and bool(model.lm.score.weight.any())


@torch.no_grad()
@saved_with("name", HEADS)
def test_steering_and_detection_on_every_head(saved: Path, name: str) -> None:
    model = HEADS[name].from_pretrained(str(saved / "full"))
    scores = {}
    for steering in (False, STEERING):
        out = model(**inputs("left"), steering=steering, output_hidden_states=True, output_features=True)
        scores[steering is STEERING] = out.hidden_states
        assert out.sae_features[0].indices.shape == (2, 9, 8)
    plain, steered = scores[False], scores[True]
    assert torch.equal(plain[1], steered[1])
    real = inputs("left")["attention_mask"].bool()
    assert not torch.equal(plain[2][real], steered[2][real])
    # Every head sees the same: the hidden state after the SAE is that of the language model.
    language_model = SaeForCausalLM.from_pretrained(str(saved / "full"))
    expected = language_model(**inputs("left"), steering=STEERING, output_hidden_states=True).hidden_states
    assert torch.equal(steered[2], expected[2])
    found = model.detect(inputs("left"), feature="good", pre_activations=True, skip_first=0)
    told = language_model.detect(inputs("left"), feature=3, pre_activations=True, skip_first=0)
    assert torch.equal(found.per_token, told.per_token) and torch.equal(found.per_text, told.per_text)
    with model.steered(STEERING):
        inside = model(**inputs("left"), output_hidden_states=True).hidden_states
    assert torch.equal(inside[2], steered[2])
    stopped = model(**inputs("left"), features=["good"], stop_at_last_sae=True)
    assert stopped.sae_features[0].shape == (2, 9, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@saved_with("head", [SaeForCausalLM, SaeForSequenceClassification, SaeModel])
def test_a_plain_base_checkpoint_loads_and_its_saes_are_new(saved: Path, head, dtype: torch.dtype) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved / "base", dtype=dtype)
    entries = [tiny_sae(layer=1).config, tiny_sae(layer=0, activation="jumprelu", site="mlp_out").config]
    config = SaeConfig(text_config=base.config, saes=entries, weights_scope="full")
    model, info = head.from_pretrained(str(saved / "base"), config=config, dtype=dtype, output_loading_info=True)
    saes = {f"saes.{n}.{key}" for n, sae in enumerate(model.saes) for key in sae.state_dict()}
    assert set(info["missing_keys"]) - {"lm.score.weight"} == saes
    assert not info["unexpected_keys"]
    for sae in model.saes:
        assert sae.dtype == torch.float32
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
        assert torch.equal(sae.W_enc, sae.W_dec.T)
        assert not sae.b_enc.any() and not sae.b_dec.any() and not sae.feature_max.any()
    assert bool((model.saes[1].threshold == 1e-3).all())
    assert not torch.equal(model.saes[0].W_dec, model.saes[1].W_dec)
    if head is SaeForCausalLM:
        with torch.no_grad():
            assert torch.equal(model(prompt()).logits, base(prompt()).logits)


def test_num_labels_alone_is_kept_by_a_classifier(saved: Path, tmp_path: Path) -> None:
    model = SaeForSequenceClassification.from_base(str(saved / "base"), tiny_sae(layer=1), num_labels=4)
    model.save_pretrained(tmp_path)
    again = SaeForSequenceClassification.from_pretrained(str(tmp_path))
    assert again.config.num_labels == again.num_labels == 4
    assert torch.equal(again(prompt()).logits, model(prompt()).logits)
    automatic = AutoModelForSequenceClassification.from_pretrained(str(tmp_path))
    assert type(automatic) is SaeForSequenceClassification
    assert torch.equal(automatic(prompt()).logits, model(prompt()).logits)
