"""Penalties on groups of features: their terms against plain torch, their gradients, and equal steps however a batch
is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from sae_transformers import FeatureEdit, GroupPenalty, SaeForSequenceClassification, Steering, log_loss_terms
from sae_transformers.modeling.feature_head import pool
from tests.invariants.published import clean_environment, run_script
from tests.tiny import prompt, tiny_base, tiny_sae

F64 = torch.float64
GROUP, OTHER = [3, 17, 40], [5, 9]
LAYER = 1
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
TRANSCODER = {
    "hook": "model.layers.1.mlp.input", "hook_out": "model.layers.1.mlp", "activation": "relu",
    "apply_b_dec_to_input": False, "layer": None, "site": None,
}  # fmt: skip


def classifier(groups: Any, family: str = "llama", n_labels: int = 3, head: Any = None, **options: Any) -> Any:
    """SAE 0 is earlier than the one of the head, number 1."""
    settings = {"layer": LAYER, "activation": "relu", **options.pop("sae", {})}
    base = tiny_base(family, dtype=F64, **options.pop("base", {}))
    base.config.num_labels, base.config.problem_type = n_labels, options.pop("problem_type", None)
    torch.manual_seed(0)
    scorer: Any = AutoModelForSequenceClassification.from_config(base.config)
    inner = scorer.base_model_prefix
    getattr(scorer, inner).load_state_dict(getattr(base, inner).state_dict())
    saes = [tiny_sae(seed=3, dtype=F64, layer=0, activation="relu"), tiny_sae(dtype=F64, **settings)]
    options = {"weights_scope": "full", "group_penalties": groups, **options}
    if head is not None:
        options["feature_head"] = {"sae": 1, **head}
    torch.manual_seed(1)
    return SaeForSequenceClassification.from_base(scorer.to(F64), saes, **options)


def texts() -> dict[str, Tensor]:
    """Three texts of uneven length, padded on the right."""
    ids, mask = prompt(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:], mask[2, 6:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}


def logits_without(model: Any, group: GroupPenalty | None, batch: dict[str, Tensor], family: str = "llama") -> Tensor:
    """By hooks on the bare base, which subtract what the group's latents write, and by the SAE's public methods."""
    base, mask = model.lm, batch["attention_mask"]
    counted = mask * (mask.cumsum(-1) > (0 if group is None else group.skip_first))
    seen: dict[str, Tensor] = {}

    def without(x: Tensor, sae: Any) -> Tensor:
        latents = sae.encode(x)
        kept = latents.clone()
        kept[..., [] if group is None else list(group.features)] = 0
        return (sae.decode(kept, x) - sae.decode(latents, x)) * counted[..., None]

    number = 1 if group is None else group.sae
    sae = model.saes[number]
    handles = []
    if sae.config.hook is not None:
        reads, writes = base.get_submodule("model.layers.1.mlp"), base.get_submodule(sae.config.hook_out)
        handles.append(reads.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])))
        handles.append(writes.register_forward_hook(lambda _, args, out: out + without(seen["x"], sae)))
    else:
        block = base.get_submodule(f"{BLOCKS[family]}.{sae.config.layer}")

        def changed(_: Any, args: Any, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            new = x + without(x, sae)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handles.append(block.register_forward_hook(changed))
    if model.feature_head is not None:  # after the change, if that is here
        block = base.get_submodule(f"{BLOCKS[family]}.{LAYER}")
        handles.append(
            block.register_forward_hook(lambda _, args, out: seen.update(x=out[0] if isinstance(out, tuple) else out))
        )
    model.unwrap()
    try:
        logits = base(input_ids=batch["input_ids"], attention_mask=mask).logits
    finally:
        model.rewrap()
        for handle in handles:
            handle.remove()
    if (head := model.feature_head) is None:
        return logits
    hidden, used = seen["x"], head.removed.tolist()
    if head.config.removal != "none":
        latents = model.saes[1].encode(hidden)
        kept = latents.clone()
        kept[..., used] = 0
        hidden = hidden + model.saes[1].decode(kept, hidden) - model.saes[1].decode(latents, hidden)
    state = pool(hidden, mask, head.config.pooling)
    if head.hidden is not None:
        state = torch.relu(state @ head.hidden.weight.T + head.hidden.bias)
    return state @ head.linear.weight.T + head.linear.bias


def term_by_hand(model: Any, group: GroupPenalty, batch: dict[str, Tensor], family: str = "llama") -> Tensor:
    columns = list(range(model.num_labels)) if group.labels is None else list(group.labels)
    if group.of != "contribution":
        head, sae = model.feature_head, model.saes[1]
        weights = head.linear.weight[columns] if head.hidden is None else head.hidden.weight
        total = torch.zeros((), dtype=F64)
        for row in weights:
            for j in group.features:
                aligned = {
                    "affine": (row - sae.b_dec) @ sae.W_enc[:, j] + sae.b_enc[j],
                    "encoder": row @ sae.W_enc[:, j],
                    "decoder": row @ sae.W_dec[j],
                }[group.of]
                total = total + aligned.abs() ** group.power / len(group.features)
        return total
    change = logits_without(model, None, batch, family) - logits_without(model, group, batch, family)
    return (change[:, columns].abs() ** group.power).sum(-1).mean()


CONTRIBUTIONS: dict[str, tuple[GroupPenalty, dict[str, Any]]] = {
    "the base's head": (GroupPenalty(GROUP, sae=1), {}),
    "its squares": (GroupPenalty(GROUP, sae=0, power=2, labels=[2, 0]), {}),
    "the first token too": (GroupPenalty(GROUP, sae=1, skip_first=0), {}),
    "top-k": (GroupPenalty(range(30), sae=1), {"sae": {"activation": "topk", "normalization": "layer_norm"}}),
    "jumprelu": (GroupPenalty(range(30), sae=1), {"sae": {"activation": "jumprelu"}}),
    "transcoder": (GroupPenalty(range(20), sae=1), {"sae": TRANSCODER}),
    "feature head": (GroupPenalty(GROUP, sae=1, skip_first=0), {"head": {}}),
    "mean of tokens": (GroupPenalty(GROUP, sae=1, labels=1), {"head": {"pooling": "mean"}}),
    "what is left": (GroupPenalty([*GROUP, *OTHER], sae=1), {"head": {"pooling": "mean", "removal": "own"}}),
    "two layers": (GroupPenalty(GROUP, sae=1, power=2), {"head": {"pooling": "mean", "hidden_size": 6}}),
    "an SAE before the head's": (GroupPenalty(GROUP, sae=0), {"head": {"hidden_size": 6}}),
}  # fmt: skip
ALIGNMENTS: dict[str, tuple[GroupPenalty, dict[str, Any]]] = {
    "decoder": (GroupPenalty(GROUP, sae=1, of="decoder"), {"head": {}}),
    "encoder": (GroupPenalty(GROUP, sae=1, of="encoder", power=2, labels=[2]), {"head": {}}),
    "affine": (GroupPenalty(GROUP, sae=1, of="affine"), {"head": {"pooling": "mean"}}),
    "of two layers": (GroupPenalty(GROUP, sae=1, of="decoder", power=2), {"head": {"hidden_size": 6}}),
}
CASES = {**CONTRIBUTIONS, **ALIGNMENTS}


def model_of(case: str, family: str = "llama") -> tuple[Any, GroupPenalty]:
    group, options = CASES[case]
    model = classifier([group], family, **options)
    if model.feature_head is not None and model.feature_head.config.removal != "none":
        model.set_unintended(OTHER)
    return model, group


@pytest.mark.parametrize("case", CASES)
def test_a_term_equals_plain_torch_and_is_added_with_its_weight(case: str) -> None:
    model, group = model_of(case)
    model.group_penalties = [GroupPenalty(**{**group.to_dict(), "weight": 0.7, "name": "mine"})]
    out = model.train()(**texts())
    expected = term_by_hand(model, group, texts())
    assert expected > 1e-4
    torch.testing.assert_close(out.sae_losses["group_mine"], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out.loss, out.lm_loss.double() + 0.7 * expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", [case for case in CASES if case != "transcoder"])
def test_gradients_equal_finite_differences(case: str) -> None:
    model, _ = model_of(case, "gpt2")  # which has no part in single precision
    model.eval().config.loss_weights["lm"] = 0.0
    names = ["lm.transformer.h.0.mlp.c_fc.weight"] if case in CONTRIBUTIONS else []
    names.append("lm.score.weight" if model.feature_head is None else "feature_head.linear.weight")
    if model.feature_head is not None and model.feature_head.hidden is not None:
        names[-1] = "feature_head.hidden.weight"

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (), texts()).loss

    values = tuple(model.get_parameter(name).detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    for gradient in torch.autograd.grad(loss(*values), values):
        assert gradient.abs().max() > 1e-6


def test_what_is_taken_out_is_what_a_function_of_edit_features_takes_out() -> None:
    model = classifier(GroupPenalty(GROUP, sae=1))
    batch = texts()
    term = model.eval()(**batch).sae_losses["group_0"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    past = (batch["attention_mask"].cumsum(-1) > 1) & batch["attention_mask"].bool()

    def without(features: Any) -> Tensor:
        gone = torch.isin(features.indices, torch.tensor(GROUP)) & past[..., None]
        return features.values.masked_fill(gone, 0.0)

    change = model(**inputs).logits - model(**inputs, edit_features={1: without}).logits
    torch.testing.assert_close(term, change.abs().sum(-1).mean())


def test_the_gradient_is_never_the_saes() -> None:
    """Whether its parameters are frozen changes nothing."""
    gradients = []
    for weights in ({"lm": 0.0}, {"lm": 0.0, "reconstruction": 1e-30}):
        model = classifier(GroupPenalty(GROUP, sae=1), loss_weights=weights, sae={"tied": True})
        model.train()(**texts()).loss.backward()
        for parameter in model.saes.parameters():
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-25
        gradients.append(model.lm.model.layers[0].mlp.up_proj.weight.grad)
    assert any(p.requires_grad for p in model.saes.parameters())
    assert gradients[0].abs().max() > 1e-5
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def gradients_of(model: Any, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        model.train()(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


SEVERAL = [GroupPenalty(GROUP, sae=1, name="a"), GroupPenalty(OTHER, weight=0.3, sae=0, power=2, name="b")]
WITH_HEAD = [*SEVERAL, GroupPenalty(GROUP, sae=1, of="decoder", weight=2.0, name="c")]


@pytest.mark.parametrize("head", [None, {"pooling": "mean", "hidden_size": 6}], ids=["own head", "feature head"])
@pytest.mark.parametrize("kind", ["one of several", "several at once"])
def test_micro_batches_add_up_to_the_whole_batch(head: Any, kind: str) -> None:
    """Of yes-or-no labels Trainer counts each of a text's."""
    options: dict[str, Any] = {}
    batch = texts()
    if kind == "several at once":
        options = {"problem_type": "multi_label_classification"}
        batch["labels"] = torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 1, 0]], dtype=F64)
    weights: dict[str, Any] = {} if head is None else {"loss_weights": {"unintended": 0.5, "unintended_state": 0.5}}
    model = classifier(SEVERAL if head is None else WITH_HEAD, head=head, **options, **weights)
    if head is not None:
        model.set_unintended(OTHER)
    whole = gradients_of(model, [batch])
    count = batch["labels"].numel()
    parts = [{k: v[i : i + 1] for k, v in batch.items()} | {"num_items_in_batch": count} for i in range(3)]
    for name, value in gradients_of(model, parts).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert whole["lm.model.layers.0.mlp.up_proj.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("head", [None, {"pooling": "mean"}], ids=["own head", "feature head"])
def test_checkpointed_blocks_give_the_same_gradients(head: Any) -> None:
    model = classifier(SEVERAL, head=head)
    expected = gradients_of(model, [texts()])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients_of(model, [texts()])
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", [None, {"pooling": "mean", "dropout": 0.5}], ids=["own head", "feature head"])
def test_both_passes_have_the_same_dropout(head: Any) -> None:
    """Features that write nothing contribute nothing, and the loss is drawn as without a penalty."""
    losses = []
    for groups in (None, SEVERAL):
        model = classifier(groups, head=head, base={"attention_dropout": 0.5})
        for number, features in ((1, GROUP), (0, OTHER)):
            with torch.no_grad():
                model.saes[number].W_dec[features] = 0
        torch.manual_seed(5)
        out = model.train()(**texts())
        losses.append((out.lm_loss, torch.rand(3)))
        assert out.sae_losses is None or all(value == 0 for value in out.sae_losses.values())
    for one, other in zip(*losses, strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(6)
    assert not torch.equal(model(**texts()).lm_loss, losses[0][0])


def test_both_passes_are_steered_alike() -> None:
    model = classifier(GroupPenalty(GROUP, sae=1)).eval()
    steering = Steering([FeatureEdit(0, 7, "add", 6.0)])
    plain = model(**texts(), steering=False).sae_losses["group_0"]
    model.steering = steering
    steered = model(**texts()).sae_losses["group_0"]
    assert abs(steered - plain) > 1e-3
    assert steered == model(**texts(), steering=steering).sae_losses["group_0"]
    with pytest.raises(ValueError, match="A steering that reads latents of SAE 1"):
        model(**texts(), steering=Steering([FeatureEdit(1, 7, "scale", 2.0)]))
    with pytest.raises(ValueError, match="labels or `edit_features`. Received: both, for group_0"):
        model(**texts(), edit_features={0: lambda features: features.values})


def test_states_without_texts() -> None:
    """A head can be fitted on stored states with an alignment; a contribution needs the texts."""
    model = classifier(WITH_HEAD[2:], head={}, loss_weights={"unintended": 1.0})
    model.set_unintended(GROUP)
    model.feature_head.config.alignment = "decoder"
    stored = model(**texts()).pooled_states.detach()
    out = model.train()(pooled_states=stored, labels=texts()["labels"])
    torch.testing.assert_close(out.sae_losses["group_c"], out.sae_losses["unintended"])  # SelfReg's own
    model.group_penalties = WITH_HEAD
    with pytest.raises(ValueError, match="Received: `pooled_states`, for group_a"):
        model(pooled_states=stored, labels=texts()["labels"])


def test_nothing_but_a_loss_runs_a_penalty() -> None:
    inputs = {name: value for name, value in texts().items() if name != "labels"}
    plain, model = classifier(None).eval(), classifier(SEVERAL).eval()
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=0, atol=0)
    assert model(**inputs).sae_losses is None
    with torch.no_grad():
        assert model(**texts()).sae_losses["group_a"] > 0
    frozen = classifier(SEVERAL[:1], weights_scope="sae")
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing that is trained is in this penalty.*group_a without a gradient"):
        frozen.train()(**texts())
    measured = classifier(GroupPenalty(GROUP, sae=1, weight=0)).train()(**texts())
    assert measured.sae_losses["group_0"] > 0 and not measured.sae_losses["group_0"].requires_grad
    torch.testing.assert_close(measured.loss, measured.lm_loss.double())


def rows_of_two_labels() -> list[dict[str, Tensor]]:
    """16 texts, as a `Trainer` takes them."""
    batch = {**texts(), "labels": torch.tensor([0, 1, 1])}
    return [{name: value[i] for name, value in batch.items()} for i in (0, 1, 2, 0, 2, 1, 1, 0) * 2]


def adapted(groups: Any, head: Any) -> Any:
    inner = classifier(groups, head=head, weights_scope="sae", n_labels=2)
    torch.manual_seed(0)
    saved = ["score"] if head is None else ["feature_head"]
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], modules_to_save=saved)
    model: Any = get_peft_model(inner, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.to(F64)


@pytest.mark.filterwarnings("ignore:Could not find a config file in  :UserWarning")
@pytest.mark.parametrize("head", [None, {"pooling": "mean", "hidden_size": 6}], ids=["own head", "feature head"])
def test_trainer_8_by_1_is_1_by_8_with_a_lora_and_resumes(head: Any, tmp_path: Any) -> None:
    """Two optimizer steps of SGD; then the same run, cut in two, bit for bit. The term falls."""
    rows = rows_of_two_labels()
    groups = SEVERAL if head is None else WITH_HEAD

    def trained(folder: str, size: int, resume: str | None = None) -> tuple[dict[str, Tensor], list]:
        model = adapted(groups, head)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=2, per_device_train_batch_size=size, report_to="none",
            gradient_accumulation_steps=8 // size, learning_rate=0.05, optim="sgd", max_grad_norm=0.0, use_cpu=True,
            save_steps=1, disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False, seed=3,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
        log_loss_terms(trainer)
        trainer.train(resume_from_checkpoint=resume)
        terms = [{k: v for k, v in one.items() if k.startswith("group_")} for one in trainer.state.log_history[:2]]
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, terms

    (whole, logged), (parts, of_parts) = trained("whole", 8), trained("parts", 1)
    assert set(logged[0]) == {f"group_{one.name}" for one in groups}
    for one, other in zip(logged, of_parts, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    start = dict(adapted(groups, head).named_parameters())
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)
    moved = [name for name, value in whole.items() if not torch.equal(value, start[name])]
    assert any("lora_" in name for name in moved) and any("modules_to_save" in name for name in moved)
    again, _ = trained("parts", 1, resume=str(tmp_path / "parts" / "checkpoint-1"))
    for name, value in parts.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_training_takes_the_scores_off_the_group() -> None:
    """What the group contributes falls to a tenth of what it is without the penalty, while the task is learnt."""
    final = {}
    for weight in (0.0, 1.0):
        model = classifier(GroupPenalty(range(24), weight=weight, sae=1))
        optimizer = torch.optim.Adam(model.lm.parameters(), lr=3e-3)
        for _ in range(60):
            model.train()(**texts()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            out = model.eval()(**texts())
        final[weight] = (out.lm_loss.item(), out.sae_losses["group_0"].item())
    assert final[1.0][1] < 0.1 * final[0.0][1]
    assert final[1.0][0] < 0.1 and final[0.0][0] < 0.1


@pytest.mark.slow  # another interpreter
@pytest.mark.parametrize("head", [None, {"pooling": "mean"}], ids=["own head", "feature head"])
def test_a_published_model_is_trained_without_the_library(head: Any, tmp_path: Any) -> None:
    """In another interpreter, by the code in the repository: the same losses, step by step."""
    model = classifier(SEVERAL if head is None else WITH_HEAD, head=head).float()
    model.save_pretrained(tmp_path / "model")
    ids, labels = prompt(), torch.tensor([0, 2])
    arguments = (tmp_path / "model", ids.tolist(), labels.tolist())
    said = run_script("train_penalised.py", *arguments, folder=tmp_path, env=clean_environment(tmp_path / "home"))
    found = json.loads(said[said.index("FOUND ") + 6 :].splitlines()[0])
    assert found["frozen"] and found["penalties"] == [one.to_dict() for one in model.group_penalties]
    optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.05)
    for step in found["steps"]:
        out = model(ids, labels=labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = {"loss": out.loss.item(), **{name: value.item() for name, value in out.sae_losses.items()}}
        assert step == pytest.approx(expected, rel=1e-6) and {"group_a", "group_b"} <= set(step)
