from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.fairness.stereotypes import SentencePair
from sae_transformers.evaluation.settings import BootstrapSettings
from sae_transformers.evaluation.suites import FairnessSuite
from sae_transformers.evaluation.suites.settings import FairnessSettings
from sae_transformers.latents.settings import ReadingSettings
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_model, tiny_sae

STEERING = Steering([FeatureEdit(0, 3, "direction", 5.0)])
TEXTS = word_texts(10, shortest=4, longest=8)
MORE = FairnessSettings(bootstrap=BootstrapSettings(50))
FEW = FairnessSettings(bootstrap=BootstrapSettings(5))
SHORT = FairnessSettings(reading=ReadingSettings(max_length=16), bootstrap=BootstrapSettings(5))


def pair(text: str) -> SentencePair:
    marked = ((len(text) + 1, len(text) + 3),)
    return SentencePair(f"{text} w1 w5", f"{text} w2 w5", (marked, marked))


PAIRS = [pair(text) for text in TEXTS]


def model(steering: Any = None):
    made = tiny_model(saes=[tiny_sae(layer=1, site="resid_post", concepts={"sea": 9})]).eval()
    if steering is not None:
        made.steering = steering
    return made


def log_p(made, text: str, steering: Any) -> torch.Tensor:
    """Log-probability of every word after `<s>`, (n,)."""
    ids = torch.tensor([[1, *word_tokenizer()(text)["input_ids"]]])
    logits = made(input_ids=ids, steering=steering).logits[0, :-1].detach().double().log_softmax(-1)
    return logits.gather(-1, ids[0, 1:, None])[:, 0]


def test_preferences_before_and_after_are_the_models_likelihoods() -> None:
    made = model(STEERING)
    found = FairnessSuite({"pairs": PAIRS}, settings=MORE)(made, word_tokenizer())
    gaps = {
        method: torch.stack([log_p(made, p.more, plan).sum() - log_p(made, p.less, plan).sum() for p in PAIRS])
        for method, plan in (("none", False), ("steered", STEERING))
    }
    marked = torch.stack([log_p(made, p.more, False)[-2] - log_p(made, p.less, False)[-2] for p in PAIRS])
    for method, gap in gaps.items():
        assert found.value("stereotype_gap_nats", method) == pytest.approx(float(gap.mean()), abs=1e-4)
        assert found.value("stereotype_share", method) == pytest.approx(float((gap > 0).double().mean()))
    assert found.value("stereotype_gap_nats_by_marked", "none") == pytest.approx(float(marked.mean()), abs=1e-4)
    change = next(m for m in found.measurements if m.metric == "stereotype_gap_nats_change")
    moved = gaps["steered"] - gaps["none"]
    assert change.value == pytest.approx(float(moved.mean()), abs=1e-4) and change.n == 10 and change.data == "pairs"
    half = 1.96 * float(moved.std()) / math.sqrt(10)  # paired: narrower than either gap's own
    assert change.low is not None and change.high is not None
    assert change.high - change.low == pytest.approx(2 * half, rel=0.4)
    assert found.settings["steering"] == STEERING.to_dict()
    assert {(one.method, one.baseline) for one in found.measurements} == {("none", True), ("steered", False)}


def test_last_words() -> None:
    made = model(STEERING)
    found = FairnessSuite(last_words=TEXTS, settings=MORE)(made, word_tokenizer())
    last = {plan: torch.stack([log_p(made, t, plan)[-1] for t in TEXTS]) for plan in (False, None)}
    for method, plan in (("none", False), ("steered", None)):
        expected = math.exp(-float(last[plan].mean()))
        assert found.value("lambada_perplexity", method) == pytest.approx(expected, rel=1e-4)
    moved = float((last[None] - last[False]).mean())
    assert found.value("lambada_log_p_change", "steered") == pytest.approx(moved, abs=1e-4)


def test_a_given_steering_stands_in_for_the_default_and_none_compares_nothing() -> None:
    by_default = FairnessSuite({"p": PAIRS}, settings=FEW)(model(STEERING), word_tokenizer())
    given = FairnessSuite({"p": PAIRS}, settings=FEW, steering=STEERING)(model(), word_tokenizer())
    assert given.measurements == by_default.measurements
    alone = FairnessSuite({"p": PAIRS}, settings=FEW)(model(), word_tokenizer())
    assert {m.method for m in alone.measurements} == {"none"} and "nothing is compared" in alone.notes[-1]


def test_swapped_texts_move_scores() -> None:
    made, tokenizer = model(), word_tokenizer()
    swapped = [text.replace("w1", "w8") for text in TEXTS]
    settings = replace(SHORT, features=((0, "sea"), (0, 5)))
    found = FairnessSuite(swapped=(TEXTS, swapped), settings=settings)(made, tokenizer)
    told = {one.method: one.baseline for one in found.measurements}
    assert told == {"sea of SAE 0": False, "latent 5 of SAE 0": False, "random latent of SAE 0": True}
    for name, latent in (("sea", 9), ("latent 5", 5)):
        scores = torch.zeros(2, 10)
        for side, texts in enumerate((TEXTS, swapped)):
            for i, text in enumerate(texts):
                out = made(**tokenizer(text, return_tensors="pt"), features=[latent])
                scores[side, i] = out.sae_features[0][0, 1:, 0].detach().mean()
        moved = (scores[0] - scores[1]).abs().mean()
        assert found.value("score_move", f"{name} of SAE 0") == pytest.approx(float(moved), abs=1e-5)
        if float(scores[0].std()) > 0:
            expected = float(moved / scores[0].std())
            assert found.value("score_move_in_std", f"{name} of SAE 0") == pytest.approx(expected, rel=1e-3)
    assert found.value("score_move", "random latent of SAE 0") is not None
    same = FairnessSuite(swapped=(TEXTS, TEXTS), settings=SHORT)(made, tokenizer)
    assert same.value("score_move", "sea of SAE 0") == 0.0
    short = FairnessSuite(swapped=([*TEXTS, "w1"], [*swapped, "w2"]), settings=SHORT)(made, tokenizer)
    assert "1 of 11 swapped pairs are too short" in short.notes[-1]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="none of them"):
        FairnessSuite()(model(), word_tokenizer())
    with pytest.raises(ValueError, match="10 and 9"):
        FairnessSuite(swapped=(TEXTS, TEXTS[1:]))(model(), word_tokenizer())
    with pytest.raises(ValueError, match="'joy'"):
        settings = replace(SHORT, features=((0, "joy"),))
        FairnessSuite(swapped=(TEXTS, TEXTS), settings=settings)(model(), word_tokenizer())
    with pytest.raises(ValueError, match="latent|5 of SAE 4"):
        FairnessSuite(swapped=(TEXTS, TEXTS), settings=replace(SHORT, features=((4, 5),)))(model(), word_tokenizer())
    with pytest.raises(ValueError, match="2 of 10|0 of 2"):
        FairnessSuite(swapped=(["w1 w2", "w1 w3"], ["w1", "w1"]), settings=SHORT)(model(), word_tokenizer())
