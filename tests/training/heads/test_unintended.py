import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_transformers.training.heads import unintended
from sae_transformers.training.heads.unintended import counterfactual_features, read_feature_table
from tests.tiny import WIDTH, tiny_sae

F64 = torch.float64


def pairs(n: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, n, WIDTH, dtype=F64, generator=generator)
    return states[0], states[0] + 0.3 * states[1]


def test_scores_are_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, (original, swapped) = tiny_sae(dtype=F64, activation="relu"), pairs()
    z, other = sae.encode(original).detach(), sae.encode(swapped).detach()
    monkeypatch.setattr(unintended, "AT_ONCE", 64 * 7)  # several blocks, the last one smaller
    found = counterfactual_features(sae, original, swapped)
    expected = (z - other).abs().mean(0) / (z.mean(0) + other.mean(0) + 1e-6)
    torch.testing.assert_close(found["scores"], expected)
    assert float(found["scores"].min()) >= 0 and float(found["scores"].max()) <= 1
    change = z - other
    t = change.mean(0).abs() / (change.std(0) / 50**0.5)
    found = counterfactual_features(sae, original, swapped, statistic="paired_t")
    torch.testing.assert_close(found["scores"], torch.where(change.mean(0) == 0, 0.0, t))


def test_latents_of_several_tokens_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, (tokens, others) = tiny_sae(dtype=F64), pairs()
    texts = torch.tensor([0] * 20 + [1] * 5 + [2] * 25), torch.tensor([0] * 3 + [1] * 40 + [2] * 7)
    z, other = (
        torch.stack([sae.encode(states[index == i]).mean(0) for i in range(3)]).detach()
        for states, index in zip((tokens, others), texts, strict=True)
    )
    expected = (z - other).abs().mean(0) / (z.mean(0) + other.mean(0) + 1e-6)
    for at_once in (1 << 22, 64 * 2):
        monkeypatch.setattr(unintended, "AT_ONCE", at_once)
        torch.testing.assert_close(counterfactual_features(sae, tokens, others, texts=texts)["scores"], expected)
    for wrong in (texts[0].flip(0), texts[0] * 2, texts[0] - 1, texts[0][:4]):
        with pytest.raises(ValueError, match="`texts` must number"):
            counterfactual_features(sae, tokens, others, texts=(wrong, texts[1]))
    with pytest.raises(ValueError, match="3 and 2 texts"):
        counterfactual_features(sae, tokens, others[:43], texts=(texts[0], texts[1][:43]))


def test_a_latent_of_the_attribute_comes_first_and_no_change_names_none() -> None:
    sae = tiny_sae(dtype=F64, activation="relu")
    attribute = sae.W_enc[:, 7].detach()
    states = torch.randn(40, WIDTH, dtype=F64)
    across = states - (states @ attribute)[:, None] * attribute / attribute.square().sum()
    swapped = across + 3 * attribute
    assert counterfactual_features(sae, across, swapped, statistic="paired_t")["indices"][0] == 7
    assert 7 in counterfactual_features(sae, across, swapped, top=5)["indices"]
    assert len(counterfactual_features(sae, states, states)["indices"]) == 0


def test_top_and_threshold() -> None:
    sae, (original, swapped) = tiny_sae(dtype=F64), pairs()
    scores = counterfactual_features(sae, original, swapped)["scores"]
    high = counterfactual_features(sae, original, swapped, threshold=0.4)["indices"]
    assert set(high.tolist()) == set((scores > 0.4).nonzero()[:, 0].tolist())
    assert bool((scores[high].diff() <= 0).all())
    top = counterfactual_features(sae, original, swapped, top=3, threshold=0.4)["indices"]
    assert torch.equal(top, high[:3])


@pytest.mark.parametrize(
    ("change", "options", "received"),
    [
        ((slice(3),), {}, "50 and 3 texts"),
        ((slice(None), slice(4)), {}, r"\(50, 4\)"),
        ((slice(None),), {"statistic": "t"}, "statistic='t'"),
        ((slice(None),), {"top": 0}, "top=0"),
    ],
)
def test_bad_pairs_are_refused(change: tuple, options: dict, received: str) -> None:
    original, swapped = pairs()
    with pytest.raises(ValueError, match=received):
        counterfactual_features(tiny_sae(dtype=F64), original, swapped[change], **options)


def test_states_that_are_not_finite_are_refused() -> None:
    original, swapped = pairs()
    swapped[3, 3] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        counterfactual_features(tiny_sae(dtype=F64), original, swapped)


TABLES = {
    "ids.txt": "# names\n9\n3\n\n9\n",
    "plain.csv": "3,a name\n9,another\n",
    "named.csv": 'name,feature\n"a, b",9\nc,3\nd,3\n',
    "selfreg.tsv": "FeatureID\tTask\tWords\n3\tno\tx\n9\tmaybe\ty\n",
    "list.json": json.dumps([9, 3, 3]),
    "object.json": json.dumps({"sae": "x", "features": [3, 9]}),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8")
    assert read_feature_table(tmp_path / name, 64).tolist() == [3, 9]


@pytest.mark.parametrize(
    ("name", "text", "received"),
    [
        ("a.txt", "3\n64\n", "64 in a.txt, line 2"),
        ("a.txt", "-1\n", "-1 in a.txt"),
        ("a.txt", "3.5\n", "'3.5'"),
        ("a.csv", "name,score\na,1\n", "'name', 'score'"),
        ("a.tsv", "name\tfeature\na\n", "'' in a.tsv, line 2"),
        ("a.json", "[1.0]", "1.0 in a.json, entry 0"),
        ("a.json", "[true]", "True"),
        ("a.json", '{"ids": [1]}', "a.json"),
        ("a.parquet", "", "a.parquet"),
    ],
)
def test_bad_tables_are_refused(name: str, text: str, received: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=received):
        read_feature_table(tmp_path / name, 64)


def test_an_empty_table_is_no_features(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert read_feature_table(tmp_path / "a.txt", 64).shape == (0,)
