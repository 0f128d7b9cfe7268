"""`SaeTrainer`: what training does to the weights, what it remembers, logs and saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from sae_transformers.training.sae import callbacks, initialization, metrics
from sae_transformers.training.sae.dataset import HiddenStateShards, TensorTokens, TokenBatches
from tests.covering import covering
from tests.training.runs import D_SAE, PLACES, D, assert_same_state, new_sae, state_of, tokens, trained, trainer_for
from tests.training.sae.test_dataset import write_store

F64 = torch.float64
AUX = {"aux_k": 6, "dead_after_tokens": 64}


def fvu(sae: Any, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((sae(x).reconstruction - x).square().sum() / (x - x.mean(0)).square().sum())


def all_tokens(data: TensorTokens, place: str = PLACES[0]) -> torch.Tensor:
    return data.tensors[place]


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sae", "settings"),
    [
        ({}, AUX),
        pytest.param({"normalization": "layer_norm"}, {}, marks=pytest.mark.slow),
        pytest.param({"activation": "batch_topk"}, {}, marks=pytest.mark.slow),
        ({"activation": "jumprelu"}, {"sparsity_coefficient": 1e-3, "jumprelu_bandwidth": 0.05}),
        pytest.param({"activation": "gated"}, {"sparsity_coefficient": 1e-3}, marks=pytest.mark.slow),
        pytest.param({"activation": "relu", "tied": True}, {"sparsity_coefficient": 1e-3}, marks=pytest.mark.slow),
    ],
    ids=lambda v: v.get("activation", "topk") if "aux_k" not in v and "sparsity_coefficient" not in v else "",
)
def test_it_learns(tmp_path, sae, settings):
    data, held_out = tokens(2000), all_tokens(tokens(300, seed=1))
    before = trained(new_sae(**sae), tmp_path, data, **settings, max_steps=1, learning_rate=1e-9).saes[0]
    after = trained(new_sae(**sae), tmp_path, data, **settings, max_steps=300, learning_rate=1e-2).saes[0]
    assert fvu(after, held_out) < 0.35 < fvu(before, held_out) * 0.6


def test_the_result_is_a_plain_run_of_adam(tmp_path):
    """Steps done by hand: same batches, loss by plain autograd, projected gradient, Adam, rows of norm 1."""
    data, settings = tokens(), {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 12}
    trainer = trained(new_sae(dtype=F64), tmp_path, data, **settings)
    x = all_tokens(data).double()
    sae = new_sae(seed=42, dtype=F64)  # Trainer's default seed
    first = next(iter(TokenBatches(data.sizes, 256, window_tokens=200, seed=42)))
    with torch.no_grad():
        sae.b_dec.copy_(x[first].mean(0))
    optimizer = torch.optim.AdamW(sae.parameters(), lr=3e-3, weight_decay=0.0)
    batches, done = TokenBatches(data.sizes, 64, window_tokens=200, seed=42), 0
    for epoch in range(2):
        batches.set_epoch(epoch)
        for rows in batches:
            if done == 12:
                break
            done += 1
            sae.zero_grad()
            pre_acts = (x[rows] - sae.b_dec) @ sae.W_enc + sae.b_enc
            best = pre_acts.topk(4)
            z = torch.zeros_like(pre_acts).scatter(1, best.indices, best.values.relu())
            error = z @ sae.W_dec + sae.b_dec - x[rows]
            (error.square().sum(-1) / x[rows].square().sum(-1)).mean().backward()
            grad = sae.W_dec.grad
            assert grad is not None
            grad -= (grad * sae.W_dec.detach()).sum(-1, keepdim=True) * sae.W_dec.detach()
            optimizer.step()
            with torch.no_grad():
                sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(dict(trainer.saes[0].named_parameters())[name], parameter, rtol=1e-7, atol=1e-7)


def test_four_small_batches_equal_a_large_one(tmp_path):
    data = tokens(1280)  # five large batches an epoch are twenty small ones
    settings = {"window_tokens": 2000, "max_steps": 8, "dead_after_tokens": 200}
    large = trained(new_sae(dtype=F64), tmp_path, data, per_device_train_batch_size=256, **settings)
    small = trained(
        new_sae(dtype=F64), tmp_path, data, per_device_train_batch_size=64, gradient_accumulation_steps=4, **settings
    )
    assert large.state.global_step == small.state.global_step == 8
    found, wanted = (dict(t.saes[0].named_parameters()) for t in (small, large))
    fresh = trained(new_sae(dtype=F64), tmp_path, data, learning_rate=1e-12, **settings).saes[0]
    for name, parameter in wanted.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=1e-6)
        assert (parameter - dict(fresh.named_parameters())[name]).abs().max() > 1e-3, "nothing was learned"


@pytest.mark.slow
def test_several_saes_in_one_pass_equal_each_alone(tmp_path):
    settings = {**AUX, "max_grad_norm": 0.0}
    kinds: list[dict[str, Any]] = [
        {},
        {"layer": 1, "site": "mlp_out", "d_sae": 24},
        {"activation": "batch_topk"},
        {"d_sae": 64},
    ]
    together = trained([new_sae(i, **kind) for i, kind in enumerate(kinds)], tmp_path, **settings)
    for number, kind in enumerate(kinds):
        alone = trained(new_sae(9, **kind), tmp_path, **settings).model.saes[0]
        assert_same_state(together.model.saes[number].state_dict(), alone.state_dict())
        assert float(together.model.saes[number].norm_limit) > 0


@pytest.mark.parametrize("weight_init", ["tied_unit_norm", "kaiming", "keep"])
def test_decoder_rows_keep_norm_one(tmp_path, weight_init):
    given = new_sae()
    with torch.no_grad():
        given.W_dec.mul_(3.0)
    rows = trained(given, tmp_path, weight_init=weight_init, max_steps=5).saes[0].W_dec
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(D_SAE), rtol=1e-6, atol=1e-6)
    free = trained(new_sae(), tmp_path, weight_init=weight_init, decoder_norm="none", max_steps=5).saes[0].W_dec
    assert (free.norm(dim=-1) - 1).abs().max() > 1e-3


def test_a_step_on_a_few_rows_at_a_time_is_the_same_step(monkeypatch, tmp_path):
    """Projection, unit norms and meters, to the bit in the weights."""
    whole = trained(new_sae(), tmp_path / "whole", max_steps=5, logging_strategy="steps", logging_steps=1)
    for module in (callbacks, initialization, metrics):
        monkeypatch.setattr(module, "rows_in_cache", lambda matrix: 3)
    parts = trained(new_sae(), tmp_path / "parts", max_steps=5, logging_strategy="steps", logging_steps=1)
    assert_same_state(parts.saes[0].state_dict(), whole.saes[0].state_dict())
    logged = [
        [{k: e[k] for k in ("loss", "fvu", "l0", "grad_norm")} for e in t.state.log_history[:-1]]
        for t in (parts, whole)
    ]
    assert len(logged[0]) == 5 and all(ours == pytest.approx(theirs) for ours, theirs in zip(*logged, strict=True))


def test_a_decoder_row_of_zeros_does_no_harm(tmp_path):
    given = new_sae()
    with torch.no_grad():
        given.W_dec[3] = 0.0
    trainer = trained(given, tmp_path, weight_init="keep", max_steps=5)
    assert all(tensor.isfinite().all() for tensor in trainer.saes[0].state_dict().values())


@pytest.mark.slow
def test_bf16_stays_close_to_single_precision(tmp_path):
    kinds: list[dict[str, Any]] = [{}, {"activation": "relu"}, {"concepts": {"first": 3}}]
    for kind in kinds:
        data = tokens(1000, labels="concepts" in kind)
        settings = {**AUX, "ranking_weight": 0.2, "sparsity_coefficient": 1e-3, "max_steps": 60}
        full, half = (
            trained(new_sae(**kind), tmp_path, data, bf16=bf16, **settings).saes[0] for bf16 in (False, True)
        )
        x = all_tokens(data)
        assert half.W_dec.dtype == torch.float32
        assert fvu(half, x) == pytest.approx(fvu(full, x), rel=0.05)
        assert not torch.equal(half.W_dec, full.W_dec)


@pytest.mark.slow
def test_k_falls_during_training(tmp_path):
    settings = {"k_start": 20, "k_anneal_steps": 8, "logging_strategy": "steps", "logging_steps": 1}
    trainer = trained(new_sae(activation="batch_topk"), tmp_path, **settings)
    assert trainer.state.log_history[0]["l0"] == pytest.approx(18, abs=1.5)  # int(20 - 16 / 8) at the first step
    assert [entry["l0"] for entry in trainer.state.log_history[7:12]] == [4.0] * 5


# -- what is remembered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
def test_dead_latents_are_counted_in_tokens(tmp_path, accumulation):
    sae = new_sae(activation="relu")
    with torch.no_grad():
        sae.b_enc[:5] = -1e3
    settings = {"weight_init": "keep", "bias_init": "keep", "learning_rate": 1e-9, "dead_after_tokens": 300}
    logs = {"logging_strategy": "steps", "logging_steps": 1, "gradient_accumulation_steps": accumulation}
    trainer = trained(sae, tmp_path, max_steps=6, **settings, **logs)
    since = trainer.model.saes[0].tokens_since_fired
    assert since[:5].tolist() == [6 * accumulation * 64] * 5
    assert (since[5:] < 64).all()
    shares = [entry["dead_share"] for entry in trainer.state.log_history[:-1]]
    first_dead = -(-300 // (64 * accumulation))  # 300 tokens or more
    assert shares == [0.0] * (first_dead - 1) + [0.125] * (6 - first_dead + 1)


@pytest.mark.slow
def test_tokens_left_out_do_not_count(tmp_path):
    """Outliers and NaN: 1 in 5 tokens; the same run whatever they are."""
    results = []
    for bad in (1e4, torch.nan, torch.inf, 0.0):
        data = tokens()
        x = all_tokens(data)
        rows = torch.arange(0, 520, 5)
        x[rows] = bad
        x[rows, 1:] = x[rows, 1:] if bad else 0.0
        sae = new_sae(normalization="scalar")
        trainer = trained(sae, tmp_path, data, **AUX, logging_strategy="steps", logging_steps=12)
        results.append(state_of(trainer))
        assert 1 < float(results[-1].pop("saes.0.norm_limit")) < 100
        assert trainer.state.log_history[0]["l0"] <= 4.0 and trainer.state.log_history[0]["fvu"] < 2
    assert all(value.isfinite().all() for value in results[0].values())
    for other in results[1:]:
        assert_same_state(other, results[0])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.0, 10.0])
def test_nan_never_reaches_the_weights(tmp_path, limit):
    for bad in (torch.nan, torch.inf, -torch.inf):
        data = tokens()
        all_tokens(data)[::3, 2] = bad
        all_tokens(data)[100:] = bad  # whole batches
        trainer = trained(new_sae(activation="batch_topk"), tmp_path, data, outlier_norm_limit=limit, **AUX)
        assert all(value.isfinite().all() for name, value in state_of(trainer).items() if "norm_limit" not in name)
        assert fvu(trainer.saes[0], all_tokens(tokens())[1:100:3]) < 2


def test_data_that_is_all_nan_is_refused(tmp_path):
    data = tokens()
    all_tokens(data)[:] = torch.nan
    with pytest.raises(ValueError, match=PLACES[0]):
        trained(new_sae(), tmp_path, data)


@pytest.mark.slow
def test_a_corpus_smaller_than_a_batch(tmp_path):
    small = tokens(50)
    trainer = trained(new_sae(), tmp_path, small, per_device_train_batch_size=4096, max_steps=-1, num_train_epochs=3)
    assert trainer.state.global_step == 3
    same = trained(new_sae(), tmp_path, small, per_device_train_batch_size=50, max_steps=3)
    assert_same_state(state_of(trainer), state_of(same))
    one = trained(new_sae(), tmp_path, tokens(1), max_steps=2)
    assert all(value.isfinite().all() for value in state_of(one).values())


# -- logs, evaluation, files -----------------------------------------------------------------------------------------


def test_logs_hold_what_was_measured(tmp_path):
    """A single step without learning: the logged numbers are those of its batch."""
    data = tokens()
    settings = {"max_steps": 1, "learning_rate": 1e-12, "logging_strategy": "steps", "logging_steps": 1}
    trainer = trained(new_sae(), tmp_path, data, **settings)
    entry, sae = trainer.state.log_history[0], trainer.saes[0]
    x = all_tokens(data)[next(iter(TokenBatches(data.sizes, 64, window_tokens=200, seed=42)))]
    assert entry["fvu"] == pytest.approx(fvu(sae, x), rel=1e-4)
    assert entry["l0"] == pytest.approx(float((sae.encode(x) != 0).sum(-1).float().mean()))
    wanted = float(sae.losses(x)["reconstruction"].detach())
    assert entry["loss"] == pytest.approx(wanted, rel=1e-5) and entry["reconstruction"] == pytest.approx(
        wanted, rel=1e-5
    )
    assert entry["dead_share"] == 0.0


@pytest.mark.parametrize(("activation", "labels"), covering(["topk", "batch_topk", "relu"], [False, True]))
def test_evaluation_equals_direct_computation(tmp_path, activation, labels):
    held_out = tokens(333, seed=3, labels=labels)
    sae = new_sae(activation=activation, concepts={"second": 7} if labels else {})
    settings = {"per_device_eval_batch_size": 100, "eval_dataset": held_out}
    trainer = trained(sae, tmp_path, tokens(labels=labels), **settings)
    metrics, x = trainer.evaluate(), all_tokens(held_out)
    assert metrics["eval_fvu"] == pytest.approx(fvu(sae, x), rel=1e-4)
    assert metrics["eval_l0"] == pytest.approx(float((sae.encode(x) != 0).sum(-1).float().mean()), rel=1e-5)
    terms = sae.losses(x, held_out.tensors["labels"][:, 1:] if labels else None)
    del terms["sparsity"]
    terms["loss"] = torch.stack(list(terms.values())).sum()
    for name, value in terms.items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(value.detach()), rel=1e-4)
    assert trainer.evaluate(eval_dataset=tokens(100, labels=labels))["eval_fvu"] != metrics["eval_fvu"]


@pytest.mark.slow
def test_evaluation_leaves_training_as_it_is(tmp_path):
    settings = {**AUX, "eval_dataset": tokens(100, seed=3), "logging_strategy": "steps", "logging_steps": 3}
    without = trained(new_sae(activation="batch_topk"), tmp_path, **settings)
    with_it = trained(new_sae(activation="batch_topk"), tmp_path, **settings, eval_strategy="steps", eval_steps=2)
    assert_same_state(state_of(with_it), state_of(without))
    logs = [[e for e in t.state.log_history if "fvu" in e] for t in (without, with_it)]
    assert [e["fvu"] for e in logs[0]] == [e["fvu"] for e in logs[1]]


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(tmp_path):
    settings = {
        "eval_dataset": tokens(200, seed=3), "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps",
        "save_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "eval_fvu",
        "greater_is_better": True, "max_steps": 20,
    }  # fmt: skip
    for kinds in ([{}], [{}, {"layer": 1, "site": "mlp_out"}]):
        name = "eval_fvu" if len(kinds) == 1 else f"eval_{PLACES[0]}-0/fvu"
        trainer = trained([new_sae(**k) for k in kinds], tmp_path, **{**settings, "metric_for_best_model": name})
        best = trainer.state.best_model_checkpoint
        assert best is not None and best.endswith("checkpoint-5")
        for folder, sae in zip(trainer.folders(), trainer.saes, strict=True):
            assert_same_state(sae.state_dict(), SparseAutoencoder.from_pretrained(f"{best}/{folder}").state_dict())


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "gated"])
def test_a_saved_folder_is_an_sae(tmp_path, activation):
    trainer = trained(new_sae(activation=activation, normalization="scalar", concepts={"x": 2}), tmp_path)
    trainer.save_model()
    loaded, x = SparseAutoencoder.from_pretrained(tmp_path), all_tokens(tokens(50, seed=2))
    assert loaded.config == trainer.saes[0].config and loaded.config.input_scale != 1.0
    assert torch.equal(loaded(x).reconstruction, trainer.saes[0](x).reconstruction)
    assert trainer.saes[0].W_enc.is_contiguous() and not trainer.saes[0].training


def test_several_saes_are_saved_by_their_places(tmp_path):
    kinds: list[dict[str, Any]] = [{}, {"layer": 1, "site": "mlp_out"}, {"d_sae": 24}]
    trainer = trained([new_sae(**kind) for kind in kinds], tmp_path, max_steps=2)
    trainer.save_model()
    assert trainer.folders() == [f"{PLACES[0]}-0", PLACES[1], f"{PLACES[0]}-2"]
    for folder, sae in zip(trainer.folders(), trainer.saes, strict=True):
        assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path / folder).W_dec, sae.W_dec)


@pytest.mark.slow
def test_training_from_a_store_equals_training_from_memory(tmp_path):
    rows = write_store(str(tmp_path / "store"), [30, 0, 50, 40], labels=())
    memory = TensorTokens(rows)
    memory.sizes = [30, 0, 50, 40]
    settings = {"per_device_train_batch_size": 16, "window_tokens": 60, "max_steps": 12}
    sae: dict[str, Any] = {"d_in": 6}
    first = trained(new_sae(**sae), tmp_path, HiddenStateShards(tmp_path / "store"), **settings)
    second = trained(new_sae(**sae), tmp_path, memory, **settings)
    assert_same_state(state_of(first), state_of(second))


@pytest.mark.slow
def test_a_transcoder_learns_another_place(tmp_path):
    sae = new_sae(hook=PLACES[0], hook_out=PLACES[1], apply_b_dec_to_input=False, skip_connection=True)
    data = tokens(1000)
    trained(sae, tmp_path, data, max_steps=200, learning_rate=1e-2)
    x, target = (all_tokens(data, place) for place in PLACES)
    with torch.no_grad():
        error = (sae(x).reconstruction - target).square().sum() / (target - target.mean(0)).square().sum()
    assert float(error) < 0.3


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sae", "received"),
    [
        ({"layer": 7, "site": "mlp_out"}, rf"{PLACES[0]}, {PLACES[1]}.*'layers\.7\.mlp_out'"),
        ({"d_in": 13}, rf"{PLACES[0]} are 12 wide.*width 13"),
        ({"hook": PLACES[0], "hook_out": "elsewhere", "apply_b_dec_to_input": False}, "'elsewhere'"),
        ({"concepts": {"first": 1, "third": 2}}, r"first, second.*concepts=\['third'\]"),
        ({"layer": None, "site": None}, "config.layer"),
    ],
)
def test_an_sae_that_does_not_fit_the_data_is_refused(tmp_path, sae, received):
    for saes in (new_sae(**sae), [new_sae(), new_sae(**sae)]):
        with pytest.raises(ValueError, match=received):
            trainer_for(saes, tmp_path, tokens(labels=True))


def test_concepts_without_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no labels.*concepts=\['first'\]"):
        trainer_for(new_sae(concepts={"first": 1}), tmp_path, tokens(), concept_init="diffmean")


def test_other_kinds_of_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Received: TensorDataset"):
        trainer_for(new_sae(), tmp_path, torch.utils.data.TensorDataset(torch.zeros(3, D)))
    with pytest.raises(ValueError, match=r"saes=\[\]"):
        trainer_for([], tmp_path)
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer_for(new_sae(), tmp_path).evaluate()
    with pytest.raises(ValueError, match="k_start=99"):
        trainer_for(new_sae(), tmp_path, k_start=99, k_anneal_steps=5)


def test_evaluation_labels_in_another_order_are_refused(tmp_path):
    other = tokens(100, labels=True)
    other.label_names = ["second", "first"]
    with pytest.raises(ValueError, match=r"\['second', 'first'\]"):
        trainer_for(new_sae(concepts={"first": 1}), tmp_path, tokens(labels=True), eval_dataset=other)
