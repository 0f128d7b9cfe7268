import pytest
import torch
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from sae_transformers.evaluation.detection.sparse_probing import fit_sparse_probe, rank_latents
from sae_transformers.latents.sparse_codes import SparseCodes

LABELS = torch.arange(60) % 2


def matrix(seed: int = 0) -> torch.Tensor:
    """(60, 20), sparse; latents 3 and 11 say the label, 11 the better."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(60, 20, generator=generator, dtype=torch.float64).relu()
    dense[:, 7] = 0  # never active
    dense[:, 3] += 1.0 * LABELS
    dense[:, 11] += 2.0 * LABELS
    return dense


def test_latents_are_ranked_by_difference_or_auroc() -> None:
    dense = matrix()
    ranked = rank_latents(SparseCodes.from_dense(dense), LABELS)
    expected = (dense[LABELS == 1].mean(0) - dense[LABELS == 0].mean(0)).abs()
    assert ranked.tolist() == [i for i in expected.argsort(descending=True).tolist() if i != 7]
    areas = torch.tensor([roc_auc_score(LABELS, column) for column in dense.T])
    by_area = rank_latents(SparseCodes.from_dense(dense), LABELS, "auroc")
    strength = (areas - 0.5).abs()
    assert bool((strength[by_area].diff() <= 1e-12).all()) and set(by_area.tolist()) == set(range(20)) - {7}
    assert ranked[0] == by_area[0] == 11 and 7 not in by_area
    f, _ = f_classif(dense[:, torch.arange(20) != 7], LABELS)
    assert int(torch.tensor(f).argmax()) == 10  # latent 11, without 7: another judge agrees on the best


def test_scale_sways_the_difference_and_not_the_auroc() -> None:
    dense = matrix()
    dense[:, 5] *= 1000
    codes = SparseCodes.from_dense(dense)
    assert rank_latents(codes, LABELS)[0] == 5 and rank_latents(codes, LABELS, "auroc")[0] == 11


def test_a_probe_is_scikit_learns_on_standardised_columns() -> None:
    dense = matrix()
    probe = fit_sparse_probe(SparseCodes.from_dense(dense), LABELS, [11, 3, 5])
    columns = dense[:, [11, 3, 5]].numpy()
    scaler = StandardScaler().fit(columns)
    n = len(columns)  # scikit-learn divides by n, torch by n - 1
    scaled = scaler.transform(columns) * ((n - 1) / n) ** 0.5
    fit = LogisticRegression(max_iter=1000).fit(scaled, LABELS.numpy())
    other = matrix(seed=1)
    held = scaler.transform(other[:, [11, 3, 5]].numpy()) * ((n - 1) / n) ** 0.5
    expected = torch.from_numpy(fit.decision_function(held)).float()
    assert torch.allclose(probe.score(SparseCodes.from_dense(other)), expected, atol=1e-3)
    assert probe.latents.tolist() == [11, 3, 5]


def test_a_latent_that_does_not_vary_does_no_harm() -> None:
    dense = matrix()
    dense[:, 5] = 1.0
    assert bool(
        fit_sparse_probe(SparseCodes.from_dense(dense), LABELS, [5])
        .score(SparseCodes.from_dense(dense))
        .isfinite()
        .all()
    )


def test_bad_input_is_refused() -> None:
    codes = SparseCodes.from_dense(matrix())
    with pytest.raises(ValueError, match="by='best'"):
        rank_latents(codes, LABELS, "best")
    with pytest.raises(ValueError, match="0 of label 1, 60 of label 0"):
        rank_latents(codes, LABELS * 0)
    with pytest.raises(ValueError, match=r"shape \(0,\), 60 labels"):
        fit_sparse_probe(codes, LABELS, [])
    with pytest.raises(ValueError, match="59 labels"):
        fit_sparse_probe(codes, LABELS[1:], [3])
