"""The objective and its gradients against the dense reference: every activation, loss term and normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from sae_transformers.training.sae import sparse_ops
from sae_transformers.training.sae.arguments import SaeLossArguments
from sae_transformers.training.sae.objective import SaeObjective
from tests.covering import covering
from tests.tiny import tiny_sae
from tests.training.dense_reference import dense_terms, gradients

F64 = torch.float64
D, D_SAE, K, N_TOKENS, PLACE = 8, 24, 3, 17, "layers.1.resid_post"
CONCEPTS = {"anger": 2, "joy": 11}
ACTIVATIONS = ("relu", "topk", "topk-sigmoid", "topk-tanh", "batch_topk", "jumprelu", "gated", "identity")
CONDITIONING = {"conditioning_weight": 0.6, "pos_weight": 3.0}
RANKING = {"ranking_weight": 0.8, "ranking_margin": 0.1}
AUX = {"aux_k": 2, "aux_coefficient": 0.7, "dead_after_tokens": 10}
MATRYOSHKA = {"matryoshka_prefixes": [3, 10, D_SAE]}
LOSSES: dict[str, dict[str, Any]] = {
    "reconstruction": {},
    "mse": {"reconstruction_loss": "mse"},
    "sparsity": {"sparsity_coefficient": 0.3},
    "aux": AUX,
    "conditioning": CONDITIONING,
    "conditioning legacy": {**CONDITIONING, "conditioning_legacy": True},
    "ranking": RANKING,
    "matryoshka": MATRYOSHKA,
    "all": {**CONDITIONING, **RANKING, **AUX, **MATRYOSHKA, "sparsity_coefficient": 0.3},
}
FINETUNING: dict[str, dict[str, Any]] = {
    "finetune": {"finetune_dead": True, "dead_residual_weight": 0.4},
    "finetune legacy": {"finetune_dead": True, "finetune_legacy": True},
    "finetune mse": {"finetune_dead": True, "reconstruction_loss": "mse"},
}
NORMALIZATIONS: list[dict[str, Any]] = [
    {"normalization": "none"},
    {"normalization": "layer_norm"},
    {"normalization": "constant_norm"},
    {"normalization": "scalar", "input_scale": 0.7, "output_scale": 0.9},
]


def new_sae(activation: str, dtype: torch.dtype = F64, **settings: Any) -> SparseAutoencoder:
    place = {} if "hook" in settings else {"layer": 1, "site": "resid_post"}
    k = {"k": K} if activation == "batch_topk" or activation.startswith("topk") else {}
    given = {"d_in": D, "d_sae": D_SAE, "concepts": CONCEPTS, **place, **k, **settings}
    return tiny_sae(dtype=dtype, activation=activation, **given)


def loss_arguments(**settings: Any) -> SaeLossArguments:
    args = SaeLossArguments(**{"jumprelu_bandwidth": 0.4, **settings})
    args.check()
    return args


def data(dtype: torch.dtype = F64, n: int = N_TOKENS, width: int = D, seed: int = 5) -> torch.Tensor:
    return 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype) + 0.3


def some_labels(dtype: torch.dtype = F64, n: int = N_TOKENS) -> torch.Tensor:
    """0, 1, 0.25 and unknown, (n, 2)."""
    values = torch.tensor([0.0, 1.0, -100.0, 1.0, 0.25], dtype=dtype)
    return values[torch.randint(0, 5, (n, 2), generator=torch.Generator().manual_seed(6))]


def dead_latents() -> torch.Tensor:
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[0, 5, 6, 11, 19]] = True
    return dead


def outcome(sae: SparseAutoencoder, args: SaeLossArguments, batch: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    """(terms, loss, gradients) of a training step, with some latents dead."""
    objective = SaeObjective([sae], args).train()
    part: Any = objective.saes[0]
    part.dead.copy_(dead_latents())
    part.tokens_since_fired[dead_latents()] = 10
    loss = objective(**batch)["loss"]
    terms = {name: term.detach() for name, term in objective.last_steps[0].terms.items()}
    return terms, loss.detach(), gradients(sae, loss)


def expected(
    sae: SparseAutoencoder, args: SaeLossArguments, hidden: torch.Tensor, **given: Any
) -> tuple[Any, Any, Any]:
    terms = dense_terms(sae, args, hidden, aux_dead=dead_latents(), finetune_dead=dead_latents(), **given)
    loss = torch.stack(list(terms.values())).sum(0).mean()
    return {name: term.detach() for name, term in terms.items()}, loss.detach(), gradients(sae, loss)


def assert_same(found: tuple[Any, Any, Any], wanted: tuple[Any, Any, Any], tolerance: float, note: Any) -> None:
    """Equal up to `tolerance` times the largest number of a tensor, or times 1 where that is smaller."""
    assert found[0].keys() == wanted[0].keys() and found[2].keys() == wanted[2].keys(), note
    pairs = {"loss": (found[1], wanted[1])}
    pairs |= {f"term {n}": (v, wanted[0][n]) for n, v in found[0].items()}
    pairs |= {f"gradient of {n}": (v, wanted[2][n]) for n, v in found[2].items()}
    for name, (ours, theirs) in pairs.items():
        bound = tolerance * max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) <= bound, (name, note, float((ours - theirs).abs().max()))


def in_turns(monkeypatch, cases: Iterable[Any]) -> Iterator[Any]:
    """The cases, each third one with dense products, the others with sparse ones."""
    for number, case in enumerate(cases):
        monkeypatch.setattr(sparse_ops, "DENSE_ABOVE", {"cpu": -1.0 if number % 3 == 0 else 9.0})
        yield case


def settings_of(activation: str) -> list[dict[str, Any]]:
    tied = (False,) if activation == "gated" else (False, True)
    return [
        {**norm, "apply_b_dec_to_input": subtract, "tied": t}
        for norm, subtract, t in product(NORMALIZATIONS, (True, False), tied)
    ]


@pytest.mark.parametrize(("activation", "loss"), covering(ACTIVATIONS, LOSSES, times=3))
def test_loss_and_gradients_equal_the_dense_ones(monkeypatch, activation, loss):
    args = loss_arguments(**LOSSES[loss])
    labels = some_labels() if loss in ("conditioning", "conditioning legacy", "ranking", "all") else None
    for settings in in_turns(monkeypatch, settings_of(activation)):
        sae, hidden = new_sae(activation, **settings), data()
        batch = {PLACE: hidden} if labels is None else {PLACE: hidden, "labels": labels}
        found, wanted = outcome(sae, args, batch), expected(sae, args, hidden, labels=labels)
        assert_same(found, wanted, 1e-10, settings)
        assert all(g.isfinite().all() for g in found[2].values()) and found[2]["W_dec"].abs().max() > 1e-3


@pytest.mark.parametrize("loss", FINETUNING)
@pytest.mark.parametrize("activation", ["topk", "topk-sigmoid", "topk-tanh", "batch_topk"])
def test_fine_tuning_equals_the_dense_one(monkeypatch, activation, loss):
    args = loss_arguments(**FINETUNING[loss])
    for settings in in_turns(monkeypatch, settings_of(activation)):
        sae = new_sae(activation, **settings)
        assert_same(outcome(sae, args, {PLACE: data()}), expected(sae, args, data()), 1e-10, settings)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_single_precision(monkeypatch, activation):
    """To 1e-6, compared with the reference in the same precision."""
    cases = product(settings_of(activation), ("reconstruction", "all"))
    for settings, loss in in_turns(monkeypatch, cases):
        args, hidden = loss_arguments(**LOSSES[loss]), data(torch.float32)
        sae = new_sae(activation, torch.float32, **settings)
        found = outcome(sae, args, {PLACE: hidden, "labels": some_labels(torch.float32)})
        wanted = expected(sae, args, hidden, labels=some_labels(torch.float32))
        assert_same(found, wanted, 1e-6, (settings, loss))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("d_out", [D, 5])
def test_a_transcoder_with_a_skip_connection(monkeypatch, activation, d_out):
    for norm, loss in in_turns(monkeypatch, product(NORMALIZATIONS, ("reconstruction", "mse", "aux", "all"))):
        if d_out != D and norm["normalization"] == "layer_norm":
            continue
        sae = new_sae(
            activation, d_out=d_out, skip_connection=True, apply_b_dec_to_input=False, hook="mlp.input",
            hook_out="mlp.output", **norm,
        )  # fmt: skip
        args, hidden, target = loss_arguments(**LOSSES[loss]), data(), data(width=d_out, seed=8)
        batch = {"mlp.input": hidden, "mlp.output": target, "labels": some_labels()}
        wanted = expected(sae, args, hidden, target=target, labels=some_labels())
        found = outcome(sae, args, batch)
        assert_same(found, wanted, 1e-10, (norm, loss))
        assert found[2]["W_skip"].abs().max() > 1e-3


def test_aux_k_reaches_the_encoder_of_dead_latents_alone():
    """A peer's fused encoder drops this gradient (0 in place of 253)."""
    sae = new_sae("topk")
    objective = SaeObjective([sae], loss_arguments(**AUX)).train()
    part: Any = objective.saes[0]
    part.tokens_since_fired[dead_latents()] = 10
    objective(**{PLACE: data()})
    found = gradients(sae, objective.last_steps[0].terms["aux"].mean())
    assert found["W_enc"][:, dead_latents()].abs().max() > 1e-3
    assert found["W_dec"][dead_latents()].abs().max() > 1e-3
    assert not found["W_enc"][:, ~dead_latents()].any() and not found["W_dec"][~dead_latents()].any()


@pytest.mark.parametrize("legacy", [False, True])
def test_unknown_labels(legacy):
    """They add neither loss nor gradient; in the published code they count as absent."""
    args, hidden = loss_arguments(**CONDITIONING, **RANKING, conditioning_legacy=legacy), data()
    known = some_labels()
    unknown = torch.where(torch.arange(N_TOKENS)[:, None] < 9, -100.0, known)
    absent = torch.where(torch.arange(N_TOKENS)[:, None] < 9, 0.0, known)
    found = outcome(new_sae("topk"), args, {PLACE: hidden, "labels": unknown})
    if legacy:
        assert_same(found, outcome(new_sae("topk"), args, {PLACE: hidden, "labels": absent}), 0.0, "absent")
        return
    assert not found[0]["conditioning"][:9].any() and not found[0]["ranking"][:9].any()
    assert found[0]["conditioning"][9:].any()
    without = outcome(new_sae("topk"), args, {PLACE: hidden})
    labelled = outcome(new_sae("topk"), args, {PLACE: hidden[9:], "labels": known[9:]})
    unlabelled = outcome(new_sae("topk"), args, {PLACE: hidden[9:]})
    for name, gradient in found[2].items():
        of_labels = (labelled[2][name] - unlabelled[2][name]) * (N_TOKENS - 9) / N_TOKENS
        torch.testing.assert_close(gradient, without[2][name] + of_labels, rtol=1e-10, atol=1e-12)


def test_labels_go_to_the_concepts_of_their_name():
    args, hidden = loss_arguments(**CONDITIONING), data()
    labels = some_labels()
    expected_terms = outcome(new_sae("topk"), args, {PLACE: hidden, "labels": labels})[0]
    objective = SaeObjective([new_sae("topk")], args, ["joy", "fear", "anger"]).train()
    objective(**{PLACE: hidden, "labels": torch.stack([labels[:, 1], labels[:, 0] * 0 + 1, labels[:, 0]], dim=1)})
    torch.testing.assert_close(objective.last_steps[0].terms["conditioning"], expected_terms["conditioning"])


def test_the_loss_of_several_saes_is_the_sum_of_each():
    args = loss_arguments(sparsity_coefficient=0.1)
    saes = [new_sae("topk"), new_sae("relu", layer=2, d_sae=40), new_sae("gated")]
    batch = {PLACE: data(), "layers.2.resid_post": data(seed=9)}
    total = SaeObjective(saes, args)(**batch)["loss"]
    each = [SaeObjective([sae], args)(**batch)["loss"] for sae in saes]
    torch.testing.assert_close(total, torch.stack(each).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, 1e30])
def test_a_token_that_is_not_finite_or_zero_or_huge_adds_nothing(activation, bad):
    args, hidden = loss_arguments(**LOSSES["all"]), data()
    rows = torch.tensor([0, 7, N_TOKENS - 1])
    spoiled, labels = hidden.clone(), some_labels()
    spoiled[rows] = bad
    spoiled[0, 1:] = hidden[0, 1:] if bad and bad != 1e30 else bad
    good = torch.ones(N_TOKENS, dtype=torch.bool)
    good[rows] = False
    sae = new_sae(activation)
    objective = SaeObjective([sae], args).train()
    part: Any = objective.saes[0]
    part.norm_limit.fill_(1e3)
    part.tokens_since_fired[dead_latents()] = 10
    loss = objective(**{PLACE: spoiled, "labels": labels})["loss"]
    found = gradients(sae, loss)
    _, alone, wanted = outcome(new_sae(activation), args, {PLACE: hidden[good], "labels": labels[good]})
    share = (N_TOKENS - 3) / N_TOKENS
    torch.testing.assert_close(loss.detach(), alone * share, rtol=1e-12, atol=0)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name] * share, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_batch_of_bad_tokens_alone_gives_zeros(activation):
    sae = new_sae(activation)
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    objective = SaeObjective([sae], loss_arguments(**LOSSES["all"])).train()
    loss = objective(**{PLACE: torch.full((5, D), torch.nan, dtype=F64), "labels": some_labels(n=5)})["loss"]
    assert loss.detach() == 0.0
    assert not any(g.any() for g in gradients(sae, loss).values())
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    part: Any = objective.saes[0]
    assert not part.tokens_since_fired.any()
