import pytest
import torch

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.evaluation.detection.metrics import auroc
from sae_transformers.training.sae.in_memory import fit_conditioned_sae
from sae_transformers.training.sae.initialization import point_latent_at, usual_norm

D_IN = 16


def new_sae(**settings) -> SparseAutoencoder:
    torch.manual_seed(0)
    defaults = {"d_in": D_IN, "d_sae": 32, "activation": "topk", "k": 4, "layer": 0, "concepts": {"planted": 3}}
    return SparseAutoencoder(SparseAutoencoderConfig(**{**defaults, **settings}))


def planted_data(n: int = 2000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(D_IN, generator=generator)
    labels = torch.arange(n) % 2
    hidden = torch.randn(n, D_IN, generator=generator) + labels[:, None] * direction
    return hidden, labels, direction


def test_the_latent_learns_to_detect_and_its_decoder_to_point_along_the_concept() -> None:
    hidden, labels, direction = planted_data()
    sae, steps = new_sae(), []
    before = sae.losses(hidden)["reconstruction"].item()
    result = fit_conditioned_sae(
        sae, hidden, labels[:, None], steps=60, tokens_per_step=256, report=lambda *at: steps.append(at)
    )
    scores = sae.encode_pre_acts(hidden, features=torch.tensor([3]))[:, 0].detach()
    assert auroc(scores, labels) > 0.95
    assert torch.cosine_similarity(sae.W_dec[3], direction, dim=0) > 0.8
    assert sae.losses(hidden)["reconstruction"].item() < before
    assert steps == [(i, 60) for i in range(1, 61)]
    assert result["tokens"] == 2000 and result["left_out"] == 0 and not sae.training


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    hidden, labels, _ = planted_data(300)
    saes = [new_sae(), new_sae(), new_sae()]
    for sae, seed in zip(saes, (0, 0, 1), strict=True):
        fit_conditioned_sae(sae, hidden, labels[:, None], steps=5, tokens_per_step=64, seed=seed)
    assert torch.equal(saes[0].W_enc, saes[1].W_enc)
    assert not torch.equal(saes[0].W_enc, saes[2].W_enc)


def test_a_token_of_unusual_norm_changes_nothing() -> None:
    hidden, labels, _ = planted_data(300)
    with_outlier = torch.cat([hidden, torch.full((1, D_IN), 1e5)])
    saes = [new_sae(), new_sae()]
    fit_conditioned_sae(saes[0], hidden, labels[:, None], steps=5, tokens_per_step=64)
    result = fit_conditioned_sae(
        saes[1], with_outlier, torch.cat([labels, labels[:1]])[:, None], steps=5, tokens_per_step=64
    )
    assert result["left_out"] == 1
    assert torch.equal(saes[0].W_dec, saes[1].W_dec)
    assert usual_norm(with_outlier).tolist() == [True] * 300 + [False]


def test_unknown_labels_do_not_condition() -> None:
    hidden, labels, _ = planted_data(300)
    unknown = torch.cat([labels, torch.full((300,), -100)])[:, None]
    sae = new_sae()
    fit_conditioned_sae(sae, torch.cat([hidden, hidden]), unknown, steps=3, tokens_per_step=64)
    assert torch.isfinite(sae.W_enc).all()


def test_point_latent_at_sets_one_unit_direction() -> None:
    sae, direction = new_sae(), torch.arange(1.0, D_IN + 1)
    others = sae.W_dec[4:].clone()
    point_latent_at(sae, 3, direction)
    torch.testing.assert_close(sae.W_dec[3], direction / direction.norm())
    torch.testing.assert_close(sae.W_enc[:, 3], direction / direction.norm())
    assert torch.equal(sae.W_dec[4:], others)
    with pytest.raises(ValueError, match=r"norm 0\.0"):
        point_latent_at(sae, 3, torch.zeros(D_IN))


@pytest.mark.parametrize(
    ("changes", "received"),
    [
        ({"hidden": torch.zeros(4, 5)}, r"\(4, 5\)"),
        ({"labels": torch.zeros(4, 2)}, r"\(4, 2\)"),
        ({"hidden": torch.full((4, D_IN), torch.nan)}, "NaN"),
        ({"steps": 0}, "steps=0"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
    ],
)
def test_bad_input_is_refused(changes: dict, received: str) -> None:
    given = {"hidden": torch.zeros(4, D_IN), "labels": torch.zeros(4, 1), "steps": 1, **changes}
    with pytest.raises(ValueError, match=received):
        fit_conditioned_sae(new_sae(), given.pop("hidden"), given.pop("labels"), **given)
