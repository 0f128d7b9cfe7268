"""A classifier from texts: what is read, compared, put into the model, and the base tuned behind it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from sae_transformers import SaeForSequenceClassification
from sae_transformers.evaluation.fairness.counterfactuals import attributed_reliance
from sae_transformers.modeling.feature_head import FeatureHead, FeatureHeadConfig
from sae_transformers.training.heads.comparison import (
    Candidate,
    Comparison,
    padded,
    put_head,
    read_texts,
    score_texts,
    swap_measures,
    tune_base,
)
from sae_transformers.training.heads.erasure import leace, swap_directions
from sae_transformers.training.heads.settings import HeadSettings, LoraSettings
from sae_transformers.training.heads.train import train_heads
from tests.tiny import VOCAB, WIDTH, tiny_base, tiny_sae

U = [3, 17, 40]
QUICK = HeadSettings(epochs=3, batch_size=8, patience=9)


def classifier(labels: int = 1, **settings: Any) -> Any:
    config = tiny_base().config
    config.num_labels = labels
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config).eval()
    model = SaeForSequenceClassification.from_base(
        base, saes=[tiny_sae(layer=1)], feature_head=settings, loss_weights={"unintended": 0.5}
    )
    model.set_unintended(U)
    return model.eval()


def texts(n: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (n,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_states_are_those_the_model_scores(pooling: str) -> None:
    model, ids = classifier(pooling=pooling, removal="own").train(), texts()
    plain = FeatureHead(FeatureHeadConfig(pooling=pooling), WIDTH, 1, 1)
    kept, removed = read_texts(model, ids, [plain, model.feature_head], tokens_at_once=30)
    assert model.training
    model.eval()
    for i, row in enumerate(ids):
        output = model(input_ids=row[None])
        torch.testing.assert_close(output.pooled_states[0], removed[i], rtol=1e-4, atol=1e-5)
        hidden = model(input_ids=row[None], output_sae_inputs=True).sae_inputs[0][0]
        expected = hidden[-1] if pooling == "last" else hidden.mean(0)
        torch.testing.assert_close(kept[i], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kept, removed)


def separable(n: int = 60, classes: int = 2) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % classes
    return torch.randn(n, WIDTH) + 8 * torch.nn.functional.one_hot(labels, WIDTH), labels


@pytest.mark.parametrize("classes", [2, 3])
def test_every_text_is_scored_by_heads_that_never_saw_it(classes: int) -> None:
    """Labels are noise but for a text of its own; a head that has seen it would know it."""
    torch.manual_seed(0)
    states, labels = torch.randn(40, WIDTH), torch.randint(0, classes, (40,))
    labels[:classes] = torch.arange(classes)
    known = HeadSettings(method="overfit", overfit_epochs=150, learning_rate=0.1, batch_size=40)
    comparison = Comparison({"train": labels}, folds=4)
    rows, head = comparison.run(Candidate(known, {"train": states}), [0, 1])
    seen = head.logits(states)
    guess = (seen > 0).long() if classes == 2 else seen.argmax(-1)
    assert float((guess == labels).float().mean()) > 0.85
    assert all(row["accuracy"] < 0.75 for row in rows)
    states, labels = separable(classes=classes)
    rows, _ = Comparison({"train": labels}, folds=4).run(Candidate(known, {"train": states}), [0])
    assert rows[0]["accuracy"] > 0.9


def test_selfreg_is_trained_on_the_states_without_features() -> None:
    states, labels = separable()
    sae, features = tiny_sae(), torch.tensor(U)
    plain = {"train": states, "test": states[:20], "original": states[:9], "swapped": states[9:18]}
    plain |= {"chosen_original": states[20:29], "chosen_swapped": states[29:38]}
    removed = {name: values - 1 for name, values in plain.items()}
    given: dict[str, Any] = {"sae": sae, "unintended": features}
    comparison = Comparison({"train": labels, "test": labels[:20]}, seen=states, **given)
    selfreg = HeadSettings(method="selfreg", epochs=3, batch_size=8, penalty=2.0)
    rows, head = comparison.run(Candidate(selfreg, removed, features, sae), [4, 7])
    unremoved = replace(selfreg, removal="none")
    expected = train_heads(removed["train"], labels, [(unremoved, 4), (unremoved, 7)], **given)
    best = max(expected, key=lambda head: head.validation_score)
    torch.testing.assert_close(head.weight, best.weight, rtol=1e-6, atol=1e-6)
    swap = swap_measures(expected[0].logits(removed["original"]), expected[0].logits(removed["swapped"]))
    assert {name: rows[0][name] for name in swap} == pytest.approx(swap, abs=1e-6)
    chosen = [expected[0].logits(removed[f"chosen_{side}"]) for side in ("original", "swapped")]
    assert rows[0]["validation_delta"] == pytest.approx(swap_measures(*chosen)["delta_in_std"], abs=1e-6)
    assert rows[0]["validation"] == expected[0].validation_score
    (alone,) = train_heads(states, labels, [(QUICK, 4)])
    rows, head = comparison.run(Candidate(QUICK, plain), [4])
    torch.testing.assert_close(head.weight, alone.weight, rtol=1e-6, atol=1e-6)
    deep, head = comparison.run(Candidate(replace(QUICK, hidden_size=5), plain), [4])
    reliance = attributed_reliance(head.scores, states, sae, features, one_of=False)["contribution"]
    assert deep[0]["reliance"] == pytest.approx(reliance) and reliance > 0
    assert {"f1", "auroc", "ece", "flips", "reliance", "validation"} <= set(rows[0])


@pytest.mark.parametrize("hidden_size", [None, 5])
def test_a_head_takes_the_erasure_of_its_states_in(hidden_size: int | None) -> None:
    torch.manual_seed(0)
    states, labels = separable()
    swapped = states + torch.randn(len(states), 2) @ torch.randn(2, WIDTH)
    erasure = leace(states, swap_directions(states, swapped, 2))
    parts = {"train": states, "test": states[:20], "original": states, "swapped": swapped}
    one = replace(QUICK, hidden_size=hidden_size)
    comparison = Comparison({"train": labels, "test": labels[:20]})
    rows, head = comparison.run(Candidate(one, parts, erasure=erasure), [3])
    (expected,) = train_heads(erasure(states), labels, [(one, 3)])
    torch.testing.assert_close(head.logits(states), expected.logits(erasure(states)), rtol=1e-4, atol=1e-4)
    assert rows[0]["delta_logit"] < 1e-4 < swap_measures(*[train_heads(states, labels, [(one, 3)])[0].logits(side)
                                                           for side in (states, swapped)])["delta_logit"]  # fmt: skip
    learns = replace(one, epochs=20, learning_rate=0.03)
    folds, _ = Comparison({"train": labels}, folds=3).run(Candidate(learns, {"train": states}, erasure=erasure), [3])
    assert folds[0]["accuracy"] > 0.8


def test_no_unintended_features_make_selfreg_plain() -> None:
    states, labels = separable()
    none, parts = torch.empty(0, dtype=torch.long), {"train": states}
    sae = tiny_sae()
    comparison = Comparison({"train": labels}, sae=sae, seen=states, unintended=none, folds=3)
    selfreg = HeadSettings(method="selfreg", epochs=3, batch_size=8, patience=9)
    plain, _ = comparison.run(Candidate(QUICK, parts), [0])
    rows, _ = comparison.run(Candidate(selfreg, parts, none, sae), [0])
    assert rows == plain and rows[0]["reliance"] == 0


def test_pairs_and_several_labels() -> None:
    states, labels = separable()
    learns = HeadSettings(epochs=20, learning_rate=0.03)
    pairs = torch.stack([states[labels == 1], states[labels == 0]], 1)
    rows, _ = Comparison({"train": None}, folds=3).run(Candidate(learns, {"train": pairs}), [0])
    assert rows[0]["accuracy"] > 0.8
    both = torch.stack([labels, 1 - labels], 1)
    rows, _ = Comparison({"train": both}, folds=3).run(Candidate(learns, {"train": states}), [0])
    assert rows[0]["accuracy"] > 0.8


def test_folds_that_cannot_be_made() -> None:
    states, labels = separable(8)
    with pytest.raises(ValueError, match="folds=9"):
        Comparison({"train": labels}, folds=9).run(Candidate(QUICK, {"train": states}), [0])


@pytest.mark.parametrize("hidden_size", [None, 5])
def test_a_trained_head_becomes_the_models(hidden_size: int | None) -> None:
    model, ids = classifier(removal="own", pooling="mean", hidden_size=hidden_size), texts()
    (states,) = read_texts(model, ids, [model.feature_head])
    labels = torch.arange(24) % 2
    (head,) = train_heads(states, labels, [(HeadSettings(epochs=2, hidden_size=hidden_size), 0)])
    put_head(model, head)
    logits = model(**padded(ids)).logits[:, 0]
    torch.testing.assert_close(logits, head.logits(states), rtol=1e-4, atol=1e-4)
    found = score_texts(model, {"test": ids, "original": ids, "swapped": ids}, labels, "binary")
    assert found["accuracy"] == float(((logits > 0).long() == labels).double().mean())
    assert found["flips"] == 0 and found["delta_logit"] == 0
    (narrow,) = train_heads(states[:, :8], labels, [(HeadSettings(epochs=1), 0)])
    with pytest.raises(ValueError, match=r"of shape \(1, 8\)"):
        put_head(model, narrow)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [False, True])
def test_the_base_is_tuned_and_saved_with_its_changes(pairs: bool, tmp_path: Path) -> None:
    model, ids = classifier(pooling="mean", pairwise=pairs), texts()
    before = {name: values.clone() for name, values in model.lm.named_parameters()}
    labels = None if pairs else torch.tensor([int(ids[i][0] > 50) for i in range(24)])
    test = {"test": ids}
    goal, kind = (None, "pairwise") if pairs else (labels, "binary")
    first = score_texts(model, test, goal, kind)["brier"]
    settings = LoraSettings(40, state_weight=0.01, lora_learning_rate=5e-3, lora_batch_size=12)
    tuned = tune_base(model, ids, labels, settings, out=tmp_path / "run")
    assert score_texts(tuned, test, goal, kind)["brier"] < 0.5 * first
    changed = {n for n, values in tuned.lm.named_parameters() if not torch.equal(values, before[n])}
    assert changed and all("layers.2" not in name for name in changed if "proj" in name)  # behind the SAE
    tuned.save_pretrained(tmp_path / "model")
    loaded: Any = SaeForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(**padded(ids)).logits, tuned(**padded(ids)).logits)
