"""Training as SelfReg has it (https://huggingface.co/papers/2502.14133): pre-training and fine-tuning of dead latents.

The formulas are written down here as its code has them, for its tied top-k SAE: one matrix W (d, n), biases b_enc and
b_dec; A are the latents alive on the data, D the dead ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.modeling.sae_losses import normalized_mse
from sae_transformers.training.sae.arguments import SaeLossArguments
from sae_transformers.training.sae.objective import SaeObjective
from tests.training.runs import PLACES, tokens, trained, trainer_for

F64 = torch.float64
D, N, K, PLACE = 16, 64, 4, "layers.15.resid_post"


def selfreg_sae(**settings: Any) -> SparseAutoencoder:
    given = {"d_in": D, "d_sae": N, "activation": "topk", "k": K, "tied": True, "layer": 15, "site": "resid_post"}
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(**{**given, **settings}), dtype=F64)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.4)
    return sae


def hidden(n: int = 30) -> Tensor:
    return torch.randn(n, D, dtype=F64, generator=torch.Generator().manual_seed(1)) + 0.2


def nl2(p: Tensor, q: Tensor) -> Tensor:
    return (((p - q) ** 2).mean(-1) / (q**2).mean(-1)).mean()


def masked_code(h: Tensor, members: Tensor) -> Tensor:
    """h at its k largest among the members, zero elsewhere, not rectified."""
    restricted = torch.where(members, h, h - 1e9)
    mask = torch.zeros_like(h).scatter(-1, restricted.topk(K).indices, 1.0)
    return h * mask


def published_loss(sae: SparseAutoencoder, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nl2(y1, x), nl2(y2, x - sg(y1)), y1)."""
    W = sae.W_dec.T
    h = (x - sae.b_dec) @ W + sae.b_enc
    y1 = masked_code(h, ~dead) @ W.T + sae.b_dec
    y2 = masked_code(h, dead) @ W.T + sae.b_dec
    return nl2(y1, x), nl2(y2, x - y1.detach()), y1


def some_dead() -> Tensor:
    return torch.arange(N) % 3 == 0


def finetuning(sae: SparseAutoencoder, x: Tensor, dead: Tensor, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    objective = SaeObjective([sae], SaeLossArguments(finetune_dead=True, **settings)).train()
    part: Any = objective.saes[0]
    part.dead.copy_(dead)
    loss = objective(**{PLACE: x})["loss"]
    return loss, objective.last_steps[0].terms


def gradients(sae: SparseAutoencoder, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(sae.parameters()), retain_graph=True)
    return dict(zip((name for name, _ in sae.named_parameters()), found, strict=True))


def test_fact_2_the_loss():
    x = hidden()
    assert float(nl2(torch.zeros_like(x), x)) == float(normalized_mse(x, torch.zeros_like(x)).mean()) == 1.0
    assert float(normalized_mse(x, x).mean()) == 0.0
    p = torch.randn(30, D, dtype=F64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(normalized_mse(x, p).mean(), nl2(p, x))


def test_pre_training_is_the_loss_of_the_published_code():
    sae, x = selfreg_sae(), hidden()
    loss = SaeObjective([sae], SaeLossArguments()).train()(**{PLACE: x})["loss"]
    h = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    z = torch.relu(h * torch.zeros_like(h).scatter(-1, h.topk(K).indices, 1.0))
    expected = nl2(z @ sae.W_enc.T + sae.b_dec, x)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, found), wanted in zip(gradients(sae, loss).items(), gradients(sae, expected).values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=name)


def test_fact_7_the_published_fine_tuning_loss():
    sae, x = selfreg_sae(), hidden()
    first, second, _ = published_loss(sae, x, some_dead())
    expected = first + 0.1 * second
    loss, terms = finetuning(sae, x, some_dead(), finetune_legacy=True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["dead_residual"].mean(), 0.1 * second, rtol=1e-12, atol=0)
    for (name, found), wanted in zip(gradients(sae, loss).items(), gradients(sae, expected).values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=name)


def test_the_intended_loss_rectifies_and_counts_the_bias_once():
    sae, x, dead = selfreg_sae(), hidden(), some_dead()
    h = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    y1 = masked_code(h, ~dead).relu() @ sae.W_dec + sae.b_dec
    y2 = masked_code(h, dead).relu() @ sae.W_dec
    expected = nl2(y1, x) + 0.1 * nl2(y2, x - y1.detach())
    loss = finetuning(sae, x, dead)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, found), wanted in zip(gradients(sae, loss).items(), gradients(sae, expected).values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=name)
    assert abs(loss - finetuning(sae, x, dead, finetune_legacy=True)[0]) > 1e-3


@pytest.mark.parametrize("legacy", [False, True])
def test_fact_7_no_gradient_goes_through_the_first_reconstruction_in_the_second_term(legacy):
    """Then latents that are alive get none from it, though its target is made of them."""
    sae, x, dead = selfreg_sae(tied=False), hidden(), some_dead()
    terms = finetuning(sae, x, dead, finetune_legacy=legacy)[1]
    found = gradients(sae, terms["dead_residual"].mean())
    assert not found["W_dec"][~dead].any() and not found["W_enc"][:, ~dead].any() and not found["b_enc"][~dead].any()
    assert found["W_dec"][dead].abs().max() > 1e-4 and found["W_enc"][:, dead].abs().max() > 1e-4


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("n_dead", [0, 1, K - 1, N - 1, N])
def test_small_and_empty_sets(legacy, n_dead):
    """The published code gives NaN, or alive latents in the dead top k; here a term without latents is left out or
    decodes nothing."""
    sae, x, dead = selfreg_sae(), hidden(), torch.arange(N) < n_dead
    loss, terms = finetuning(sae, x, dead, finetune_legacy=legacy)
    assert ("dead_residual" in terms) == (n_dead > 0)
    h = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if 0 < n_dead < K:  # all dead latents, and no other
        z = h[:, :n_dead] if legacy else h[:, :n_dead].relu()
        residual = x - published_y1(sae, x, dead, rectified=not legacy)
        y2 = z @ sae.W_dec[:n_dead] + (sae.b_dec if legacy else 0.0)
        torch.testing.assert_close(terms["dead_residual"].mean(), 0.1 * nl2(y2, residual), rtol=1e-12, atol=0)
    if n_dead == N:
        torch.testing.assert_close(terms["reconstruction"].mean(), nl2(sae.b_dec.expand_as(x), x), rtol=1e-12, atol=0)
    assert all(g.isfinite().all() for g in gradients(sae, loss).values())


def published_y1(sae: SparseAutoencoder, x: Tensor, dead: Tensor, *, rectified: bool) -> Tensor:
    z = masked_code((x - sae.b_dec) @ sae.W_enc + sae.b_enc, ~dead)
    return ((z.relu() if rectified else z) @ sae.W_dec + sae.b_dec).detach()


@pytest.mark.parametrize("legacy", [False, True])
def test_dead_latents_are_those_that_the_data_does_not_activate(tmp_path, legacy):
    """All tokens of the data, those that do not fill a batch too."""
    data, x = tokens(300), None
    x = data.tensors[PLACES[0]].double()
    torch.manual_seed(3)
    config = SparseAutoencoderConfig(d_in=12, d_sae=200, activation="topk", k=3, tied=True, layer=0, site="resid_post")
    sae = SparseAutoencoder(config, dtype=F64)
    with torch.no_grad():
        sae.b_enc.uniform_(-2.5, 0.0)
        h = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    within_top_k = torch.zeros_like(h).scatter(1, h.topk(3).indices, 1.0) * (h > 0)
    alive = (h > 0).any(0) if legacy else within_top_k.any(0)
    assert 0 < int(alive.sum()) < 200
    settings = {"finetune_dead": True, "finetune_legacy": legacy, "weight_init": "keep", "bias_init": "keep"}
    for batch_size in (64, 299):
        trainer = trainer_for(
            sae, tmp_path, data, **settings, decoder_norm="none", per_device_train_batch_size=batch_size, max_steps=1,
            learning_rate=1e-12, outlier_norm_limit=0.0,
        )  # fmt: skip
        trainer.train()
        assert torch.equal(trainer.model.saes[0].dead, ~alive)


def test_the_dead_set_is_sought_again_at_every_epoch(tmp_path):
    settings = {"finetune_dead": True, "max_steps": -1, "num_train_epochs": 4, "decoder_norm": "none"}
    trainer = trainer_for(half_dead_sae(), tmp_path, tokens(300), learning_rate=5e-2, weight_init="keep", **settings)
    callbacks: Any = trainer.callback_handler.callbacks
    seen, upkeep = [], next(callback for callback in callbacks if hasattr(callback, "find_dead"))
    once = upkeep.find_dead

    def recorded() -> None:
        once()
        seen.append(trainer.model.saes[0].dead.clone())

    upkeep.find_dead = recorded
    trainer.train()
    assert len(seen) == 4 and len({tuple(dead.tolist()) for dead in seen}) > 1


@pytest.mark.slow
def test_fine_tuning_teaches_dead_latents_the_residual(tmp_path):
    data, sae = tokens(2000), half_dead_sae()
    settings = {"weight_init": "keep", "bias_init": "keep", "decoder_norm": "none", "logging_strategy": "steps"}
    trainer = trained(
        sae, tmp_path, data, finetune_dead=True, max_steps=200, learning_rate=1e-2, logging_steps=20, **settings
    )
    logs = trainer.state.log_history
    assert logs[9]["dead_residual"] < 0.8 * logs[0]["dead_residual"]
    assert logs[9]["reconstruction"] < logs[0]["reconstruction"]


def half_dead_sae() -> SparseAutoencoder:
    """Half of the latents are far enough ahead of the others to fill every top k."""
    torch.manual_seed(4)
    config = SparseAutoencoderConfig(d_in=12, d_sae=64, activation="topk", k=3, tied=True, layer=0, site="resid_post")
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.b_enc[::2] = 1.5
    return sae
