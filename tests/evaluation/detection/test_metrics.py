import sys

import pytest
import torch
from sklearn.metrics import roc_auc_score

from sae_transformers.evaluation.detection.metrics import auroc, code_aurocs, fit_linear_probe, mean_by_text
from sae_transformers.latents.sparse_codes import encode_texts
from tests.tiny import WIDTH, tiny_sae


@pytest.mark.parametrize("values", [None, 2, 5, 1], ids=["no ties", "two values", "five values", "one value"])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_equals_scikit_learn_with_ties_and_imbalance(values: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(211, generator=generator) < 0.2).long()
    scores = torch.randn(211, generator=generator)
    if values is not None:
        scores = torch.randint(values, (211,), generator=generator).float()
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auroc_of_known_orders() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), labels) == 1.0
    assert auroc(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels) == 0.0
    assert auroc(torch.tensor([1.0, 3.0, 3.0, 4.0]), labels) == 0.875  # one tie among four pairs


@pytest.mark.parametrize(
    ("scores", "labels", "received"),
    [
        (torch.zeros(3), torch.tensor([0, 1]), r"\(3,\)"),
        (torch.tensor([0.0, torch.nan]), torch.tensor([0, 1]), "1 that are not"),
        (torch.zeros(2), torch.tensor([0, 2]), r"\[0, 2\]"),
        (torch.zeros(2), torch.tensor([1, 1]), "2 positive, 0 negative"),
    ],
)
def test_auroc_refuses(scores: torch.Tensor, labels: torch.Tensor, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        auroc(scores, labels)


def test_mean_by_text_equals_a_loop() -> None:
    values, index = torch.randn(50, 3), torch.randint(4, (50,))
    index[:4] = torch.arange(4)
    expected = torch.stack([values[index == i].mean(0) for i in range(4)])
    torch.testing.assert_close(mean_by_text(values, index, 4), expected)
    torch.testing.assert_close(mean_by_text(values[:, 0], index, 4), expected[:, 0])


def test_mean_by_text_refuses_a_text_without_tokens() -> None:
    with pytest.raises(ValueError, match="1 texts without"):
        mean_by_text(torch.zeros(2), torch.tensor([0, 2]), 3)


def tokens_of_texts(n_texts: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, the text of each token, a label for each text that shows in the first direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n_texts, generator=generator) < 0.4).long()
    index = torch.randint(n_texts, (n_texts * 8,), generator=generator)
    index[:n_texts] = torch.arange(n_texts)
    hidden = torch.randn(len(index), WIDTH, generator=generator)
    hidden[:, 0] += labels[index]
    return hidden, index, labels


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_aurocs_of_all_latents_equal_one_by_one(activation: str) -> None:
    sae = tiny_sae(activation=activation)
    with torch.no_grad():
        sae.b_enc[5] = -1e6  # never active
    hidden, index, labels = tokens_of_texts()
    codes = encode_texts(sae, hidden, index, len(labels), tokens_at_once=50)
    found = code_aurocs(codes, labels, latents_at_once=13)
    means = mean_by_text(sae.encode(hidden).detach(), index, len(labels))
    expected = torch.tensor([auroc(column, labels) for column in means.T], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found[5] == 0.5
    assert found.max() > 0.6


def test_a_latent_along_the_concept_is_the_best() -> None:
    sae = tiny_sae(activation="relu")
    hidden, index, labels = tokens_of_texts(200)
    with torch.no_grad():
        sae.W_enc[:, 9] = torch.nn.functional.one_hot(torch.tensor(0), WIDTH).float()
        sae.b_enc[9] = 0.0
    assert int(code_aurocs(encode_texts(sae, hidden, index, len(labels)), labels).argmax()) == 9


def test_code_aurocs_refuses() -> None:
    hidden, index, labels = tokens_of_texts()
    codes = encode_texts(tiny_sae(), hidden, index, len(labels))
    for given in (labels[:-1], torch.cat([labels, labels[:1]])):
        with pytest.raises(ValueError, match=rf"labels \({len(given)},\)"):
            code_aurocs(codes, given)
    with pytest.raises(ValueError, match="0 positive"):
        code_aurocs(codes, torch.zeros_like(labels))


def test_linear_probe_finds_a_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 20, generator=generator) * torch.logspace(-2, 2, 20) + 50  # scales differ
    direction = torch.zeros(20)
    direction[[2, 11]] = 1 / torch.logspace(-2, 2, 20)[[2, 11]]
    chance = torch.sigmoid(2 * (x - 50) @ direction)
    labels = (torch.rand(600, generator=generator) < chance).long()
    probe = fit_linear_probe(x[:400], labels[:400])
    best = auroc(x[400:] @ direction, labels[400:])
    assert auroc(probe.score(x[400:]), labels[400:]) > best - 0.03
    assert auroc(probe.score(x[400:]), labels[400:]) == auroc(x[400:] @ probe.weight, labels[400:])
    assert torch.equal(fit_linear_probe(x[:400], labels[:400]).weight, probe.weight)
    shown = float((torch.sigmoid(probe.score(x[:400])).mean() - labels[:400].float().mean()).abs())
    assert shown < 1e-3  # logistic regression reproduces the mean


@pytest.mark.parametrize(
    ("hidden", "labels", "received"),
    [
        (torch.zeros(3), torch.tensor([0, 1, 1]), r"hidden \(3,\)"),
        (torch.full((4, 2), torch.nan), torch.tensor([0, 0, 1, 1]), "finite"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 1]), r"\[1, 2\] of 3"),
        (torch.zeros(4, 2), torch.tensor([0, 0, -100, 1]), r"\[2, 1\] of 4"),
    ],
)
def test_linear_probe_refuses(hidden: torch.Tensor, labels: torch.Tensor, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        fit_linear_probe(hidden, labels)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'sae-transformers\[evaluation\]'"):
        fit_linear_probe(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
