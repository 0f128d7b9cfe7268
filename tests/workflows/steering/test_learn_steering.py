"""A learnt steering: that it learns, in every family and on several SAEs, that nothing else changes, and bad input."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from sae_transformers import Gate, LearnSteeringSettings, SaeForCausalLM, Steering, learn_steering
from sae_transformers.training.steering import code_training
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import ARCHITECTURES, tiny_base, tiny_sae

FEATURES = [3, (1, 5), "sea", (1, 2)]
TOKENIZER = word_tokenizer()


def new_model(architecture: str = "llama", **settings: Any) -> Any:
    first = tiny_sae(layer=1, site="resid_post", activation="relu", concepts={"sea": 9}, **settings)
    saes = [first, tiny_sae(seed=4, layer=2, site="resid_post")]
    return SaeForCausalLM.from_base(tiny_base(architecture), saes=saes)


def new_rows(n: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """Answers that are preferred are of the first words, the others of the last."""
    draw = random.Random(seed)
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(2, 5))),
            "chosen": " ".join(draw.choices(WORDS[:6], k=draw.randint(1, 4))),
            "rejected": " ".join(draw.choices(WORDS[-6:], k=draw.randint(1, 4))),
        }
        for _ in range(n)
    ]


QUICK = {"loss": "preference", "epochs": 12.0, "learning_rate": 0.05, "batch_size": 8, "save_steps": 4}


def learnt(model: Any, features: Any = FEATURES, rows: Any = None, **settings: Any) -> Any:
    options = {name: settings.pop(name) for name in ("scope", "folder", "progress") if name in settings}
    rows = new_rows() if rows is None else rows
    return learn_steering(model, TOKENIZER, rows, features, LearnSteeringSettings(**{**QUICK, **settings}), **options)


def values_of(steering: Steering) -> list[float]:
    return [edit.value or 0.0 for edit in steering.feature_edits if edit.op in ("direction", "add")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_learns_what_is_preferred_in_every_family(architecture):
    model, features = new_model(architecture), [(sae, latent) for sae in (0, 1) for latent in range(0, 64, 5)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = learnt(model, features, epochs=20.0)
    train, report = found.measures["train"], found.measures["report"]
    assert train["trained"].loss < train["unsteered"].loss - 0.01
    assert train["trained"].preferred > 0.8
    assert report["trained"].loss < report["unsteered"].loss
    assert (found.n_train, found.n_report, found.n_cut) == (19, 5, 0)
    assert {(e.sae, e.feature, e.op) for e in found.steering.feature_edits} == {
        (*one, "direction") for one in features
    }
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("form", ["direction", "code"])
def test_likely_answers_become_likelier(form):
    found = learnt(new_model(), list(range(0, 64, 3)), loss="likelihood", form=form, epochs=20.0)
    for part in ("train", "report"):
        assert found.measures[part]["trained"].loss < found.measures[part]["unsteered"].loss - 0.1
        assert found.measures[part]["trained"].preferred is None


def test_only_the_values_get_a_gradient(monkeypatch):
    model, seen = new_model(), []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained = dict(kwargs["model"].named_parameters())
            seen.append((list(trained), bool((trained["values"].grad != 0).all())))
            assert all(p.grad is None and not p.requires_grad for p in model.parameters())

    whole = code_training.train_code

    def watched(*args: Any, **options: Any) -> Any:
        return whole(*args, callbacks=[Watch()], **options)

    monkeypatch.setattr("sae_transformers.workflows.steering.learn_steering.train_code", watched)
    learnt(model)
    assert seen == [(["values"], True)] * 36


@pytest.mark.parametrize("form", ["direction", "code"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, form):
    rows = new_rows()
    whole = learnt(new_model(), rows=rows, form=form, l1=0.01)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 36
        if done == 14:
            raise Stopped

    folder = tmp_path / "learnt"
    with pytest.raises(Stopped):
        learnt(new_model(), rows=rows, form=form, l1=0.01, folder=folder, progress=stop)
    steps: list[int] = []
    torch.manual_seed(99)
    found = learnt(
        new_model(), rows=rows, form=form, l1=0.01, folder=folder, progress=lambda done, _: steps.append(done)
    )
    assert steps[0] == 13  # after the checkpoint of step 12
    assert values_of(found.steering) == values_of(whole.steering)
    assert found.measures == whole.measures and found.history == whole.history
    with pytest.raises(ValueError, match="another run.*other settings"):
        learnt(new_model(), rows=rows, form=form, l1=0.02, folder=folder)
    with pytest.raises(ValueError, match="other rows"):
        learnt(new_model(), rows=rows[1:], form=form, l1=0.01, folder=folder)
    found.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "steering.json"]


def test_what_is_saved_is_a_steering(tmp_path):
    model = new_model()
    found = learnt(model, keep=2, scope=Steering(positions="generated", when=Gate(feature=1, over="prompt")))
    paths = found.save(tmp_path)
    assert [path.name for path in paths] == ["steering.json", "report.json"]
    loaded = Steering.from_json(paths[0].read_text(encoding="utf-8"))
    assert loaded == found.steering and len(loaded.edits) == 2 and loaded.positions == "generated"
    assert json.loads(paths[1].read_text(encoding="utf-8")) == json.loads(json.dumps(found.to_dict()))
    model.steering = loaded
    assert set(found.measures["train"]) == {"unsteered", "trained", "kept"}
    assert [row["steering"] for row in found.rows()] == ["unsteered", "trained", "kept"] * 2
    assert found.summary() == ["2 features, learnt from 19 rows."]


def test_rows_whose_gate_is_shut_are_not_learnt_from():
    shut = learnt(new_model(), scope=Steering(when=Gate(feature=1, above=1e6, over="prompt")))
    assert not shut.steering  # no gradient, so no value
    assert shut.measures["train"]["trained"].loss == pytest.approx(shut.measures["train"]["unsteered"].loss, rel=1e-6)


def test_l1_makes_values_small():
    sums = []
    for weight in (0.0, 0.1, 1.0):
        found = learnt(new_model(), l1=weight)
        sums.append(sum(map(abs, values_of(found.steering))))
    assert sums[0] > sums[1] > sums[2] and sums[2] < 0.1 * sums[0]


def test_answers_are_cut_and_counted():
    rows = new_rows()
    found = learnt(new_model(), rows=rows, max_length=6)
    longer = sum(len((row["prompt"] + " " + row[name]).split()) > 6 for row in rows for name in ("chosen", "rejected"))
    assert longer > 0 and found.n_cut == longer
    assert found.summary()[1] == f"{longer} answers were cut."


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no features": ({"features": []}, ValueError, "Expected a list of features"),
    "a name": ({"features": "sea"}, ValueError, "features='sea'"),
    "twice": ({"features": [9, "sea"]}, ValueError, r"\(0, 9\) more than once"),
    "unknown latent": ({"features": [64]}, ValueError, "64"),
    "unknown SAE": ({"features": [(2, 1)]}, ValueError, "2"),
    "texts": ({"rows": ["w1"]}, TypeError, "str as row 0"),
    "a column is missing": ({"rows": [{"prompt": "w1", "chosen": "w2"}]}, ValueError, "`rejected` of row 0"),
    "an empty answer": ({"rows": [{**new_rows(1)[0], "chosen": ""}]}, ValueError, "chosen 0.*in row 0"),
    "a long prompt": ({"max_length": 2}, ValueError, "a prompt of 1 to 1 tokens"),
    "too few rows": ({"rows": new_rows(1)}, ValueError, "1 rows"),
    "a scope with edits": ({"scope": Steering([{"feature": 1, "value": 2.0}])}, TypeError, "without edits"),  # pyright: ignore[reportArgumentType]
    "unknown loss": ({"loss": "reward"}, ValueError, "loss='reward'"),
    "unknown form": ({"form": "dense"}, ValueError, "form='dense'"),
    "unknown unit": ({"unit": "max norm"}, ValueError, "unit='max norm'"),
    "no rate": ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0"),
    "NaN": ({"beta": float("nan")}, ValueError, "beta=nan"),
    "all rows report": ({"report_share": 1.0}, ValueError, "report_share=1.0"),
    "both ways of one answer": ({"loss": "likelihood", "both_ways": True}, ValueError, "both_ways"),
    "nothing kept": ({"keep": 0}, ValueError, "keep=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_expected(case):
    given, error, message = BAD[case]
    with pytest.raises(error, match=message):
        learnt(new_model(), **given)


def test_a_code_of_signed_latents_is_refused():
    saes = [tiny_sae(layer=1, activation="abs_topk")]
    model = SaeForCausalLM.from_base(tiny_base(), saes=saes)
    with pytest.raises(ValueError, match="activation='abs_topk'"):
        learnt(model, features=[1], form="code")
    assert values_of(learnt(model, features=[1]).steering) != [0.0]
