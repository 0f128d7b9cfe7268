"""Training with `transformers.Trainer`: resuming, accumulation, checkpoints, evaluation, gradient checkpointing."""

from __future__ import annotations

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import sae_transformers
from sae_transformers import FeatureEdit, SaeForCausalLM, SaeForSequenceClassification, Steering
from tests.tiny import VOCAB, tiny_base, tiny_sae

ALL_TERMS = {"lm": 1.0, "reconstruction": 0.5, "sparsity": 0.1, "conditioning": 0.8}
CONCEPTS = {"anger": 3, "joy": 40}
# The collator of uneven texts below makes equal batches whatever their size, so every text is padded to this length.
LENGTH = 10

pytestmark = [
    # torch.utils.data warns that its pinned memory has no accelerator; a CPU is what is tested here.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


class Texts(Dataset):
    """Random texts of uneven length, padded right or left, with concept labels per text or per token."""

    def __init__(self, count: int = 16, per_token: bool = False, side: str = "right", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(count):
            length = int(torch.randint(3, LENGTH + 1, (), generator=generator))
            ids = torch.randint(3, VOCAB, (LENGTH,), generator=generator)
            real = torch.arange(LENGTH) < length if side == "right" else torch.arange(LENGTH) >= LENGTH - length
            shape = (LENGTH, 2) if per_token else (2,)
            concepts = torch.randint(0, 2, shape, generator=generator)
            concepts = torch.where(torch.rand(shape, generator=generator) < 0.3, -100, concepts)
            self.rows.append(
                {
                    "input_ids": torch.where(real, ids, 0),
                    "attention_mask": real.long(),
                    "labels": torch.where(real, ids, -100),
                    "concept_targets": concepts,
                }
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


@pytest.fixture
def base_path(tmp_path) -> Path:
    tiny_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainable(base, weights_scope="sae", site="mlp_out", loss_weights=None, **settings) -> Any:
    saes = [
        tiny_sae(layer=1, site=site, concepts=CONCEPTS, **settings),
        tiny_sae(2, layer=2, site="resid_pre", activation="relu"),
    ]
    base = str(base) if isinstance(base, Path) else base
    return SaeForCausalLM.from_base(
        base, saes, weights_scope=weights_scope, loss_weights=loss_weights or ALL_TERMS, detach_hidden=False
    )


def trainer_for(model, folder, data=None, eval_data=None, **arguments) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "report_to": "none",
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "optim": "adamw_torch",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 5,
            **arguments,
        },
    )
    return Trainer(model=model, args=arguments, train_dataset=data or Texts(), eval_dataset=eval_data)


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_equal_parameters(found, expected, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **(tolerance or EXACT))


EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("weights_scope", ["sae", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(base_path, tmp_path, weights_scope):
    through = trainable(base_path, weights_scope)
    start = parameters_of(through)
    trainer_for(through, tmp_path / "through", max_steps=4).train()
    expected = parameters_of(through)

    first = trainable(base_path, weights_scope)
    trainer_for(first, tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=2).train()
    assert_equal_parameters(parameters_of(first), expected)
    second = trainable(base_path, weights_scope)
    trainer = trainer_for(second, tmp_path / "parts", max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert_equal_parameters(parameters_of(second), expected)

    for name, value in expected.items():
        trained = name.startswith("saes.") or weights_scope == "full"
        moved = not torch.equal(value, start[name])
        assert moved == trained, name


@pytest.mark.parametrize("weights_scope", ["sae", "full"])
def test_what_a_checkpoint_holds_and_that_it_loads(base_path, tmp_path, weights_scope):
    model = trainable(base_path, weights_scope)
    trainer_for(model, tmp_path / "run", save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-2"
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText",
        "AutoModelForSequenceClassification",
    }  # fmt: skip
    for reference in config["auto_map"].values():
        assert (folder / f"{reference.partition('.')[0]}.py").is_file()
    source = Path(sae_transformers.__file__).parent / "modeling"
    for file in source.glob("*.py"):
        if file.name != "__init__.py":
            assert (folder / file.name).read_text() == file.read_text(), file.name
    with safe_open(str(folder / "model.safetensors"), "pt") as tensors:
        names = set(tensors.keys())
    own = {n for n in model.state_dict() if n.startswith("saes.")}
    if weights_scope == "sae":
        assert names == own
        size = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if n in own)
        assert (folder / "model.safetensors").stat().st_size < size + 4096
    else:
        assert names > own and any(n.startswith("lm.") for n in names)

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert_equal_parameters(parameters_of(loaded), parameters_of(model))
    ids, steering = Texts()[0]["input_ids"][None], Steering([FeatureEdit(feature="anger", op="add", value=3.0)])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(ids, steering=steering).logits, model.eval()(ids, steering=steering).logits, rtol=1e-5, atol=2e-6
        )


QUICK = {(False, "right", "sae"), (True, "left", "full")}  # the others with the slow tests


@pytest.mark.parametrize(
    ("per_token", "side", "weights_scope"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product((False, True), ("right", "left"), ("sae", "full"))
    ],
)
def test_accumulated_micro_batches_equal_the_large_batch(tmp_path, per_token, side, weights_scope):
    """8 x 1 against 1 x 8: parameters, and the loss that is logged. SGD, since Adam magnifies rounding of gradients
    near 0. What is left is the order of summation: 1e-6."""
    data = Texts(per_token=per_token, side=side)
    results = []
    for size, steps in ((8, 1), (1, 8), (2, 4)):
        model = trainable(tiny_base(), weights_scope)
        trainer = trainer_for(
            model, tmp_path / str(size), data, optim="sgd", per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((parameters_of(model), losses))
    start = parameters_of(trainable(tiny_base(), weights_scope))
    (expected, losses), *others = results
    assert len(losses) == 2
    assert (expected["saes.0.W_enc"] - start["saes.0.W_enc"]).abs().max() > 1e-4
    for found, found_losses in others:
        assert found_losses == pytest.approx(losses, rel=2e-6)
        assert_equal_parameters(found, expected, rtol=1e-6, atol=1e-6)


def test_the_logged_loss_is_the_models_loss(tmp_path):
    data = Texts(8)
    model = trainable(tiny_base())
    with torch.no_grad():
        batch = {k: torch.stack([row[k] for row in data.rows]) for k in data[0]}
        expected = copy.deepcopy(model)(**batch)
    trainer = trainer_for(model, tmp_path, data, gradient_accumulation_steps=8, per_device_train_batch_size=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.loss.item(), rel=2e-6)
    parts = {"lm": expected.lm_loss, **expected.sae_losses}
    assert sum(ALL_TERMS[k] * v.item() for k, v in parts.items()) == pytest.approx(expected.loss.item(), rel=2e-6)


def test_accumulation_of_a_classifier(tmp_path):
    class Labelled(Texts):
        def __getitem__(self, i):
            return {**self.rows[i], "labels": i % 2}

    results = []
    for size, steps in ((8, 1), (1, 8)):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_config(tiny_base().config)
        model = SaeForSequenceClassification.from_base(
            base, [tiny_sae(layer=1, concepts=CONCEPTS)], loss_weights=ALL_TERMS
        )
        trainer = trainer_for(
            model, tmp_path / str(size), Labelled(), optim="sgd", per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_grad_norm=0.0, max_steps=1,
        )  # fmt: skip
        trainer.train()
        results.append((parameters_of(model), trainer.state.log_history[0]["loss"]))
    assert results[1][1] == pytest.approx(results[0][1], rel=2e-6)
    assert_equal_parameters(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)


def test_evaluation_gets_plain_logits(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"mean": float(prediction.predictions.mean())}

    data = Texts(5)
    model = trainable(tiny_base())
    trainer = trainer_for(model, tmp_path, data, per_device_eval_batch_size=2)
    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate(data)
    with torch.no_grad():
        outputs = [model(**{k: v[None] for k, v in row.items()}) for row in data.rows]
    logits = torch.cat([out.logits for out in outputs])
    assert isinstance(seen[0].predictions, np.ndarray)
    torch.testing.assert_close(torch.from_numpy(seen[0].predictions), logits, rtol=1e-5, atol=1e-5)
    assert metrics["eval_mean"] == pytest.approx(logits.mean().item(), abs=1e-5)
    assert np.shape(trainer.predict(data).predictions) == (5, LENGTH, VOCAB)


@pytest.mark.parametrize("concepts", [True, False])
def test_evaluation_loss_is_the_models_loss(tmp_path, concepts):
    """Without concepts too: `Trainer` takes every argument with "label" in its name for one that must be given."""
    data = Texts(4)
    if not concepts:
        data.rows = [{k: v for k, v in row.items() if k != "concept_targets"} for row in data.rows]
    model = trainable(tiny_base()).eval()
    with torch.no_grad():
        expected = model(**{k: torch.stack([row[k] for row in data.rows]) for k in data[0]}).loss.item()
    trainer = trainer_for(model, tmp_path, data, per_device_eval_batch_size=4)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weights_scope", ["sae", "full"])
def test_the_best_model_is_loaded_at_the_end(base_path, tmp_path, weights_scope):
    """With a learning rate that ruins the SAE the first checkpoint is the best."""
    model = trainable(base_path, weights_scope)
    trainer = trainer_for(
        model, tmp_path / "run", eval_data=Texts(4, seed=9), max_steps=3, learning_rate=0.5, optim="sgd",
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    best = 1 + min(range(3), key=evaluated.__getitem__)
    folder = tmp_path / "run" / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert_equal_parameters(parameters_of(model), parameters_of(loaded))
    if best != 3:
        last: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
        assert not torch.equal(last.saes[0].W_enc, model.saes[0].W_enc)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-6)


# -- gradient checkpointing ------------------------------------------------------------------------------------------


# transformers 5.23 renames it, warns of the old name and keeps both.
NEW_NAME = hasattr(SaeForCausalLM, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if NEW_NAME else "gradient_checkpointing"


def checkpoint_blocks(model, options=None, **kwargs) -> None:
    getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": kwargs or None}, **(options or {}))


def gradients(model, **options) -> dict[str, torch.Tensor]:
    batch = {k: torch.stack([row[k] for row in Texts(3).rows]) for k in ("input_ids", "attention_mask", "labels")}
    model.train()
    out = model(**batch, concept_targets=torch.tensor([[1, 0], [0, -100], [1, 1]]), **options)
    out.loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"loss": out.loss.detach()}


@pytest.mark.parametrize("weights_scope", ["sae", "full"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize(
    "options", [{}, {"steered": True}, {"stop_at_last_sae": True}], ids=["plain", "steer", "stop"]
)
def test_checkpointed_gradients_equal_plain_ones(site, weights_scope, options):
    options = dict(options)
    if options.pop("steered", False):
        options["steering"] = Steering([FeatureEdit(feature=7, op="scale", value=-2.0)])
    plain = gradients(trainable(tiny_base(), weights_scope, site), **options)
    model = trainable(tiny_base(), weights_scope, site)
    checkpoint_blocks(model)
    if weights_scope == "sae":
        model.enable_input_require_grads()  # as Trainer and PEFT do for a frozen base
    found = gradients(model, **options)
    assert found.keys() == plain.keys()
    assert any(n.startswith("saes.0") for n in found)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert model._slot.get() is None
    getattr(model, f"{CHECKPOINTING}_disable")()
    again = {n: g for n, g in gradients(model, **options).items() if n == "loss"}
    torch.testing.assert_close(again["loss"], plain["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_a_region_can_be_recomputed_twice(site):
    model = trainable(tiny_base(), site=site)
    checkpoint_blocks(model)
    model.enable_input_require_grads()
    model.train()
    row = Texts(1)[0]
    loss = model(row["input_ids"][None], labels=row["labels"][None]).loss
    weights = list(model.saes.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, weights, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **EXACT)


def test_reentrant_checkpointing_is_refused(tmp_path):
    model = trainable(tiny_base())
    with pytest.raises(ValueError, match="use_reentrant=True"):
        checkpoint_blocks(model, use_reentrant=True)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    trainer = trainer_for(model, tmp_path, **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}})
    with pytest.raises(ValueError, match="use_reentrant=True"):
        trainer.train()


def test_trainer_with_checkpointing_equals_trainer_without(tmp_path):
    results = []
    for checkpointing in (False, True):
        model = trainable(tiny_base())
        trainer_for(model, tmp_path / str(checkpointing), optim="sgd", **{CHECKPOINTING: checkpointing}).train()
        results.append(parameters_of(model))
    assert_equal_parameters(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not NEW_NAME, reason="this release of transformers checkpoints every layer")
def test_checkpointing_of_every_second_block():
    plain = gradients(trainable(tiny_base(), "full", "mlp_out"))
    model = trainable(tiny_base(), "full", "mlp_out")
    checkpoint_blocks(model, {"every_n_layers": 2})
    found = gradients(model)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("steered", [False, True])
def test_recomputation_in_another_thread_sees_its_own_forward_pass(steered):
    """On a GPU autograd recomputes in a thread of its own; here the backward pass is sent to one."""
    options = {"steering": Steering([FeatureEdit(feature=7, op="scale", value=-2.0)])} if steered else {}
    plain = gradients(trainable(tiny_base(), "full", "mlp_out"), **options)
    model = trainable(tiny_base(), "full", "mlp_out")
    checkpoint_blocks(model)
    model.train()
    batch = {k: torch.stack([row[k] for row in Texts(3).rows]) for k in ("input_ids", "attention_mask", "labels")}
    loss = model(**batch, concept_targets=torch.tensor([[1, 0], [0, -100], [1, 1]]), **options).loss
    other = Steering([FeatureEdit(feature=9, op="add", value=5.0)])
    with ThreadPoolExecutor(1) as pool, model.steered(other):
        pool.submit(loss.backward).result(timeout=60)
    for name, value in plain.items():
        found = loss.detach() if name == "loss" else model.get_parameter(name).grad
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
