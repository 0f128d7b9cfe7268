"""Top-k latents from scores in bfloat16: those of a float64 product, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.training.sae import certified, objective
from sae_transformers.training.sae.arguments import SaeTrainingArguments
from sae_transformers.training.sae.certified import CertifiedTopK, _Rounded, fits
from sae_transformers.training.sae.dataset import TensorTokens
from sae_transformers.training.sae.latent_selection import choose, top_k_of
from sae_transformers.training.sae.trainer import SaeTrainer

K, D_IN = 8, 48


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(n_tokens: int, d_sae: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states with a few large coordinates, as models have them, and an encoder stored by latent."""
    x = numbers(n_tokens, D_IN, seed=seed) * (1 + 20 * (numbers(D_IN, seed=seed + 1) > 1.5))
    return x, numbers(d_sae, D_IN, seed=seed + 2).T, numbers(d_sae, seed=seed + 3)


def the_set(selection, n_tokens: int) -> torch.Tensor:
    return selection.latents.view(n_tokens, -1).sort().values


def in_float64(x, W_enc, bias, k: int) -> torch.Tensor:
    return (x.double() @ W_enc.double() + bias.double()).topk(k).indices.sort().values


@pytest.mark.parametrize("d_sae", [1024, 1020, 1023, 8 * 4 * K])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_latents_are_those_of_float64_and_the_values_those_of_float32(d_sae, scale):
    x, W_enc, bias = layer(300, d_sae)
    x, bias = x * scale, bias * scale
    chooser = CertifiedTopK()
    selection, values = chooser.choose(x, W_enc, bias, K)
    assert torch.equal(the_set(selection, 300), in_float64(x, W_enc, bias, K))
    expected = torch.addmm(bias, x, W_enc).gather(1, selection.latents.view(300, K)).flatten()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5 * scale)
    assert torch.equal(selection.offsets, torch.arange(0, 300 * K + 1, K))
    assert chooser.n_uncertified < 30


def test_without_the_bound_on_errors_latents_would_be_wrong(monkeypatch):
    x, W_enc, bias = layer(2000, 1024)
    scores = _Rounded.scores
    monkeypatch.setattr(_Rounded, "scores", lambda self, x: (found := scores(self, x))[:1] + (0 * found[1],))
    monkeypatch.setattr(certified, "ROUNDING", 0.0)
    selection, _ = CertifiedTopK().choose(x, W_enc, bias, K)
    assert (the_set(selection, 2000) != in_float64(x, W_enc, bias, K)).any()


@pytest.mark.parametrize("seed", range(5))
def test_no_score_lies_further_from_float64_than_the_bound_says(seed):
    x, W_enc, bias = layer(200, 1024, seed=seed)
    x = x * 10 ** numbers(200, 1, seed=seed + 9)
    scores, error = _Rounded(W_enc, bias).scores(x)
    true = x.double() @ W_enc.double() + bias.double()
    allowed = error.double().repeat(1, 8) + certified.ROUNDING * scores.double().abs()  # latent n is of group n % 128
    assert ((scores.double() - true).abs() <= allowed).all()


def test_tokens_that_cannot_be_certified_take_the_float32_product():
    x, W_enc, bias = layer(40, 1024)
    # All latents alike but for what bfloat16 does not see: none can be told from the others.
    alike = W_enc[:, :1] * (1 + 1e-4 * numbers(1, 1024))
    chooser = CertifiedTopK()
    selection, values = chooser.choose(x, alike.T.contiguous().T, bias * 0, K)
    wanted, wanted_values = choose(x, alike, bias * 0, top_k_of(K))
    assert chooser.n_uncertified == 40
    torch.testing.assert_close(values.view(40, K).sort().values, wanted_values.view(40, K).sort().values)
    assert torch.equal(the_set(selection, 40), the_set(wanted, 40))


def test_a_token_that_is_not_finite_spoils_no_other():
    x, W_enc, bias = layer(12, 1024)
    expected = in_float64(x, W_enc, bias, K)
    x[3], x[7] = torch.nan, torch.inf
    selection, _ = CertifiedTopK().choose(x, W_enc, bias, K)
    others = [n for n in range(12) if n not in (3, 7)]
    assert torch.equal(the_set(selection, 12)[others], expected[others])
    assert ((selection.latents >= 0) & (selection.latents < 1024)).all()


def test_blocks_of_tokens_and_no_tokens_at_all(monkeypatch):
    x, W_enc, bias = layer(50, 1024)
    whole, values = CertifiedTopK().choose(x, W_enc, bias, K)
    monkeypatch.setitem(certified.BLOCK_ELEMENTS, "cpu", 7 * 1024)
    parts, part_values = CertifiedTopK().choose(x, W_enc, bias, K)
    assert torch.equal(the_set(whole, 50), the_set(parts, 50))
    torch.testing.assert_close(values.view(50, K).sort().values, part_values.view(50, K).sort().values)
    none, nothing = CertifiedTopK().choose(x[:0], W_enc, bias, K)
    assert len(none.latents) == len(nothing) == 0 and none.n_tokens == 0


def test_k_must_be_few_of_the_latents():
    assert fits(32, 9216) and fits(8, 256)
    assert not fits(8, 248) and not fits(64, 1024)


# -- in training ---------------------------------------------------------------------------------------------------


def trained(tmp_path, steps: int = 6, resume: bool = False, **options) -> SaeTrainer:
    x, _, _ = layer(4096, 1024, seed=5)
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=D_IN, d_sae=1024, activation="topk", k=K, layer=0))
    arguments = SaeTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=256,
        init_tokens=256,
        logging_steps=1,
        save_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = SaeTrainer(sae, arguments, TensorTokens({"layers.0.resid_post": x}))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: SaeTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "l0" in entry]


def test_a_run_learns_what_the_float32_product_would_have_taught_it(tmp_path):
    on, off = trained(tmp_path / "on", bf16_scores="on"), trained(tmp_path / "off", bf16_scores="off")
    assert losses(on) == pytest.approx(losses(off), rel=1e-5)
    assert all(0.99 <= entry["certified_share"] <= 1 for entry in on.state.log_history if "l0" in entry)
    assert not any("certified_share" in entry for entry in off.state.log_history)
    for name, value in on.saes[0].state_dict().items():
        torch.testing.assert_close(value, off.saes[0].state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_goes_on_as_it_began_wherever_that_was(tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "pays", lambda *size: True)
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", steps=3)
    monkeypatch.setattr(objective, "pays", lambda *size: False)  # another machine
    parts = trained(tmp_path / "parts", resume=True)
    assert parts.model.saes[0].certified is not None
    for name, value in parts.saes[0].state_dict().items():
        assert torch.equal(value, whole.saes[0].state_dict()[name]), name
    trained(tmp_path / "off", steps=3)
    monkeypatch.setattr(objective, "pays", lambda *size: True)
    assert trained(tmp_path / "off", resume=True).model.saes[0].certified is None


def test_small_and_other_saes_are_not_measured(monkeypatch):
    monkeypatch.setattr(certified, "_seconds", lambda *factors: pytest.fail("measured"))
    assert not certified.pays(D_IN, 512)
    relu = SparseAutoencoder(SparseAutoencoderConfig(d_in=D_IN, d_sae=4096, activation="relu", layer=0))
    part = objective.SaeInTraining(relu, SaeTrainingArguments(output_dir="unused", bf16_scores="on"))
    part.decide_scores()
    assert part.certified is None


def test_measuring_draws_no_random_number():
    state = torch.get_rng_state()
    certified.pays(D_IN, 1024)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=r"`bf16_scores` must be one of auto, on, off\. Received: bf16_scores='yes'"):
        SaeTrainingArguments(output_dir="unused", bf16_scores="yes")
