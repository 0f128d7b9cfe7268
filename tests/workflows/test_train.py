"""SAEs from texts, data frames and tensors in one call, as a harvest and a recipe give them; a concept by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset

from sae_transformers import (
    DetectSettings,
    FeatureEdit,
    HarvestSettings,
    SaeForCausalLM,
    SparseAutoencoder,
    Steering,
    TensorTokens,
    detect,
    harvest,
    train,
    train_concept,
    train_recipe,
)
from sae_transformers.workflows.train import TrainResult, recipe_options
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import WIDTH, prompt, tiny_base, tiny_sae

PLACE = "layers.1.resid_post"
TEXTS = word_texts(60)
SIZES = {"d_sae": 64, "k": 8}
RUN = {"per_device_train_batch_size": 64, "max_steps": 5, "learning_rate": 1e-3, "disable_tqdm": True, "use_cpu": True}
RUN |= {"aux_k": 8, "save_strategy": "no", "report_to": "none"}
HARVEST = HarvestSettings((PLACE,), max_length=16, dtype="float32")


def trained(data: Any, **options: Any) -> SparseAutoencoder:
    given = {"model": tiny_base(), "tokenizer": word_tokenizer(), "hook_point": PLACE, "harvest": HARVEST}
    return train(data, sae=SIZES, training=RUN, **{**given, **options}).sae


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    """Hidden states of the texts as they are packed and read, by hand."""
    tokenizer, base = word_tokenizer(), tiny_base()
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    ids: list[int] = []
    for row in rows:
        ids += [*row, tokenizer.eos_token_id]
    pieces = torch.tensor(ids[:-1]).split(16)
    with torch.no_grad():
        return torch.cat([base(piece[None], output_hidden_states=True).hidden_states[2][0, 1:] for piece in pieces])


@pytest.mark.parametrize("form", ["list", "dataset", "frame", "tensor", "tokens"])
def test_whatever_holds_the_data_the_same_sae_is_trained(form, hidden):
    data: Any = {
        "list": TEXTS, "dataset": Dataset.from_dict({"text": TEXTS}), "frame": pandas.DataFrame({"text": TEXTS}),
        "tensor": hidden, "tokens": TensorTokens({PLACE: hidden}),
    }[form]  # fmt: skip
    found, expected = trained(data), trained(TensorTokens({PLACE: hidden}))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert found.config.read_at == PLACE and found.config.d_in == WIDTH


def test_a_stream_of_texts_trains(hidden):
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    settings = HarvestSettings((PLACE,), max_length=16, dtype="float32", rows_per_shard=60)
    run = {**RUN, "per_device_train_batch_size": 64}
    result = train(
        stream, model=tiny_base(), tokenizer=word_tokenizer(), hook_point=PLACE, sae=SIZES, training=run,
        harvest=settings,
    )  # fmt: skip
    assert result.metrics["steps"] == 5 and result.sae.config.d_sae == 64


def test_the_typical_maximum_is_measured_and_can_be_steered_in(hidden, tmp_path, capsys):
    told = []
    report = lambda done, total: told.append((done, total))  # noqa: E731
    result = train(hidden, hook_point=PLACE, sae=SIZES, training=RUN, progress=report)
    assert told == [(step, 5) for step in range(1, 6)] and capsys.readouterr().out == ""
    sae = result.sae
    with torch.no_grad():
        expected = sae.encode(hidden).amax(0)
    torch.testing.assert_close(sae.feature_max, expected)
    result.save(tmp_path)
    assert (tmp_path / "metrics.json").is_file()
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.feature_max, sae.feature_max)
    model = SaeForCausalLM.from_base(tiny_base(), saes=[loaded])
    feature = int(expected.argmax())
    edits = [
        Steering([FeatureEdit(feature=feature, op="set", value=2.0, unit="max")]),
        Steering([FeatureEdit(feature=feature, op="set", value=2.0 * float(expected[feature]))]),
    ]
    first, second = (model(prompt(), steering=edit).logits for edit in edits)
    torch.testing.assert_close(first, second)
    never = 5
    model.saes[0].feature_max[never] = 0
    with pytest.raises(ValueError, match=f"feature {never}.*measure_feature_max"):
        model(prompt(), steering=Steering([FeatureEdit(feature=never, op="set", value=2.0, unit="max")]))


@pytest.mark.parametrize("activation", [{"activation": "jumprelu"}, {"activation": "abs_topk", "k": 4}])
def test_maxima_are_by_magnitude_over_all_parts(activation, hidden):
    sae = tiny_sae(layer=1, **activation)
    parts = [hidden[:100], hidden[100:]]
    found = sae.measure_feature_max(iter(parts), tokens_per_batch=7)
    torch.testing.assert_close(found, sae.encode(hidden).detach().abs().amax(0))
    with pytest.raises(ValueError, match="shape \\(9, 3\\)"):
        sae.measure_feature_max(torch.zeros(9, 3))
    with pytest.raises(ValueError, match="a token or more"):
        sae.measure_feature_max([])


def test_a_concept_from_labelled_texts_is_detected_and_steered_by_its_name():
    labels = [number % 2 for number in range(80)]
    texts = [f"w{50 + i % 7 if label else i % 7} w{20 + i % 5} w{30 + i % 3}" for i, label in enumerate(labels)]
    base, tokenizer = tiny_base(), word_tokenizer()
    told = []
    result = train_concept(
        base, tokenizer, texts, labels, "high", hook_point=PLACE, d_sae=64, k=8, steps=200, learning_rate=1e-2,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told[-1] == (200, 200) and result.sae.config.concepts == {"high": 0}
    model = SaeForCausalLM.from_base(base, saes=[result.sae])
    quality = detect(model, tokenizer, texts, "high", labels, DetectSettings(pre_activations=True)).quality()
    assert quality["auroc"] > 0.95
    steering = Steering([FeatureEdit(feature="high", op="direction", value=8.0)])
    assert not torch.equal(model(prompt(), steering=steering).logits, model(prompt()).logits)


def test_what_is_missing_is_said(hidden):
    with pytest.raises(ValueError, match="Texts need the base.*model=None"):
        train(TEXTS, hook_point=PLACE, sae=SIZES, training=RUN)
    with pytest.raises(ValueError, match="one place. Received: shape \\(2, 3, 4\\)"):
        train(torch.zeros(2, 3, 4), hook_point=PLACE, sae=SIZES, training=RUN)
    with pytest.raises(ValueError, match="a label for each of 60 texts"):
        train_concept(tiny_base(), word_tokenizer(), TEXTS, [1, 0], "x", hook_point=PLACE)
    with pytest.raises(TypeError, match="Expected texts"):
        trained(3.0)


def test_texts_without_a_number_need_a_number_of_steps(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    endless = {name: value for name, value in RUN.items() if name != "max_steps"}
    with pytest.raises(
        ValueError, match=r"`training=\{'max_steps': \.\.\.\}`.*Received: data=.*texts.txt.*max_steps=None"
    ):
        train(
            tmp_path / "texts.txt", model=tiny_base(), tokenizer=word_tokenizer(), hook_point=PLACE, sae=SIZES,
            training=endless, harvest=HARVEST,
        )  # fmt: skip
    assert trained(tmp_path / "texts.txt").config.d_sae == 64


def test_a_recipe_runs_as_the_command_runs_it(tmp_path: Path) -> None:
    harvest(tiny_base(), word_tokenizer(), word_texts(40), tmp_path / "states", HARVEST)
    flags = ["--data", str(tmp_path / "states"), "--layer", "1", "--d_sae", "64", "--k", "8", "--max_steps", "2"]
    flags += ["--per_device_train_batch_size", "64", "--report_to", "none", "--disable_tqdm", "true"]
    found = train_recipe("topk", [*flags, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"])
    assert found.sae.config.d_sae == 64 and found.recipe.data == str(tmp_path / "states")
    assert {"metric": "steps", "value": "2"} in found.rows() and "<table>" in found._repr_html_()
    assert (tmp_path / "out" / "config.json").is_file()
    assert "dead_after_tokens" in {name for name, *_ in recipe_options()}


@pytest.mark.parametrize("long", [{"max_steps": 4}, {"num_train_epochs": 2, "max_steps": -1}], ids=["steps", "epochs"])
def test_a_run_that_ended_and_is_resumed_takes_no_further_step(long: dict[str, Any], hidden, tmp_path: Path) -> None:
    def run(resume: bool, **more: Any) -> TrainResult:
        options = {"per_device_train_batch_size": 64, "save_strategy": "steps", "save_steps": 1, **long, **more}
        sae = {"d_sae": 16, "k": 2}
        return train(
            hidden, hook_point="layers.1.resid_post", sae=sae, training=options, output_dir=tmp_path, resume=resume
        )

    whole, again = run(False), run(True)
    steps = whole.metrics["steps"]
    assert again.metrics["steps"] == steps and again.metrics.keys() <= whole.metrics.keys()
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, again.sae.state_dict()[name]), name
    longer = run(True, **({"max_steps": steps + 1} if "num_train_epochs" not in long else {"num_train_epochs": 3}))
    assert longer.metrics["steps"] > steps
