import pytest
import torch

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig, SparseFeatures, Steering
from sae_transformers.evaluation.reconstruction.metrics import (
    ReconstructionMeter,
    ce_loss_recovered,
    cosine_similarity,
    fvu,
    l0,
    measure_reconstruction,
    normalized_mse,
    replaced_losses,
    site_means,
)
from tests.tiny import WIDTH, prompt, tiny_model, tiny_sae

TARGET = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
OUTPUT = torch.tensor([[3.0, 0.0], [0.0, 1.0]])


def test_golden_numbers() -> None:
    # squared errors 16 and 1; squared norms 25 and 4; about the mean (1.5, 3): 3.25 each
    assert fvu(TARGET, OUTPUT) == pytest.approx(17 / 6.5, abs=1e-12)
    assert normalized_mse(TARGET, OUTPUT) == pytest.approx((16 / 25 + 1 / 4) / 2, abs=1e-12)
    assert cosine_similarity(TARGET, OUTPUT) == pytest.approx((9 / 15 + 1) / 2, abs=1e-12)
    assert l0(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])) == 1.5
    assert l0(SparseFeatures(torch.tensor([[4, 0], [2, 1]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]]), 9)) == 1.5


def test_limits() -> None:
    x = torch.randn(50, 6)
    assert (fvu(x, x), normalized_mse(x, x)) == (0.0, 0.0)
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1, abs=1e-6)
    assert normalized_mse(x, torch.zeros_like(x)) == pytest.approx(1, abs=1e-12)
    assert cosine_similarity(x, -3 * x) == pytest.approx(-1, abs=1e-6)


def test_batches_give_what_one_batch_gives_and_a_large_mean_does_no_harm() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, 7, generator=generator) + 1e4
    rebuilt = x + 0.1 * torch.randn(101, 7, generator=generator)
    latents = torch.randn(101, 30, generator=generator).relu() * (torch.arange(30) % 3 > 0)
    meter = ReconstructionMeter(30)
    for rows in torch.arange(101).split(13):
        meter.update(x[rows], rebuilt[rows], SparseFeatures.from_dense(latents[rows]))
    meter.update(x[:0], rebuilt[:0])  # an empty batch changes nothing
    found = meter.result()
    x64 = x.double()
    expected = (rebuilt.double() - x64).square().sum() / (x64 - x64.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(expected), rel=1e-9)
    assert found["fvu"] == pytest.approx(fvu(x, rebuilt), rel=1e-9)
    assert found["normalized_mse"] == pytest.approx(normalized_mse(x, rebuilt), rel=1e-9)
    assert found["l0"] == pytest.approx(l0(latents), rel=1e-12)
    assert (found["dead_share"], found["tokens"]) == (pytest.approx(1 / 3), 101)


def test_what_does_not_vary_is_refused() -> None:
    with pytest.raises(ValueError, match="1 tokens"):
        fvu(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="0 tokens"):
        ReconstructionMeter().result()
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        ReconstructionMeter().update(torch.ones(2, 3), torch.ones(3))


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_an_sae_over_batches(activation: str) -> None:
    sae = tiny_sae(activation=activation)
    x = torch.randn(90, WIDTH, generator=torch.Generator().manual_seed(0))
    out = sae(x)
    found = measure_reconstruction(sae, [x[:40], x[40:]], tokens_at_once=16)
    assert found["fvu"] == pytest.approx(fvu(x, out.reconstruction.detach()), rel=1e-5)
    assert found["l0"] == pytest.approx(l0(out.latents), rel=1e-6)
    assert found["dead_share"] == pytest.approx(float((out.latents == 0).all(0).float().mean()))


def test_of_a_transcoder_against_its_targets():
    sae = tiny_sae(hook="m.input", hook_out="m", activation="relu", apply_b_dec_to_input=False)
    x, y = torch.randn(2, 50, WIDTH, generator=torch.Generator().manual_seed(3))
    found = measure_reconstruction(sae, [x[:30], x[30:]], targets=[y[:30], y[30:]], tokens_at_once=16)
    with torch.no_grad():
        left = y - sae(x).reconstruction
    assert found["fvu"] == pytest.approx(float(left.square().sum() / (y - y.mean(0)).square().sum()), rel=1e-5)
    with pytest.raises(ValueError, match="Expected `targets`, the states at m. Received: none"):
        measure_reconstruction(sae, [x])


def identity_sae(**settings) -> SparseAutoencoder:
    config = SparseAutoencoderConfig(d_in=WIDTH, d_sae=WIDTH, activation="identity", layer=1, **settings)
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(WIDTH))
        sae.W_dec.copy_(torch.eye(WIDTH))
    return sae


def zero_sae(**settings) -> SparseAutoencoder:
    sae = identity_sae(**settings)
    with torch.no_grad():
        sae.W_dec.zero_()
    return sae


BATCHES = [{"input_ids": prompt(3, 12)}, {"input_ids": prompt(2, 9, seed=4)}]


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_identity_recovers_all_and_zeros_nothing(site: str, architecture: str) -> None:
    model = tiny_model(architecture, saes=[identity_sae(site=site), zero_sae(site=site)])
    kept = [model.saes[0], model.saes[1]]
    full = ce_loss_recovered(model, BATCHES)
    assert full["recovered"] == pytest.approx(1, abs=1e-6) == full["recovered_from_mean"]
    none = ce_loss_recovered(model, iter(BATCHES), saes=[1])
    assert none["recovered"] == 0.0
    assert full["ce_zero"] == none["ce_sae"] != full["ce_base"]
    assert full["tokens"] == 3 * 11 + 2 * 8
    assert [model.saes[0], model.saes[1]] == kept  # what stood in for them is gone


def test_cross_entropies_are_those_of_the_model() -> None:
    model = tiny_model()
    ids = prompt(3, 12)
    found = ce_loss_recovered(model, [{"input_ids": ids}], skip_first=0)
    with torch.no_grad():
        assert found["ce_base"] == pytest.approx(float(model.lm(ids, labels=ids).loss), rel=1e-6)
        for name, constant in (("ce_zero", torch.zeros(WIDTH)), ("ce_mean", None)):
            hidden = model(ids, output_sae_inputs=True, stop_at_last_sae=True).sae_inputs[0]
            value = hidden.mean((0, 1)) if constant is None else constant
            handle = model.lm.model.layers[1].register_forward_hook(
                lambda module, args, out, value=value: value.expand_as(out)
            )
            assert found[name] == pytest.approx(float(model.lm(ids, labels=ids).loss), rel=1e-5)
            handle.remove()


def test_padding_and_first_tokens_do_not_count() -> None:
    model = tiny_model()
    ids = prompt(2, 10)
    alone = ce_loss_recovered(model, [{"input_ids": ids}])
    for side in ("left", "right"):
        pad = torch.zeros(2, 3, dtype=torch.long)
        ones = torch.ones_like(ids)
        order = [pad, ids] if side == "left" else [ids, pad]
        mask = torch.cat([pad, ones] if side == "left" else [ones, pad], dim=1)
        padded = ce_loss_recovered(model, [{"input_ids": torch.cat(order, dim=1), "attention_mask": mask}])
        assert padded == pytest.approx(alone, rel=1e-5)
    assert ce_loss_recovered(model, [{"input_ids": ids}], skip_first=0)["ce_zero"] != alone["ce_zero"]


def test_bad_input_is_refused_and_the_saes_stay() -> None:
    model = tiny_model()
    sae = model.saes[0]
    with pytest.raises(ValueError, match="no token to predict"):
        ce_loss_recovered(model, [{"input_ids": prompt(2, 1)}])
    with pytest.raises(ValueError, match="changes nothing"):
        ce_loss_recovered(model, [{"input_ids": prompt(2, 5)}], skip_first=5)
    assert model.saes[0] is sae
    transcoder = SparseAutoencoderConfig(
        d_in=WIDTH, d_sae=8, apply_b_dec_to_input=False, hook="model.layers.1.mlp.input", hook_out="model.layers.1.mlp"
    )
    model = tiny_model(saes=[SparseAutoencoder(transcoder)])
    with pytest.raises(ValueError, match=r"layers.1.mlp.input and model.layers.1.mlp"):
        ce_loss_recovered(model, BATCHES)


@pytest.mark.parametrize("side", ["left", "right"])
def test_divergences_are_those_of_whole_distributions(side: str) -> None:
    """Of texts of 3, 9 and 14 tokens, padded, to what one log-softmax of everything gives."""
    model, ids, lengths = tiny_model(), prompt(3, 14), torch.tensor([3, 9, 14])[:, None]
    place = torch.arange(14)
    mask = (place >= 14 - lengths if side == "left" else place < lengths).long()
    batches = [{"input_ids": ids, "attention_mask": mask}]
    means = site_means(model, batches, [0])
    [found] = replaced_losses(model, batches, [[0]], means, count_first=False, kl=True)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    steering = Steering(reconstruct=(0,), positions=[(1, None)])
    with torch.no_grad():
        base, other = (model(**inputs, steering=s).logits[:, :-1].double().log_softmax(-1) for s in (False, steering))
    counts = (mask[:, 1:] * mask[:, :-1] * (mask.cumsum(-1)[:, :-1] > 1)).double()
    assert found.tokens.tolist() == counts.sum(1).tolist() == [1.0, 7.0, 12.0]
    kl = ((base.exp() * (base - other)).sum(-1) * counts).sum(1)
    ce = (-other.gather(-1, ids[:, 1:, None])[..., 0] * counts).sum(1)
    assert kl.min() > 1e-3
    torch.testing.assert_close(found.kl["sae"], kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.ce["sae"], ce, rtol=1e-5, atol=1e-5)


def padded_batch() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([3, 9, 14])[:, None]
    return {"input_ids": prompt(3, 14), "attention_mask": (torch.arange(14) < lengths).long()}


@pytest.mark.parametrize(("count_first", "rows"), [(True, 2 + 8 + 13), (False, 1 + 7 + 12)])
def test_no_logits_are_made_of_padding_and_of_what_does_not_count(count_first: bool, rows: int) -> None:
    model, batch, made = tiny_model(), padded_batch(), []
    handle = model.lm.lm_head.register_forward_hook(lambda module, args, out: made.append(out.shape[:-1].numel()))
    means = {0: torch.zeros(WIDTH, dtype=torch.float64)}
    replaced_losses(model, [batch], [[0]], means, count_first=count_first, kl=True)
    assert made == [rows] * 4  # the base, the SAE, zeros, means
    handle.remove()
    assert model(**batch).logits.shape[:2] == (3, 14)  # nothing stays at the head
    assert not model.lm.lm_head._forward_pre_hooks


@pytest.mark.parametrize("why", ["no head is known", "an SAE is at the head"])
def test_losses_are_the_same_where_logits_of_all_places_are_made(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = padded_batch()
    at_head = SparseAutoencoder(SparseAutoencoderConfig(d_in=WIDTH, d_sae=8, hook="lm_head.input"))
    saes = [tiny_sae(layer=1), *([at_head] if why == "an SAE is at the head" else [])]
    model = tiny_model(saes=saes)
    means = {0: site_means(model, [batch], [0])[0]}
    [narrow] = replaced_losses(tiny_model(saes=[saes[0]]), [batch], [[0]], means, kl=True)
    made: list[int] = []
    model.lm.lm_head.register_forward_hook(lambda module, args, out: made.append(out.shape[:-1].numel()))
    if why == "no head is known":
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    [whole] = replaced_losses(model, [batch], [[0]], means, kl=True)
    assert made == [3 * 14] * 4
    for name in ("sae", "zero", "mean"):
        torch.testing.assert_close(whole.ce[name], narrow.ce[name], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(whole.kl[name], narrow.kl[name], rtol=1e-4, atol=1e-5)
