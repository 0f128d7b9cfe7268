from __future__ import annotations

import pytest
import torch
from sklearn.metrics import explained_variance_score, r2_score
from sklearn.metrics.pairwise import paired_cosine_distances

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.evaluation.reconstruction.metrics import ce_loss_recovered, measure_reconstruction
from sae_transformers.evaluation.results import SuiteResult
from sae_transformers.evaluation.settings import BootstrapSettings
from sae_transformers.evaluation.suites import ReconstructionSuite
from sae_transformers.latents.settings import ReadingSettings
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import WIDTH, tiny_model, tiny_sae

TEXTS = word_texts(12, shortest=4, longest=10)


def suite(saes: list[SparseAutoencoder], **options) -> SuiteResult:
    reading = ReadingSettings(**{"max_length": 12, "tokens_per_batch": 40, **options})
    return ReconstructionSuite(TEXTS, reading, BootstrapSettings(50))(tiny_model(saes=saes), word_tokenizer())


def made(weight: float, b_dec: torch.Tensor | None = None, **settings) -> SparseAutoencoder:
    """x -> weight * x + b_dec."""
    config = SparseAutoencoderConfig(
        d_in=WIDTH, d_sae=WIDTH, activation="identity", apply_b_dec_to_input=False, **{"layer": 1, **settings}
    )
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(WIDTH))
        sae.W_dec.copy_(weight * torch.eye(WIDTH))
        if b_dec is not None:
            sae.b_dec.copy_(b_dec)
    return sae


def states(saes: list[SparseAutoencoder], number: int = 0) -> torch.Tensor:
    """(n_tokens, d) that the SAE reads, first tokens left out, text by text."""
    model, tokenizer = tiny_model(saes=saes), word_tokenizer()
    found = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        found.append(model(input_ids=ids, output_sae_inputs=True).sae_inputs[number][0, 1:].detach())
    return torch.cat(found)


def test_a_perfect_sae_explains_and_recovers_all() -> None:
    found = suite([made(1.0)])
    assert found.value("fvu", "SAE 0") == pytest.approx(0, abs=1e-9)
    assert found.value("explained_variance", "SAE 0") == pytest.approx(1, abs=1e-9)
    assert found.value("normalized_mse", "SAE 0") == pytest.approx(0, abs=1e-9)
    assert found.value("cosine_similarity", "SAE 0") == pytest.approx(1, abs=1e-6)
    assert found.value("recovered", "SAE 0") == pytest.approx(1, abs=1e-5)
    assert found.value("recovered_from_mean", "SAE 0") == pytest.approx(1, abs=1e-5)
    assert found.value("kl_nats", "SAE 0") == pytest.approx(0, abs=1e-5)
    assert found.value("l0", "SAE 0") == WIDTH and found.value("dead_share", "SAE 0") == 0


def test_an_sae_of_zeros_loses_what_zeros_lose_and_the_mean_explains_nothing() -> None:
    zeros = suite([made(0.0)])
    x = states([made(0.0)])
    spread = (x - x.mean(0)).square().sum()
    assert zeros.value("fvu", "SAE 0") == pytest.approx(float(x.square().sum() / spread), rel=1e-5)
    assert zeros.value("recovered", "SAE 0") == 0.0 and zeros.value("normalized_mse", "SAE 0") == pytest.approx(1)
    assert zeros.value("ce_nats", "SAE 0") == zeros.value("ce_nats", "zeros at SAE 0")
    assert zeros.value("kl_nats", "SAE 0") == zeros.value("kl_nats", "zeros at SAE 0")
    mean = suite([made(0.0, x.mean(0))])
    assert mean.value("fvu", "SAE 0") == pytest.approx(1, abs=1e-6)
    assert mean.value("explained_variance", "SAE 0") == pytest.approx(0, abs=1e-6)
    assert mean.value("recovered_from_mean", "SAE 0") == pytest.approx(0, abs=1e-4)


def test_numbers_are_scikit_learns_and_those_of_the_meter() -> None:
    saes = [tiny_sae(layer=1), tiny_sae(seed=2, layer=2, site="mlp_out", activation="jumprelu")]
    found = suite(saes)
    x = made = torch.empty(0)
    for number, sae in enumerate(saes):
        name, x = f"SAE {number}", states(saes, number)
        made = sae(x).reconstruction.detach()
        r2 = r2_score(x, made, multioutput="variance_weighted")
        assert found.value("explained_variance", name) == pytest.approx(r2, rel=1e-4)
        assert found.value("fvu", name) == pytest.approx(1 - r2, rel=1e-4)
        cosines = 1 - paired_cosine_distances(x, made)
        assert found.value("cosine_similarity", name) == pytest.approx(cosines.mean(), abs=1e-5)
        meter = measure_reconstruction(sae, [x])
        for metric in ("fvu", "normalized_mse", "cosine_similarity", "l0", "dead_share"):
            assert found.value(metric, name) == pytest.approx(meter[metric], rel=1e-4, abs=1e-5)
        tokens = next(m.n for m in found.measurements if (m.metric, m.method) == ("fvu", name))
        assert tokens == len(x) == meter["tokens"]
    centred = explained_variance_score(x, made, multioutput="variance_weighted")
    ours = found.value("explained_variance", "SAE 1")
    assert ours is not None and ours < centred  # which would forgive a wrong mean


def test_the_base_zeros_and_means_are_baselines() -> None:
    found = ReconstructionSuite(TEXTS, ReadingSettings(12), BootstrapSettings(5))(tiny_model(), word_tokenizer())
    told = {one.method: one.baseline for one in found.measurements}
    assert told == {"SAE 0": False, "none": True, "zeros at SAE 0": True, "mean at SAE 0": True}


def test_losses_are_those_of_the_model() -> None:
    saes = [tiny_sae(layer=1), tiny_sae(seed=2, layer=0, site="mlp_out")]
    found, model, tokenizer = suite(saes), tiny_model(saes=saes), word_tokenizer()
    whole = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    for name, members in (("SAE 1", [1]), ("all SAEs", [0, 1])):
        expected = ce_loss_recovered(model, [whole], saes=members)
        for metric in ("recovered", "recovered_from_mean"):  # the first predictions cancel in both
            assert found.value(metric, name) == pytest.approx(expected[metric], rel=1e-3)
    losses, divergences, tokens = 0.0, 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        steering = {"reconstruct": [1], "positions": [[1, None]]}
        base = model(input_ids=ids).logits[0, 1:-1].detach().double().log_softmax(-1)
        steered = model(input_ids=ids, steering=steering).logits[0, 1:-1].detach().double().log_softmax(-1)
        divergences += float(torch.nn.functional.kl_div(steered, base, log_target=True, reduction="sum"))
        losses += float(-base.gather(-1, ids[0, 2:, None]).sum())
        tokens += len(base)
    assert found.value("kl_nats", "SAE 1") == pytest.approx(divergences / tokens, rel=1e-4)
    assert found.value("ce_nats", "none") == pytest.approx(losses / tokens, rel=1e-5)


def test_batches_do_not_matter_and_intervals_hold_their_values() -> None:
    few, many = suite([tiny_sae(layer=1)], tokens_per_batch=10), suite([tiny_sae(layer=1)], tokens_per_batch=1000)
    for one, other in zip(few.measurements, many.measurements, strict=True):
        assert (one.metric, one.method, one.n) == (other.metric, other.method, other.n)
        for field in ("value", "low", "high"):
            given = getattr(other, field)
            assert getattr(one, field) == (None if given is None else pytest.approx(given, rel=1e-3, abs=1e-5))
        if one.interval and one.metric != "fvu" and one.low is not None:
            assert one.high is not None and one.value is not None and one.low <= one.high
    assert few.settings["texts"] == 12 and any("first tokens" in note for note in few.notes)


def test_reports_and_leaves_short_texts_out() -> None:
    seen: list[int] = []
    model, texts = tiny_model(), [*TEXTS[:3], "w1 w2", "w3"]
    suite = ReconstructionSuite(texts, ReadingSettings(12), BootstrapSettings(5))
    found = suite(model, word_tokenizer(), report=seen.append)
    assert sum(seen) == 2 * 3 and "2 of 5 texts are too short" in found.notes[-1]


def test_no_pass_is_run_twice() -> None:
    """Of each batch: the states once, the base once, and each set of SAEs in place, zeros and means."""
    model, passes, last = tiny_model(saes=[tiny_sae(layer=1), tiny_sae(layer=0)]), [], []
    model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    model.lm.model.norm.register_forward_hook(lambda *_: last.append(1))
    reading = ReadingSettings(12, tokens_per_batch=10_000)
    ReconstructionSuite(TEXTS, reading, BootstrapSettings(5))(model, word_tokenizer())
    assert (len(passes), len(last)) == (1 + 1 + 3 * 3, 1 + 3 * 3)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(ValueError, match="2 texts, 1 of them so long"):
        ReconstructionSuite(["w1 w2 w3", "w1"], ReadingSettings(8))(tiny_model(), word_tokenizer())
    config = SparseAutoencoderConfig(
        d_in=WIDTH, d_sae=8, apply_b_dec_to_input=False, hook="model.layers.1.mlp.input", hook_out="model.layers.1.mlp"
    )
    with pytest.raises(ValueError, match="1 SAEs, none such"):
        suite([SparseAutoencoder(config)])
    both = suite([SparseAutoencoder(config), tiny_sae(layer=1)])
    assert any("SAEs [0] write elsewhere" in note for note in both.notes)
    assert {m.method for m in both.measurements} == {"none", "SAE 1", "zeros at SAE 1", "mean at SAE 1"}
    same = ["w7 w7 w7"] * 3
    with pytest.raises(ValueError, match="must vary"):
        model = tiny_model(saes=[tiny_sae(layer=0, site="resid_pre")])
        ReconstructionSuite(same, ReadingSettings(8))(model, word_tokenizer())
