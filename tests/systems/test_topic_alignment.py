"""Topic alignment (https://huggingface.co/papers/2506.12576): scores, re-weighting and steering against numbers worked
out by hand, the published score table, and an SAE that was trained on some topics and not on another."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import PrinterCallback

from sae_transformers import FeatureEdit, FeatureReweighting, SparseAutoencoder, SparseAutoencoderConfig, Steering
from sae_transformers.evaluation.topics.alignment import (
    TextEvidence,
    calibrate_threshold,
    reconstruction_sums,
    topic_uncertainty,
)
from sae_transformers.latents.hidden_states import HiddenStateReader
from sae_transformers.latents.sparse_codes import SparseCodes
from sae_transformers.modeling.call_record import CallRequest
from sae_transformers.modeling.sae_steering import serve
from sae_transformers.modeling.steering_plan import SteeringPlan
from sae_transformers.training.sae.arguments import SaeTrainingArguments
from sae_transformers.training.sae.dataset import TensorTokens
from sae_transformers.training.sae.trainer import SaeTrainer
from sae_transformers.training.steering.topic_scores import (
    prompt_summaries,
    read_topic_scores,
    topic_distances,
    topic_scores,
    topic_steering,
)
from tests.tiny import prompt, tiny_base, tiny_model, tiny_sae

DATA = Path(__file__).parents[3] / "shared" / "data" / "topic_alignment"
F64 = torch.float64
HIDDEN = torch.tensor([[[1.0, 2.0, 4.0]]], dtype=F64)
SCORES = (0.9, 1.0, 0.2, 0.5)


def steered(sae: SparseAutoencoder, steering: Steering, hidden: torch.Tensor = HIDDEN) -> list[float]:
    request = CallRequest(1, 1, SteeringPlan([steering], [sae.config], [hidden]))
    return request.edit(hidden, sae(hidden, request, 0, task=serve))[0, -1].tolist()


def identity_sae(width: int, pre_acts: list[float]) -> tuple[SparseAutoencoder, torch.Tensor]:
    """An SAE whose pre-activations are its input and whose decoder is the identity: outputs are latents."""
    config = SparseAutoencoderConfig(d_in=width, d_sae=width, activation="topk", k=2, layer=0)
    sae = SparseAutoencoder(config, dtype=F64)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc.copy_(torch.eye(width))
        sae.W_dec.copy_(torch.eye(width))
    return sae, torch.tensor([[pre_acts]], dtype=F64)


@pytest.mark.parametrize(("mode", "latents"), [("weight", [0, 1, 1.5, 0, 0]), ("swap", [0, 2, 1.5, 0, 0])])
def test_fact_b_swap_against_weight(mode, latents):
    sae, hidden = identity_sae(5, [3.0, 2.0, 1.5, -1.0, 0.5])
    reweighted = FeatureReweighting(0, (0.1, 0.5, 1.0, 0.9, 0.8), mode)
    assert steered(sae, Steering([reweighted], keep_error=False), hidden) == pytest.approx(latents, abs=1e-12)
    # with the error kept, only the difference of the two codes is added
    plain = [3.0, 2.0, 0.0, 0.0, 0.0]
    expected = [h + new - old for h, new, old in zip(hidden[0, 0].tolist(), latents, plain, strict=True)]
    assert steered(sae, Steering([reweighted]), hidden) == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def toy() -> SparseAutoencoder:
    config = SparseAutoencoderConfig(d_in=3, d_sae=4, activation="topk", k=2, normalization="layer_norm", layer=0)
    sae = SparseAutoencoder(config, dtype=F64)
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]], dtype=F64)
    with torch.no_grad():
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows)
        sae.b_enc.copy_(torch.tensor([0.1, 0.5, 0, 0.2]))
        sae.b_dec.copy_(torch.tensor([0.1, 0, -0.1]))
    return sae


def test_fact_c_pre_activations_and_code(toy):
    assert toy.encode_pre_acts(HIDDEN)[0, 0].tolist() == pytest.approx([-0.8729, 0.2818, 1.1911, 1.1729], abs=1e-4)
    assert toy.encode(HIDDEN)[0, 0].tolist() == pytest.approx([0, 0, 1.1911, 1.1729], abs=1e-4)
    assert toy(HIDDEN).reconstruction[0, 0].tolist() == pytest.approx([0.6945, 2.3333, 4.0], abs=1e-4)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (FeatureReweighting(0, SCORES, "swap"), [0.6945, 2.7638, 2.1806]),
        (FeatureReweighting(0, SCORES, "weight", legacy=True), [0.4445, 0.7691, 0.6077]),
        (FeatureReweighting(0, (0.0,) * 4, "swap"), [2.4861, 2.3333, 2.1806]),
    ],
)
def test_fact_c_outputs(toy, edit, expected):
    assert steered(toy, Steering([edit], keep_error=False)) == pytest.approx(expected, abs=1e-4)


def test_fact_c_weight_with_the_tokens_own_statistics(toy):
    """latents [0, .2818, 0, .5864], decoded with the token's mean and deviation."""
    mean, std = HIDDEN.mean(), HIDDEN.std()
    latents = torch.tensor([0, 0.2818, 0, 0.5864], dtype=F64)
    expected = ((latents @ toy.W_dec + toy.b_dec) * std + mean).tolist()
    out = steered(toy, Steering([FeatureReweighting(0, SCORES, "weight")], keep_error=False))
    assert out == pytest.approx(expected, abs=2e-4)


def test_fact_c_clamp_adds(toy):
    steering = Steering([FeatureEdit(0, 0, "add", 10.0), FeatureEdit(0, 1, "add", 10.0)], keep_error=False)
    assert steered(toy, steering) == pytest.approx([15.9698, 17.6086, 4.0], abs=1e-4)


def test_constant_scores_swap_nothing(toy):
    swap = Steering([FeatureReweighting(0, (0.3,) * 4, "swap")], keep_error=False)
    assert steered(toy, swap) == toy(HIDDEN).reconstruction[0, 0].tolist()


def test_swap_support_and_values():
    sae = tiny_sae(dtype=F64, k=6, layer=1)
    hidden = torch.randn(40, 1, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    scores = torch.rand(64, generator=torch.Generator().manual_seed(1)).tolist()
    steering = Steering([FeatureReweighting(0, scores, "swap")], keep_error=False)
    request = CallRequest(40, 1, SteeringPlan([steering], [sae.config], [hidden]))
    out = request.edit(hidden, sae(hidden, request, 0, task=serve))
    p = (hidden - sae.b_dec) @ sae.W_enc + sae.b_enc
    values, indices = (p * torch.tensor(scores, dtype=F64)).topk(6, dim=-1)
    latents = torch.zeros_like(p).scatter(-1, indices, p.gather(-1, indices) * (values > 0))
    assert int((latents != 0).sum(-1).max()) <= 6
    torch.testing.assert_close(out, latents @ sae.W_dec + sae.b_dec, rtol=1e-12, atol=1e-12)


def test_rows_of_a_batch_may_differ():
    """One row re-weighted, one edited, one left alone; each as it would be alone."""
    model = tiny_model(saes=[tiny_sae(dtype=F64, layer=1)], dtype=F64)
    ids = prompt(4, 6)
    scores = torch.rand(64, generator=torch.Generator().manual_seed(1)).tolist()
    rows = [
        Steering([FeatureReweighting(0, scores, "swap")]),
        Steering([FeatureEdit(0, 3, "add", 2.0)]),
        None,
        Steering([FeatureReweighting(0, scores, "swap")], keep_error=False),
    ]
    with torch.no_grad():
        together = model(ids, steering=rows).logits
        for row, steering in enumerate(rows):
            alone = model(ids[row : row + 1], steering=steering or False).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-11, atol=1e-11)


def test_scores_must_be_numbers():
    with pytest.raises(ValueError, match=r"scores\[1\]=nan"):
        FeatureReweighting(0, (0.5, float("nan")))
    with pytest.raises(ValueError, match=r"64 latents. Received: 3"):
        tiny_model().prepare_steering(Steering([FeatureReweighting(0, (0.1, 0.2, 0.3))]))


# -- scores -----------------------------------------------------------------------------------------------------------

SUMMARIES = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.25, 0.75, 0], [0.2, 0, 0.8, 0]], dtype=F64)
DISTANCES = torch.tensor([0.5, 1.0, 1.2], dtype=F64)


def test_fact_a_scores():
    found = topic_scores(SparseCodes.from_dense(SUMMARIES), DISTANCES)
    assert found.costs[:3].tolist() == pytest.approx([0.59, 0.5, 1.22709677], abs=1e-8)
    assert found.costs[3].isnan() and found.scores.tolist() == pytest.approx([0.87622005, 1, 0, 0], abs=1e-8)
    # The original's arithmetic, which one latent that is never active brings down.
    costs = (DISTANCES.square() @ SUMMARIES) / SUMMARIES.sum(0)
    literal = (1 - (costs - costs.min()) / (costs.max() - costs.min())).nan_to_num(0.0)
    assert literal.tolist() == [0, 0, 0, 0]


def test_fact_a_squared_distances_are_those_of_cosines():
    draw = torch.Generator().manual_seed(0)
    texts, topic = (torch.nn.functional.normalize(torch.randn(n, 9, generator=draw).double(), dim=-1) for n in (7, 3))
    cosines = (texts @ topic.T).amax(-1)
    torch.testing.assert_close(topic_distances(texts, topic).square(), 2 * (1 - cosines), rtol=0, atol=1e-12)


def test_fact_e_coverage():
    assert topic_scores(SparseCodes.from_dense(SUMMARIES), DISTANCES).coverage == 0.75
    whole = TextEvidence(SparseCodes.from_dense(SUMMARIES), torch.eye(3), torch.ones(3), torch.full((3,), 4.0))
    assert topic_uncertainty(whole, whole, torch.ones(4))["coverage"] == 0.75


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("SAE", [0.6945, 2.3333, 4.0]),
        ("swap", [0.6945, 2.7638, 2.1806]),
        ("clamp", [15.9698, 17.6086, 4.0]),
        ("orig", [1.0, 2.0, 4.0]),
    ],
)
def test_fact_c_by_method(toy, method, expected):
    scores = torch.tensor(SCORES) if method != "clamp" else torch.tensor([0.9, 1.0, 0.2, float("nan")])
    steering = topic_steering(method, scores, top=2, positions="all")
    assert steered(toy, steering) == pytest.approx(expected, abs=1e-4) if steering else expected == [1.0, 2.0, 4.0]
    legacy = topic_steering("weight", torch.tensor(SCORES), positions="all", legacy=True)
    assert steered(toy, legacy) == pytest.approx([0.4445, 0.7691, 0.6077], abs=1e-4)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared topic alignment data are not here")
def test_fact_d_published_scores():
    path = DATA / "medical_scores.csv"
    found = read_topic_scores(path, 32768)
    assert int((~found.scored).sum()) == 2021
    assert found.coverage == pytest.approx(0.938324, abs=5e-7) and found.coverage == 30747 / 32768
    known = found.scores[found.scored]
    assert float(known.mean()) == pytest.approx(0.262818, abs=5e-7)
    assert int((known == 0).sum()) == int((known == 1).sum()) == 1 and float(found.scores[17047]) == 0
    assert found.scores.argsort(descending=True)[:5].tolist() == [27802, 27708, 6082, 407, 5780]
    clamp = topic_steering("clamp", found.scores)
    assert [edit.feature for edit in clamp.feature_edits] == [27802, 27708, 6082, 407, 5780]
    # What the original does with the table: NaN goes to top-k, which ranks it above every number.
    raw = found.scores.where(found.scored, torch.nan)
    pre_acts = torch.randn(6, 32768, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert not bool(found.scored[(pre_acts * raw).topk(32).indices].any())
    (edit,) = topic_steering("swap", raw).reweightings
    assert bool(found.scored[(pre_acts * torch.tensor(edit.scores, dtype=F64)).topk(32).indices].all())


# -- an SAE that knows some topics ------------------------------------------------------------------------------------

TOPICS = [list(range(3 + 12 * topic, 15 + 12 * topic)) for topic in range(7)]  # 12 words each; the last is unknown


def topic_texts(topic: int, count: int, seed: int) -> list[torch.Tensor]:
    """Texts of 14 words, mostly of the topic."""
    draw = random.Random(1000 * topic + seed)
    every = [word for words in TOPICS[:-1] for word in words]
    return [
        torch.tensor([draw.choice(TOPICS[topic] if draw.random() < 0.9 else every) for _ in range(14)])
        for _ in range(count)
    ]


@pytest.mark.slow
def test_a_topic_the_sae_was_not_trained_on_is_more_uncertain(tmp_path):
    reader, place = HiddenStateReader(tiny_base(), ["layers.0.resid_post"]), "layers.0.resid_post"

    def states(texts):
        keep = [torch.arange(1, len(ids)) for ids in texts]
        index = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(places) for places in keep]))
        return reader.read(texts, keep)[place], index

    known = [ids for topic in range(6) for ids in topic_texts(topic, 60, seed=0)]
    config = SparseAutoencoderConfig(d_in=32, d_sae=96, activation="topk", k=4, layer=0)
    torch.manual_seed(0)
    sae = SparseAutoencoder(config)
    settings = SaeTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=400,
        per_device_train_batch_size=512,
        learning_rate=3e-3,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SaeTrainer([sae], settings, TensorTokens({place: states(known)[0]}))
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    def evidence(texts, centre=None):
        hidden, index = states(texts)
        counts = torch.stack([torch.bincount(ids, minlength=99) for ids in texts]).double()
        sums = reconstruction_sums(sae, hidden, index, len(texts), hidden.mean(0) if centre is None else centre)
        summaries = prompt_summaries(sae, hidden, index, len(texts))
        return TextEvidence(summaries, torch.nn.functional.normalize(counts, dim=-1), *sums)

    reference_texts = [ids for topic in range(6) for ids in topic_texts(topic, 20, seed=1)]
    reference, centre = evidence(reference_texts), states(reference_texts)[0].mean(0)

    def scores(summaries, distances):
        return topic_scores(summaries, distances).scores

    threshold = calibrate_threshold(reference, 10, scores, topic_distances).threshold
    found = []
    for topic in range(7):
        given = evidence(topic_texts(topic, 10, seed=2), centre)
        distances = topic_distances(reference.embeddings, given.embeddings)
        found.append(topic_uncertainty(given, reference, scores(reference.summaries, distances)))
    uncertain = [one["uncertainty"] for one in found]
    assert uncertain[6] > threshold > max(uncertain[:6]), (uncertain[6], max(uncertain[:6]), threshold)
    for part in ("reconstruction_error", "contamination"):
        assert found[6][part] > max(one[part] for one in found[:6])
