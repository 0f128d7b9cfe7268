"""A head on an SAE's hidden state: what it removes, what it is penalised for, and the model around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

from sae_transformers import SaeForSequenceClassification
from sae_transformers.modeling.feature_head import FeatureHead, FeatureHeadConfig, pool, task_loss
from tests.tiny import VOCAB, WIDTH, prompt, tiny_base, tiny_sae

F64 = torch.float64
U = [3, 17, 40]


def head_and_sae(**settings: Any) -> tuple[FeatureHead, Any]:
    sae = tiny_sae(dtype=F64, activation="relu")
    head = FeatureHead(FeatureHeadConfig(**settings), WIDTH, 64, 1).double()
    head.unintended[0, U] = True
    return head, sae


def states(n: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(seed))


# -- removal: SelfReg, acceptance fact 8 -----------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_removal_is_the_formula(legacy):
    head, sae = head_and_sae(removal="relu", subtract_b_dec=legacy)
    H = states()
    A = torch.relu((H - sae.b_dec) @ sae.W_enc[:, U] + sae.b_enc[U])
    X = H - A @ sae.W_dec[U] - (sae.b_dec if legacy else 0)
    expected = X @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(head.read(H[:, None], None, sae)), expected, rtol=1e-12, atol=1e-12)
    head.config.pooling = "mean"  # taken out of each token, where it is active, and not out of the mean
    tokens = H.view(2, 3, WIDTH)
    mean = X.view(2, 3, WIDTH)[:, :2].mean(1) @ head.linear.weight.T + head.linear.bias
    mask = torch.tensor([[1, 1, 0]] * 2)
    torch.testing.assert_close(head(head.read(tokens, mask, sae)), mean, rtol=1e-12, atol=1e-12)


def test_removal_of_nothing_is_the_identity_or_in_legacy_the_bias():
    H = states()
    for legacy in (False, True):
        head, sae = head_and_sae(removal="relu", subtract_b_dec=legacy)
        head.unintended.zero_()
        X = sae.remove(H, head.removed, "relu", legacy)
        assert torch.equal(X, H - sae.b_dec if legacy else H)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm", "scalar"])
def test_removal_of_all_that_is_active_leaves_the_error(normalization):
    """By its own activation, and with the bias, an SAE takes out just what it reconstructs."""
    sae = tiny_sae(dtype=F64, normalization=normalization, input_scale=0.7)
    H = states()
    left = sae.remove(H, torch.arange(64), "own", True)
    mean = H.mean(-1, keepdim=True) if normalization == "layer_norm" else 0
    torch.testing.assert_close(left - mean, H - sae(H).reconstruction, rtol=1e-10, atol=1e-10)


# -- penalty: facts 9 and 10 -----------------------------------------------------------------------------------------


def test_penalty_and_its_gradient():
    head, sae = head_and_sae()
    w = head.linear.weight
    S = ((w - sae.b_dec) @ sae.W_enc + sae.b_enc)[0]
    torch.testing.assert_close(head.penalty(sae), S[U].abs().mean(), rtol=1e-12, atol=1e-12)
    (3 * head.penalty(sae)).backward()
    expected = 3 / len(U) * (S[U].sign() * sae.W_enc[:, U]).sum(-1)
    assert w.grad is not None
    torch.testing.assert_close(w.grad[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alignment", ["encoder", "decoder"])
def test_penalty_of_other_alignments(alignment):
    head, sae = head_and_sae(alignment=alignment)
    w = head.linear.weight
    S = w @ sae.W_enc[:, U] if alignment == "encoder" else w @ sae.W_dec[U].T
    torch.testing.assert_close(head.penalty(sae), S.abs().mean(), rtol=1e-12, atol=1e-12)
    H = states()
    if alignment == "decoder":  # what a unit of the feature adds to the logit
        torch.testing.assert_close(head(H + sae.W_dec[U[0]]) - head(H), S[:, :1].expand(6, 1))


def test_penalty_of_features_listed_twice_and_of_none():
    for reduction in ("mean", "sum"):
        head, sae = head_and_sae(penalty_reduction=reduction)
        once = head.penalty(sae)
        head.unintended[0, U + U] = True
        assert torch.equal(head.penalty(sae), once)
        head.unintended.zero_()
        assert head.penalty(sae) == 0
    mean, total = (head_and_sae(penalty_reduction=r) for r in ("mean", "sum"))
    mean[0].linear.weight.data.copy_(total[0].linear.weight.data)
    torch.testing.assert_close(total[0].penalty(total[1]), len(U) * mean[0].penalty(mean[1]), rtol=1e-12, atol=1e-12)


def test_each_label_has_its_own_features_and_what_all_share_is_removed():
    """SelfReg's three diseases: two rows with masks, the third free; removal by the product of the two."""
    sae = tiny_sae(dtype=F64, activation="relu")
    head = FeatureHead(FeatureHeadConfig(per_label=True), WIDTH, 64, 3).double()
    head.unintended[0, [1, 2, 3]] = True
    head.unintended[1, [2, 3, 4, 5]] = True
    assert head.removed.tolist() == [2, 3]
    S = ((head.linear.weight - sae.b_dec) @ sae.W_enc + sae.b_enc).abs()
    expected = S[0, [1, 2, 3]].mean() + S[1, [2, 3, 4, 5]].mean()
    torch.testing.assert_close(head.penalty(sae), expected, rtol=1e-12, atol=1e-12)


# -- pooling and losses ----------------------------------------------------------------------------------------------


def test_pooling_does_not_see_padding():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    assert torch.equal(pool(hidden, mask, "last"), hidden[[0, 1], [1, 3]])
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1, 1:].mean(0)])
    torch.testing.assert_close(pool(hidden, mask, "mean"), expected)
    assert torch.equal(pool(hidden, None, "last"), hidden[:, -1])
    unknown = hidden.masked_fill(~mask.bool()[..., None], torch.nan)  # some bases compute nothing there
    assert all(torch.equal(pool(unknown, mask, pooling), pool(hidden, mask, pooling)) for pooling in ("last", "mean"))


def test_states_of_extreme_length_do_not_count_for_the_mean():
    head, sae = head_and_sae(pooling="mean", max_norm=10.0)
    hidden = states(8).view(2, 4, WIDTH)
    long = hidden.clone()
    long[0, 1] *= 1e4
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = head.read(long, mask, sae)
    torch.testing.assert_close(found[0], hidden[0, [0, 2]].mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], hidden[1].mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.read(1e4 * hidden, mask, sae)[0], 1e4 * hidden[0, :3].mean(0), rtol=1e-12, atol=0)


def test_losses():
    logits = torch.tensor([[2.0], [-1.0]])
    labels = torch.tensor([1, 0])
    bce = -(torch.sigmoid(logits[0]).log() + torch.sigmoid(-logits[1]).log()).mean() / 2
    torch.testing.assert_close(task_loss(logits, labels, None, pairwise=False), bce)
    pair = -torch.sigmoid(torch.tensor(3.0)).log()
    torch.testing.assert_close(task_loss(logits, labels, None, pairwise=True), pair)
    with pytest.raises(ValueError, match="pairs of texts"):
        task_loss(logits[:1], labels[:1], None, pairwise=True)


# -- the model -------------------------------------------------------------------------------------------------------


def classifier(labels: int = 1, **settings: Any) -> Any:
    config = tiny_base().config
    config.num_labels = labels
    base = AutoModelForSequenceClassification.from_config(config).eval()
    torch.manual_seed(0)
    sae = tiny_sae(layer=1, activation="relu")
    weights = settings.pop("loss_weights", {"unintended": 2.0})
    return SaeForSequenceClassification.from_base(base, saes=[sae], feature_head=settings, loss_weights=weights)


def padded(rows: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    ids = prompt(rows, length) % (VOCAB - 3) + 3
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_logits_and_loss_are_those_of_the_head_on_the_hidden_state(pooling):
    model, batch = classifier(pooling=pooling, removal="relu"), padded()
    model.set_unintended(U)
    labels = torch.tensor([1, 0, 1])
    output = model(**batch, labels=labels)
    hidden = model.lm.model(**batch, output_hidden_states=True).hidden_states[2]
    X = model.saes[0].remove(hidden, torch.tensor(U))
    pooled = pool(X, batch["attention_mask"], pooling)
    torch.testing.assert_close(output.pooled_states, pooled)
    expected = model.feature_head(pooled)
    torch.testing.assert_close(output.logits, expected)
    assert output.logits.shape == (3, 1)
    loss = task_loss(expected, labels, None, pairwise=False)
    torch.testing.assert_close(output.lm_loss, loss)
    torch.testing.assert_close(output.loss, loss + 2.0 * model.feature_head.penalty(model.saes[0]))
    assert output.sae_inputs is None
    cached = model(pooled_states=pooled, labels=labels)
    torch.testing.assert_close(cached.logits, output.logits)
    torch.testing.assert_close(cached.loss, output.loss)
    without_mask = model(input_ids=batch["input_ids"])
    torch.testing.assert_close(without_mask.logits, output.logits)


def test_later_layers_do_not_run():
    model = classifier()
    calls = []
    model.lm.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    model(**padded())
    assert not calls


def test_micro_batches_add_up():
    model, batch, labels = classifier(), padded(4), torch.tensor([1, 0, 1, 1])
    model.set_unintended(U)
    whole = model(**batch, labels=labels).loss
    parts = [
        model(**{k: v[rows] for k, v in batch.items()}, labels=labels[rows], num_items_in_batch=4).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("scope", ["sae", "full"])
def test_saved_and_loaded(tmp_path, scope):
    model, batch = classifier(removal="own"), padded()
    model.set_unintended(U)
    model.config.weights_scope = scope
    model.lm.save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    loaded: Any = SaeForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.feature_head.unintended, model.feature_head.unintended)
    expected = model(**batch).logits
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(loaded(**batch).logits, expected, **close)
    remote: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", trust_remote_code=True)
    torch.testing.assert_close(remote(**batch).logits, expected, **close)


def test_trainer_fits_the_head_on_cached_states_as_on_texts(tmp_path):
    """The same states and batches: the same head, whether the base runs or not."""
    batch, labels = padded(8), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    settings = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=0.05, seed=0,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    heads = []
    for cached in (False, True):
        model = classifier(removal="own", pooling="mean")
        model.set_unintended(U)
        columns: dict[str, Any] = dict(batch)
        if cached:
            with torch.no_grad():
                columns = {"pooled_states": model(**batch).pooled_states}
        columns["labels"] = labels
        data: Any = Dataset.from_dict({name: values.tolist() for name, values in columns.items()})
        trainer = Trainer(model=model, args=settings, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        heads.append(model.feature_head.linear.weight.detach())
        predicted: Any = trainer.predict(data)
        assert predicted.predictions.shape == (8, 1) and "test_loss" in predicted.metrics  # logits alone
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(heads[0], classifier().feature_head.linear.weight, atol=1e-3)


def test_only_the_head_trains_and_lora_reaches_the_state():
    model, batch = classifier(loss_weights={"unintended": 1.0, "unintended_state": 1.0}), padded()
    model.set_unintended(U)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"feature_head.linear.weight", "feature_head.linear.bias"}
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["feature_head"]))
    tuned(**batch, labels=torch.tensor([1, 0, 1])).loss.backward()
    lora = {name: p for name, p in tuned.named_parameters() if "lora_B" in name and "layers.2" not in name}
    assert lora and all(p.grad is not None and p.grad.any() for p in lora.values())


def test_a_model_that_was_loaded_whole_keeps_its_saes_frozen(tmp_path):
    model = classifier(loss_weights={"unintended": 1.0})
    model.config.weights_scope = "full"
    model.save_pretrained(tmp_path)
    loaded = SaeForSequenceClassification.from_pretrained(tmp_path)
    assert any(p.requires_grad for p in loaded.feature_head.parameters())
    assert not any(p.requires_grad for p in loaded.saes.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "first"}, "pooling='first'"),
        ({"removal": True}, "removal=True"),
        ({"sae": 1}, "sae=1"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"penalty": 3}, "penalty"),
        ({"alignment": "own"}, "alignment='own'"),
        ({"max_norm": 0.0}, r"max_norm=0\.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        classifier(**settings)


def test_bad_features():
    model = classifier()
    with pytest.raises(ValueError, match=r"integers in \[0, 64\).*64 to 64"):
        model.set_unintended([64])
    with pytest.raises(ValueError, match="per_label=False"):
        model.set_unintended({"LABEL_0": U})
    with pytest.raises(ValueError, match="'nothing'"):
        classifier(labels=3, per_label=True).set_unintended({"nothing": U})
    with pytest.raises(ValueError, match="no feature head"):
        base = AutoModelForSequenceClassification.from_config(tiny_base().config)
        SaeForSequenceClassification.from_base(base, saes=[tiny_sae(layer=1)]).set_unintended(U)
