"""Penalties on features: their terms against plain torch, their gradients, and equal steps however a batch is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from sae_transformers import (
    FeatureEdit,
    FeaturePenalty,
    SaeForCausalLM,
    SaeForSequenceClassification,
    Steering,
    log_loss_terms,
)
from sae_transformers.modeling.sae_mathematics import SaeMathematics
from tests.invariants.published import clean_environment, run_script
from tests.invariants.test_losses import hidden_at
from tests.tiny import prompt, tiny_base, tiny_sae

F64 = torch.float64
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
ACTIVATIONS = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 8, "normalization": "layer_norm"},
    "jumprelu": {"activation": "jumprelu", "normalization": "constant_norm"},
    "gated": {"activation": "gated"},
    "tied": {"activation": "relu", "tied": True, "normalization": "scalar", "input_scale": 0.7},
    "identity": {"activation": "identity"},
}
FEATURES = {3: 2.0, 17: 1.0, 40: 0.5}


def penalised(penalties: Any, scope: str = "full", base: Any = None, **sae: Any) -> Any:
    saes = [tiny_sae(dtype=F64, **{"layer": 1, "activation": "relu", **sae})]
    base = tiny_base(dtype=F64) if base is None else base
    return SaeForCausalLM.from_base(base, saes, weights_scope=scope, feature_penalties=penalties)


def texts() -> dict[str, Tensor]:
    """Three texts of uneven length, padded right and left, of which only a part has labels."""
    ids, mask = prompt(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:], mask[2, :3] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = labels[2, :5] = -100
    chosen = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "penalty_mask": chosen}


def value_by_hand(sae: Any, x: Tensor, features: list[int], of: str) -> Tensor:
    """(batch, seq, m) by the public mathematics of all latents."""
    if of == "pre_activation":
        return sae.encode_pre_acts(x)[..., features]
    latents = sae.encode(x)
    if of == "activation":
        return latents[..., features]
    nothing = sae.decode(torch.zeros_like(latents), x)
    alone = [sae.decode(latents * only, x) - nothing for only in torch.eye(latents.shape[-1], dtype=F64)[features]]
    alone = torch.stack(alone, -2)  # what each of them writes, (batch, seq, m, d)
    return alone.norm(dim=-1) * latents[..., features].sign() / x.norm(dim=-1, keepdim=True)


def term_by_hand(model: Any, penalty: FeaturePenalty, batch: dict[str, Tensor], reference: Any = None) -> Tensor:
    inputs: dict[str, Any] = {"attention_mask": batch["attention_mask"]}
    x = hidden_at(model.lm, batch["input_ids"], "model.layers.1", **inputs)
    features, weights = zip(*penalty.features, strict=True)
    values = value_by_hand(model.saes[0], x, list(features), penalty.of)
    if penalty.goal == "reference":
        there = hidden_at(reference, batch["input_ids"], "model.layers.1", **inputs)
        cost = (values - value_by_hand(model.saes[0], there, list(features), penalty.of)).abs()
    else:
        margin = torch.tensor(penalty.margin, dtype=F64)
        below, above = (values - margin).clamp(min=0), (margin - values).clamp(min=0)
        cost = {"zero": values.abs(), "below": below, "above": above}[penalty.goal]
    total, sum_of_weights = torch.zeros((), dtype=F64), sum(weights)
    for row, text in enumerate(batch["attention_mask"]):
        real = text.nonzero()[:, 0].tolist()
        for place, t in enumerate(real):
            if place < penalty.skip_first:
                continue
            answers = t + 1 < len(text) and int(batch["labels"][row, t + 1]) != -100
            counts = {"all": True, "answer": answers, "mask": bool(batch["penalty_mask"][row, t])}[penalty.over]
            for feature, weight in enumerate(weights):
                total = total + counts * weight * cost[row, t, feature] ** penalty.power / sum_of_weights
    return total / (batch["labels"][:, 1:] != -100).sum()


CASES = [
    *(("relu", of, goal, "answer", 1) for of, goal in itertools.product(
        ("pre_activation", "activation", "share"), ("below", "above", "zero", "reference"))),
    ("topk", "activation", "zero", "all", 2), ("topk", "share", "reference", "mask", 1),
    ("topk", "pre_activation", "below", "all", 1), ("jumprelu", "share", "below", "mask", 2),
    ("jumprelu", "pre_activation", "above", "all", 2), ("gated", "activation", "reference", "all", 2),
    ("gated", "pre_activation", "below", "mask", 1), ("tied", "share", "zero", "mask", 1),
    ("identity", "share", "zero", "all", 2), ("identity", "activation", "zero", "answer", 1),
]  # fmt: skip


def case_of(
    activation: str, of: str, goal: str, over: str, power: int, family: str = "llama"
) -> tuple[Any, FeaturePenalty, Any]:
    margin = {"below": [0.1, -0.2, 0.0], "above": [0.4, 0.2, 0.3]}.get(goal, 0.0)
    penalty = FeaturePenalty(FEATURES, weight=0.7, of=of, goal=goal, over=over, margin=margin, power=power)
    model = penalised(penalty, base=tiny_base(family, dtype=F64), **ACTIVATIONS[activation])
    reference = tiny_base(family, seed=1, dtype=F64) if goal == "reference" else None
    model.set_penalty_reference(reference)
    return model, penalty, reference


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_term_equals_plain_torch_and_is_added_with_its_weight(case: Any) -> None:
    model, penalty, reference = case_of(*case)
    out = model(**texts())
    expected = term_by_hand(model, penalty, texts(), reference)
    assert expected > 1e-3
    torch.testing.assert_close(out.sae_losses["penalty_0"], expected, **CLOSE)
    torch.testing.assert_close(out.loss, out.lm_loss.double() + 0.7 * expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: "-".join(map(str, case)))
def test_gradients_of_the_base_equal_finite_differences(case: Any) -> None:
    model, _, _ = case_of(*case, family="gpt2")  # which has no part in single precision
    model.config.loss_weights["lm"] = 0.0
    names = ["lm.transformer.h.0.mlp.c_fc.weight", "lm.transformer.h.1.attn.c_proj.weight"]

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (), texts()).loss

    values = tuple(model.get_parameter(name).detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    assert torch.autograd.grad(loss(*values), values[0])[0].abs().max() > 1e-5


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_is_the_bases_alone_even_where_the_sae_trains(detach: bool) -> None:
    """`detach_hidden` is about the SAE's own losses. Whether the SAE's parameters are frozen changes nothing."""
    penalty, gradients = FeaturePenalty(FEATURES, of="share", goal="zero"), []
    for weights in ({"lm": 0.0}, {"lm": 0.0, "reconstruction": 1e-30}):
        model = SaeForCausalLM.from_base(
            tiny_base(dtype=F64), [tiny_sae(dtype=F64, layer=1, activation="topk", tied=True)],
            weights_scope="full", loss_weights=weights, detach_hidden=detach, feature_penalties=penalty,
        )  # fmt: skip
        model.train()(**texts()).loss.backward()
        for parameter in model.saes.parameters():
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-25
        gradients.append(model.lm.model.layers[0].mlp.up_proj.weight.grad)
        assert all(p.grad is None or not p.grad.any() for p in model.lm.model.layers[2].parameters())
    assert any(p.requires_grad for p in model.saes.parameters())
    assert gradients[0].abs().max() > 1e-5
    torch.testing.assert_close(gradients[0], gradients[1], **CLOSE)


def gradients_of(model: Any, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        model.train()(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Of the model of the tests with several processes, which has two SAEs.
DISTRIBUTED = [FeaturePenalty([3, 40], weight=0.7), FeaturePenalty(7, sae=1, over="all", of="share", goal="zero")]
ALL_KINDS = [FeaturePenalty(FEATURES, over=over, of="share", name=over) for over in ("all", "answer", "mask")]


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    model, batch = penalised(ALL_KINDS), texts()
    count = int((batch["labels"][:, 1:] != -100).sum())
    whole = gradients_of(model, [batch])
    parts = [{k: v[i : i + 1] for k, v in batch.items()} | {"num_items_in_batch": count} for i in range(3)]
    for name, value in gradients_of(model, parts).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert whole["lm.model.layers.0.mlp.up_proj.weight"].abs().max() > 1e-4


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All texts in one row, as `DataCollatorWithFlattening` and TRL's `padding_free` lay them."""
    real = batch["attention_mask"].bool()
    row = {name: value[real][None] for name, value in batch.items() if name != "attention_mask"}
    row["position_ids"] = torch.cat([torch.arange(int(n)) for n in real.sum(-1)])[None]
    row["labels"] = row["labels"].masked_fill(row["position_ids"] == 0, -100)
    return row


def test_packed_texts_cost_what_padded_ones_do() -> None:
    model, batch = penalised(ALL_KINDS), texts()
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected, found = (model.eval()(**one) for one in (batch, packed(batch)))
    for name, value in expected.sae_losses.items():
        assert value > 1e-3
        torch.testing.assert_close(found.sae_losses[name], value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_checkpointed_blocks_give_the_same_gradients(site: str) -> None:
    model = penalised([*ALL_KINDS, FeaturePenalty(5, goal="reference")], site=site)
    model.set_penalty_reference(tiny_base(seed=1, dtype=F64))
    expected = gradients_of(model, [texts()])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients_of(model, [texts()])
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


def adapted(penalties: Any, layers: list[int] | None = None, base: Any = None) -> Any:
    inner = penalised(penalties, "sae", base)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=layers)
    model: Any = get_peft_model(inner, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.to(F64)


@pytest.mark.filterwarnings("ignore:Could not find a config file in  :UserWarning")
def test_the_reference_of_a_lora_is_the_model_without_it() -> None:
    penalty = FeaturePenalty(FEATURES, goal="reference", over="all")
    base = tiny_base(dtype=F64, attention_dropout=0.3)
    model = adapted(penalty, base=base)
    states = {n: p.requires_grad for n, p in model.named_parameters()}
    found = model.eval()(**texts()).sae_losses["penalty_0"]
    with model.disable_adapter():
        assert model(**texts()).sae_losses["penalty_0"] == 0
    other = adapted(penalty)
    other.get_base_model().set_penalty_reference(tiny_base(dtype=F64))
    expected = other.eval()(**texts()).sae_losses["penalty_0"]
    torch.testing.assert_close(found, expected, **CLOSE)
    model.train()(**texts()).loss.backward()
    assert states == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all((p.grad is not None and p.grad.any()) == ("lora_" in n) for n, p in model.named_parameters())
    assert model.get_base_model().lm.training
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="needs a model to compare with"):
        merged(**texts())


@pytest.mark.filterwarnings("ignore:Could not find a config file in  :UserWarning")
def test_a_penalty_that_no_step_can_lower_is_told() -> None:
    nothing = penalised(FeaturePenalty(3), "sae")
    with pytest.raises(ValueError, match="Nothing that is trained comes before the SAE.*penalty_0"):
        nothing.train()(**texts())
    assert nothing.eval()(**texts()).sae_losses["penalty_0"] > 0  # measured
    for checkpointed in (False, True):
        after = adapted(FeaturePenalty(3, name="late"), layers=[2])
        if checkpointed:  # then the embedded tokens require a gradient that is nobody's
            after.enable_input_require_grads()
        with pytest.raises(ValueError, match="Nothing that is trained.*penalty_late"):
            after.train()(**texts())
    measured = adapted(FeaturePenalty(3, weight=0.0), layers=[2]).train()(**texts())
    assert measured.sae_losses["penalty_0"] > 0
    torch.testing.assert_close(measured.loss, measured.lm_loss, check_dtype=False)
    adapted(FeaturePenalty(3), layers=[0]).train()(**texts()).loss.backward()


def test_the_penalised_state_is_the_one_that_the_sae_reads() -> None:
    """Steering by an earlier SAE has changed it, its own has not."""
    earlier, own = tiny_sae(2, dtype=F64, layer=0), tiny_sae(dtype=F64, layer=1, activation="relu")
    model = SaeForCausalLM.from_base(
        tiny_base(dtype=F64), [earlier, own], feature_penalties=FeaturePenalty(FEATURES, sae=1, over="all")
    ).eval()

    def cost(*edits: FeatureEdit) -> Tensor:
        return model(**texts(), steering=Steering(edits) if edits else False).sae_losses["penalty_0"]

    plain = cost()
    assert cost(FeatureEdit(1, 3, "add", 5.0)) == plain
    assert abs(cost(FeatureEdit(0, 3, "add", 5.0)) - plain) > 1e-3


@pytest.mark.parametrize(
    ("penalty", "change", "told"),
    [
        (FeaturePenalty(3), {"labels": None}, "no labels of tokens, for penalty_0"),
        (FeaturePenalty(3, over="mask"), {"penalty_mask": None}, "no penalty_mask, for penalty_0"),
        (FeaturePenalty(3, over="mask"), {"penalty_mask": torch.ones(3, 7)}, r"tensor \(3, 8\).*\(3, 7\)"),
        (FeaturePenalty(3, over="mask"), {"penalty_mask": [1]}, "Received: list"),
    ],
)
def test_a_batch_that_does_not_tell_its_tokens_is_refused(penalty: Any, change: Any, told: str) -> None:
    model = penalised(penalty).train()
    with pytest.raises(ValueError, match=told):
        model(**{**texts(), **change})
    with torch.no_grad():  # nothing is trained, nothing is asked for
        assert model.eval()(texts()["input_ids"]).sae_losses is None


def test_nothing_but_a_loss_runs_a_penalty() -> None:
    plain, model = penalised(None).eval(), penalised(FeaturePenalty(3, over="all", weight=5.0)).eval()
    ids = texts()["input_ids"]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.train().generate(ids, **options), plain.train().generate(ids, **options))


def test_only_the_chosen_columns_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise AssertionError("all latents were computed")

    monkeypatch.setattr(SaeMathematics, "code_from", refused)
    for of in ("pre_activation", "activation", "share"):
        for activation in ("relu", "gated", "jumprelu"):
            model = penalised(FeaturePenalty(FEATURES, of=of), **ACTIVATIONS[activation])
            gradients_of(model, [texts()])
    gradients_of(penalised(FeaturePenalty(FEATURES), **ACTIVATIONS["topk"]), [texts()])
    with pytest.raises(AssertionError, match="all latents"):  # a top-k chooses among all
        gradients_of(penalised(FeaturePenalty(FEATURES, of="activation"), **ACTIVATIONS["topk"]), [texts()])


def test_a_base_that_is_trained_past_its_model_is_told() -> None:
    model, ids = penalised(FeaturePenalty(3)).train(), texts()["input_ids"]
    with pytest.raises(RuntimeError, match="are in no loss.*compute_loss = Trainer.compute_loss"):
        model.lm(input_ids=ids, labels=ids)
    with torch.no_grad():
        model.lm(input_ids=ids)
    model.eval().lm(input_ids=ids)


def classifier(penalties: Any, **options: Any) -> Any:
    base = tiny_base(dtype=F64)
    torch.manual_seed(0)
    base.config.num_labels = 3
    head: Any = AutoModelForSequenceClassification.from_config(base.config)
    head.model.load_state_dict(base.model.state_dict())
    sae = tiny_sae(dtype=F64, layer=1, activation="relu")
    return SaeForSequenceClassification.from_base(
        head.to(F64), [sae], weights_scope="full", feature_penalties=penalties, **options
    )


@pytest.mark.parametrize("head", [None, {"pooling": "mean"}], ids=["own head", "feature head"])
def test_a_classifier_is_penalised_text_by_text(head: Any) -> None:
    penalties = [FeaturePenalty(FEATURES, over=over, name=over) for over in ("all", "mask")]
    model = classifier(penalties, feature_head=head)
    batch = texts()
    batch["labels"] = torch.tensor([0, 2, 1])
    x = hidden_at(model.lm, batch["input_ids"], "model.layers.1", attention_mask=batch["attention_mask"])
    weights = torch.tensor(list(FEATURES.values()), dtype=F64)
    cost = model.saes[0].encode_pre_acts(x)[..., list(FEATURES)].clamp(min=0) @ weights / weights.sum()
    counted = batch["attention_mask"] * (batch["attention_mask"].cumsum(-1) > 1)
    terms = model.eval()(**batch).sae_losses
    for over, mask in (("all", counted), ("mask", counted * batch["penalty_mask"])):
        expected = ((cost * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
        torch.testing.assert_close(terms[f"penalty_{over}"], expected, rtol=1e-7, atol=1e-9)
    whole = gradients_of(model, [batch])
    parts = [{k: v[i : i + 1] for k, v in batch.items()} | {"num_items_in_batch": 3} for i in range(3)]
    for name, value in gradients_of(model, parts).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow  # another interpreter
def test_a_published_model_is_trained_without_the_library(tmp_path: Any) -> None:
    """In another interpreter, by the code in the repository: the same losses, step by step."""
    penalties = [
        FeaturePenalty({"anger": 2, 17: 1}, weight=0.5, over="all", name="calm"),
        FeaturePenalty(5, of="share"),
    ]
    saes = [tiny_sae(layer=1, activation="relu", concepts={"anger": 3})]
    model = SaeForCausalLM.from_base(tiny_base(), saes, weights_scope="full", feature_penalties=penalties)
    model.save_pretrained(tmp_path / "model")
    ids = prompt()
    arguments = (tmp_path / "model", ids.tolist())
    said = run_script("train_penalised.py", *arguments, folder=tmp_path, env=clean_environment(tmp_path / "home"))
    found = json.loads(said[said.index("FOUND ") + 6 :].splitlines()[0])
    assert found["frozen"] and found["penalties"] == [one.to_dict() for one in penalties]
    optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.05)
    for step in found["steps"]:
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = {"loss": out.loss.item(), **{name: value.item() for name, value in out.sae_losses.items()}}
        assert step == pytest.approx(expected, rel=1e-6) and set(step) == {"loss", "penalty_calm", "penalty_1"}


@pytest.mark.filterwarnings("ignore:Could not find a config file in  :UserWarning")
def test_trainer_8_by_1_is_1_by_8_with_a_lora_and_resumes(tmp_path: Any) -> None:
    """Two optimizer steps of SGD; then the same run, cut in two, bit for bit."""
    rows = [{name: value[i] for name, value in texts().items()} for i in (0, 1, 2, 0, 2, 1, 1, 0) * 2]

    def trained(folder: str, size: int, resume: str | None = None, steps: int = 2) -> tuple[dict[str, Tensor], list]:
        model = adapted(ALL_KINDS)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=size, report_to="none",
            gradient_accumulation_steps=8 // size, learning_rate=0.05, optim="sgd", max_grad_norm=0.0, use_cpu=True,
            save_steps=1, disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False, seed=3,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
        log_loss_terms(trainer)
        trainer.train(resume_from_checkpoint=resume)
        terms = [
            {k: v for k, v in one.items() if k.startswith("penalty_")} for one in trainer.state.log_history[:steps]
        ]
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, terms

    (whole, logged), (parts, of_parts) = trained("whole", 8), trained("parts", 1)
    assert set(logged[0]) == {"penalty_all", "penalty_answer", "penalty_mask"}
    for one, other in zip(logged, of_parts, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    start = {n: p for n, p in adapted(ALL_KINDS).named_parameters()}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(value, start[name]) for name, value in whole.items())
    again, _ = trained("parts", 1, resume=str(tmp_path / "parts" / "checkpoint-1"))
    for name, value in parts.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
