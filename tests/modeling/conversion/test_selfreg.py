"""SAEs of SelfReg: against the golden files, and against the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from sae_transformers import HiddenStateReader, SparseAutoencoder, selfreg_classifier
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random, top_k

FILE = "TopK7_l16_h65k_epoch5.pth"
CONFIG = {"d_inp": D, "d_hide": F, "topK": 3}


def weights(**changes: Any) -> dict[str, Any]:
    found = {**random(W_enc=(D, F), b_enc=(F,), b_dec=(D,)), "mask": torch.ones(F), **changes}
    return {name: value for name, value in found.items() if value is not None}


def assert_right(sae: Any) -> None:
    t = {name: value.double() for name, value in weights().items()}
    pre = (inputs().double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    latents = top_k(pre, pre.relu(), 3)
    assert_formula(sae, inputs(), latents, latents @ t["W_enc"].T + t["b_dec"])


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("selfreg"))
def test_golden(variant: str) -> None:
    sae = golden.check_variant("selfreg", variant)
    assert sae.config.read_at == "layers.15.resid_post"  # the file says l16 and counts from 1
    assert "mask" not in sae.config.metadata


@golden.needs_golden
@pytest.mark.parametrize("variant", [name for name in golden.variants("selfreg") if name != "topk_sae"])
def test_golden_classifier_is_no_sae(variant: str) -> None:
    with pytest.raises(ValueError, match="is a SelfReg classifier, with a copy of its SAE"):
        SparseAutoencoder.from_pretrained(golden.ROOT / "selfreg" / variant, sae_id="SelfReg/seed0.pt")


def test_formula(tmp_path: Path) -> None:
    torch.save({"weight": weights(), "config": CONFIG}, tmp_path / FILE)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert (sae.config.read_at, sae.config.tied, sae.config.k) == ("layers.15.resid_post", True, 3)
    assert sae.config.metadata["base_model"] == "mistralai/Mistral-7B-Instruct-v0.2"
    assert "W_enc" not in dict(sae.named_parameters())
    assert_right(sae)


def test_bare_state_dict(tmp_path: Path) -> None:
    folder = tmp_path / "Mistral_TopK_SAE_l8"
    folder.mkdir()
    torch.save(weights(mask=None), folder / "weights.pth")
    with pytest.raises(ValueError, match="Pass `k=`"):
        SparseAutoencoder.from_pretrained(folder)
    sae = SparseAutoencoder.from_pretrained(folder, k=3)
    assert sae.config.read_at == "layers.7.resid_post"
    assert_right(sae)
    torch.save({"weight": weights(), "config": CONFIG}, folder / "weights.pth")
    with pytest.raises(TypeError, match="all that is needed"):
        SparseAutoencoder.from_pretrained(folder, k=3)


def test_mask_is_kept_and_not_used(tmp_path: Path) -> None:
    mask = torch.zeros(F)
    mask[[1, 7]] = 1
    torch.save({"weight": weights(mask=mask), "config": CONFIG}, tmp_path / FILE)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert sae.config.metadata["mask"] == [1, 7]
    assert_right(sae)


def test_classifier_is_no_sae(tmp_path: Path) -> None:
    classifier = {"linear1.weight": torch.zeros(1, D), "linear1.bias": torch.zeros(1)}
    torch.save({"weight": classifier, "config": {"in_dim": D}}, tmp_path / "seed0.pt")
    with pytest.raises(ValueError, match="is a SelfReg classifier, not an SAE"):
        SparseAutoencoder.from_pretrained(tmp_path / "seed0.pt")


def test_repository_of_several(tmp_path: Path) -> None:
    other = "TopK7_l24_h65k_epoch5.pth"
    for name in (FILE, other):
        torch.save({"weight": weights(), "config": CONFIG}, tmp_path / name)
    with pytest.raises(ValueError, match=f"several SAEs: {FILE}, {other}"):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, sae_id=other).config.layer == 23


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_inp": D + 1}, "d_inp"), ({"d_hide": "many"}, "d_hide"), ({"topK": 0}, "k=0"),
        ({"topK": None}, "topK=None"), ({"topK": float("nan")}, "topK=nan"), ({"topK": F + 1}, "k=11"),
    ],
)  # fmt: skip
def test_config_that_lies(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    torch.save({"weight": weights(), "config": {**CONFIG, **config}}, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_enc": torch.zeros(F + 1)}, "b_enc .* shape"),
        ({"mask": torch.zeros(F - 1)}, "mask .* shape"),
        ({"W_enc": torch.zeros(F)}, "must be a matrix"),
        ({"b_dec": "zeros"}, "b_dec"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch.save({"weight": weights(**changes), "config": CONFIG}, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


# -- trained classifiers ----------------------------------------------------------------------------------------------


def base(n_labels: int, width: int = D) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=20, hidden_size=width, intermediate_size=8, num_hidden_layers=16, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    config.num_labels = n_labels
    return LlamaForSequenceClassification(config).eval()


def saved(folder: Path, n_labels: int = 1, **more: torch.Tensor) -> Path:
    torch.save({"weight": weights(), "config": CONFIG}, folder / FILE)
    linear = random(weight=(n_labels, D), bias=(n_labels,))
    classifier = {f"linear1.{name}": value for name, value in linear.items()}
    torch.save({"weight": {**classifier, **more}, "config": {"in_dim": D}}, folder / "seed0.pt")
    return folder / "seed0.pt"


@golden.needs_golden
@pytest.mark.parametrize("variant", [name for name in golden.variants("selfreg") if name != "topk_sae"])
def test_golden_classifier(variant: str) -> None:
    t, folder = golden.tensors("selfreg", variant), golden.ROOT / "selfreg" / variant
    features: Any = {}
    if "clf.mask" in t:
        features = t["clf.mask"].nonzero().flatten().tolist()
    else:  # diseases: a list for each of the first two labels
        features = {row: t[f"clf.mask{row + 1}"].nonzero().flatten().tolist() for row in (0, 1)}
    model = base(len(t["clf.bias"]), t["clf.h"].shape[1])
    sae = SparseAutoencoder.from_pretrained(next(folder.glob("*.pth")))
    model = selfreg_classifier(model, folder / "SelfReg" / "seed0.pt", sae, features)
    head, states = model.feature_head, ("", "2") if "clf.h2" in t else ("",)
    assert head is not None
    for name in states:
        removed = head.read(t[f"clf.h{name}"][:, None], None, model.saes[0])
        golden.assert_rows_close(removed, t[f"clf.removed_h{name}"], "removed")
    head.linear.weight.data.copy_(t["clf.weight"])  # the golden output's, which the file's need not be
    head.linear.bias.data.copy_(t["clf.bias"])
    for name in states:
        logits = model(pooled_states=t[f"clf.removed_h{name}"]).logits
        logits = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)
        golden.assert_rows_close(logits, t[f"clf.output{name}"], "output")
    factor = golden.facts("selfreg", variant)["settings"]["penalty_factor"]
    torch.testing.assert_close(factor * head.penalty(model.saes[0]), t["clf.penalty"][0], rtol=1e-5, atol=1e-6)


def test_a_classifier_scores_the_last_token_without_its_features(tmp_path: Path) -> None:
    file = saved(tmp_path, **{f"sae.{name}": value for name, value in weights().items()})
    ids = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    model = base(1)
    made = selfreg_classifier(model, file, tmp_path, [1, 5])
    t = {name: value.double() for name, value in weights().items()}
    linear = torch.load(file, weights_only=True)["weight"]
    reader = HiddenStateReader(model, ["layers.15.resid_post"])
    h = reader.read(list(ids), [torch.tensor([6])] * 3)["layers.15.resid_post"].double()
    pre = ((h - t["b_dec"]) @ t["W_enc"] + t["b_enc"])[:, [1, 5]].relu()
    x = h - t["b_dec"] - pre @ t["W_enc"][:, [1, 5]].T
    expected = x @ linear["linear1.weight"].double().T + linear["linear1.bias"].double()
    torch.testing.assert_close(made(ids).logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_baseline_scores_the_state_itself(tmp_path: Path) -> None:
    ids, model, file = torch.arange(1, 8)[None], base(3), saved(tmp_path, 3)
    h = HiddenStateReader(model, ["layers.15.resid_post"]).read([ids[0]], [torch.tensor([6])])["layers.15.resid_post"]
    linear = torch.load(file, weights_only=True)["weight"]
    logits = selfreg_classifier(model, file, tmp_path)(ids).logits
    torch.testing.assert_close(logits, h @ linear["linear1.weight"].T + linear["linear1.bias"], rtol=1e-5, atol=1e-6)


def test_what_is_no_such_classifier_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, **{f"sae.{name}": value for name, value in weights(b_enc=torch.ones(F)).items()})
    with pytest.raises(ValueError, match="trained with another SAE: .* Received: an SAE whose b_enc differs"):
        selfreg_classifier(base(1), file, tmp_path)
    with pytest.raises(ValueError, match="has 1 label.* Received: a model of num_labels=3"):
        selfreg_classifier(base(3), file, tmp_path)
    with pytest.raises(ValueError, match="has `linear1.weight`. Received: .*epoch5.pth, which has none"):
        selfreg_classifier(base(1), tmp_path / FILE, tmp_path)
    with pytest.raises(FileNotFoundError, match="SelfReg/seed0.pt. Received"):
        selfreg_classifier(base(1), tmp_path / "none.pt", tmp_path)
