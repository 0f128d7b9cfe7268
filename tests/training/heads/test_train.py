"""The stacked trainer beside one plain torch loop a run, and what SelfReg does to states."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_transformers.evaluation.fairness.counterfactuals import unintended_reconstruction
from sae_transformers.training.heads.data import HeadData, split_rows
from sae_transformers.training.heads.losses import binary_losses
from sae_transformers.training.heads.stack import Patience
from sae_transformers.training.heads.train import METHODS, HeadSettings, Removal, label_ids, train_heads
from tests.covering import covering
from tests.tiny import WIDTH, tiny_sae

F64 = torch.float64
U = torch.tensor([3, 9, 20, 41, 60])
QUICK = HeadSettings(epochs=4, overfit_epochs=5, batch_size=16, penalty=0.5, learning_rate=1e-2)


def texts(n: int = 70, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States of which the first coordinates tell the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    labels[:classes] = torch.arange(classes)
    states = torch.randn(n, WIDTH, dtype=F64, generator=generator)
    return states + 1.5 * F.one_hot(labels, WIDTH), labels


def sae64(**settings: Any):
    return tiny_sae(dtype=F64, **{"apply_b_dec_to_input": True, **settings})


def all_methods(**changes: Any) -> list[HeadSettings]:
    return [replace(QUICK, method=method, **changes) for method in METHODS]


def naive(states: Tensor, labels: Tensor, settings: HeadSettings, seed: int, sae: Any) -> tuple[Tensor, Tensor, float]:
    """One binary linear run with torch's own layer and optimiser; best epoch by F1, no decay within so few epochs."""
    train, held = split_rows(HeadData(states, labels, "binary"), 0.2, seed, "f1")
    if settings.method == "selfreg":
        states = states - sae.encode_pre_acts(states, U).relu().detach() @ sae.W_dec[U].detach()
    layer = torch.nn.Linear(WIDTH, 1, dtype=F64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.weight, layer.bias):
            p.copy_((2 * torch.rand(p.shape, generator=generator, dtype=F64) - 1) / WIDTH**0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    order, drops = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    best = (layer.weight.detach().clone(), layer.bias.detach().clone(), -1.0)
    gamma, smoothing = torch.full((1, 1), 2.0, dtype=F64), torch.full((1, 1), 0.1, dtype=F64)
    for _ in range(settings.total_epochs):
        for rows in train[torch.randperm(len(train), generator=order)].split(settings.batch_size):
            x, y = states[rows], labels[rows].double()
            if settings.method == "dropout":
                x = x * torch.empty_like(x).bernoulli_(0.9, generator=drops) / 0.9
            z = layer(x)[:, 0]
            loss = F.binary_cross_entropy_with_logits(z, y)
            if settings.method == "focal":
                loss = binary_losses(z[None], y[None], gamma=gamma)[0]
            elif settings.method == "label_smoothing":
                loss = binary_losses(z[None], y[None], smoothing=smoothing)[0]
            elif settings.method == "l2":
                loss = loss + settings.l2 * layer.weight.square().sum()
            elif settings.method == "spectral_norm":
                loss = loss + settings.spectral / 2 * torch.linalg.matrix_norm(layer.weight, ord=2) ** 2
            elif settings.method == "selfreg":
                w, W_enc = layer.weight, sae.W_enc[:, U].detach()
                S = {
                    "affine": (w - sae.b_dec.detach()) @ W_enc + sae.b_enc[U].detach(),
                    "encoder": w @ W_enc,
                    "decoder": w @ sae.W_dec[U].detach().T,
                }[settings.alignment]
                loss = loss + settings.penalty * S.abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        guess, y = layer(states[held])[:, 0] > 0, labels[held].bool()
        f1 = float(2 * (guess & y).sum() / (guess.sum() + y.sum()))
        if f1 > best[2] + 1e-4 or settings.method == "overfit":
            best = (layer.weight.detach().clone(), layer.bias.detach().clone(), f1)
    return best


def test_every_method_equals_a_plain_loop() -> None:
    states, labels = texts()
    sae = sae64()
    settings = all_methods(patience=9)
    settings += [replace(settings[-1], alignment=alignment) for alignment in ("encoder", "decoder")]
    assert settings[-1].method == "selfreg"
    runs = [(one, seed) for one in settings for seed in (0, 5)]
    heads = train_heads(states, labels, runs, sae=sae, unintended=U)
    for head, (settings, seed) in zip(heads, runs, strict=True):
        weight, bias, score = naive(states, labels, settings, seed, sae)
        torch.testing.assert_close(head.weight, weight, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(head.bias, bias, atol=1e-9, rtol=1e-9)
        assert head.validation_score == pytest.approx(score, abs=1e-6)
        assert (head.settings, head.seed) == (settings, seed)
    assert heads[2 * list(METHODS).index("overfit")].best_epoch == 5


@pytest.mark.parametrize(("legacy", "hidden_size"), covering([False, True], [None, 6]))
def test_a_run_alone_equals_the_run_in_a_group(hidden_size: int | None, legacy: bool) -> None:
    states, labels = texts(classes=3)
    states, sae = states.float(), tiny_sae()
    settings = all_methods(hidden_size=hidden_size, legacy=legacy, epochs=12, patience=1, min_improvement=0.02)
    runs = [(one, seed) for one in settings for seed in (0, 1)]
    together = train_heads(states, labels, runs, sae=sae, unintended=U)
    assert len({len(head.history) for head in together}) > 1  # some stop before others
    for head, run in zip(together, runs, strict=True):
        (alone,) = train_heads(states, labels, [run], sae=sae, unintended=U)
        torch.testing.assert_close(alone.weight, head.weight, atol=1e-6, rtol=1e-6)
        assert alone.best_epoch == head.best_epoch and len(alone.history) == len(head.history)
        torch.testing.assert_close(alone.logits(states), head.logits(states), atol=1e-5, rtol=1e-5)


def test_the_removal_and_the_published_one() -> None:
    states, sae = texts()[0], sae64()
    for features in (U, U[:0]):
        said = sae.encode_pre_acts(states, features).relu() @ sae.W_dec[features]
        torch.testing.assert_close(Removal(sae, features)(states), states - said.detach())
        published = Removal(sae, features, subtract_b_dec=True)(states)
        torch.testing.assert_close(published, states - said.detach() - sae.b_dec.detach())
    assert torch.equal(Removal(sae, U[:0])(states), states)
    assert not bool(unintended_reconstruction(states, sae, U[:0]).any())


def test_a_trained_head_removes_at_test_time_too() -> None:
    (states, labels), sae = texts(), sae64()
    runs = [(replace(QUICK, method="selfreg"), 0), (replace(QUICK, removal="relu"), 0), (QUICK, 0)]
    heads = train_heads(states, labels, runs, sae=sae, unintended=U)
    for head in heads[:2]:
        expected = Removal(sae, U)(states) @ head.weight[0] + head.bias
        torch.testing.assert_close(head.logits(states), expected)
    torch.testing.assert_close(heads[2].logits(states), states @ heads[2].weight[0] + heads[2].bias)


def test_features_of_each_label() -> None:
    (states, labels), sae = texts(classes=3), sae64()
    rows = [torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]), torch.tensor([], dtype=torch.long)]
    (head,) = train_heads(states, labels, [(replace(QUICK, method="selfreg"), 0)], sae=sae, unintended=rows)
    assert head.removal is not None and head.removal.features.tolist() == [2, 3]


def test_a_large_penalty_aligns_less_and_no_features_train_as_plain() -> None:
    (states, labels), sae = texts(), sae64()
    runs = [
        (replace(QUICK, method="selfreg", penalty=p, removal="none", epochs=30, patience=30), 0) for p in (0.0, 9.0)
    ]
    low, high = train_heads(
        states, labels, [(replace(s, select_by="accuracy"), i) for s, i in runs], sae=sae, unintended=U
    )
    assert high.history[-1]["loss"] > low.history[-1]["loss"]
    plain, free = train_heads(
        states, labels, [(QUICK, 0), (replace(QUICK, method="selfreg"), 0)], sae=sae, unintended=U[:0]
    )
    torch.testing.assert_close(plain.weight, free.weight)


def test_patience_decays_for_good_and_the_published_one_for_a_batch() -> None:
    kept, published = Patience(replace(QUICK, patience=1)), Patience(replace(QUICK, patience=1, legacy=True))
    for patience in (kept, published):
        assert [patience.judge(epoch, score) for epoch, score in ((1, 0.5), (2, 0.5), (3, 0.4))] == [
            "best",
            "decay",
            "decay",
        ]
    assert [kept.learning_rate(batch) for batch in (0, 1)] == [1e-2 / 4, 1e-2 / 4]
    assert [published.learning_rate(batch) for batch in (0, 1)] == [1e-2 / 4, 1e-2]
    assert kept.judge(4, 0.5) == "stop" and kept.best_epoch == 1


def test_batches_repeat_only_where_asked() -> None:
    states, labels = texts()
    seen = []
    for settings in (QUICK, replace(QUICK, reshuffle=False), replace(QUICK, legacy=True)):
        (head,) = train_heads(states, labels, [(replace(settings, learning_rate=1e-9), 0)])
        losses = [round(entry["loss"], 6) for entry in head.history]
        seen.append(len(set(losses)))
    assert seen[0] > 1 and seen[1:] == [1, 1]


@pytest.mark.parametrize("validation", [0.2, torch.arange(0, 60, 4)])
def test_validation_texts_are_never_trained_on(validation: float | Tensor) -> None:
    states, labels = texts(60)
    data = HeadData(states, labels, None)
    train, held = split_rows(data, validation, 3, "f1")
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(60))
    changed = states.clone()
    changed[held] = torch.randn(len(held), WIDTH, dtype=F64)
    settings = replace(QUICK, method="overfit")
    for_both = [train_heads(x, labels, [(settings, 3)], validation=validation)[0].weight for x in (states, changed)]
    assert torch.equal(*for_both)


def test_split_keeps_classes_and_follows_the_seed() -> None:
    labels = torch.tensor([0] * 80 + [1] * 20)
    data = HeadData(torch.randn(100, 4), labels, None)
    splits = [split_rows(data, 0.2, seed, "auroc")[1] for seed in (0, 0, 1)]
    assert all(labels[held].bincount().tolist() == [16, 4] for held in splits)
    assert torch.equal(splits[0], splits[1]) and not torch.equal(splits[0], splits[2])


@pytest.mark.parametrize("n", [17, 10, 3])
def test_small_and_odd_batches(n: int) -> None:
    """17 texts, 3 of them held out: batches of 13 and 1; fewer texts than a batch."""
    states, labels = texts(17 if n == 17 else n)
    labels = torch.arange(len(labels)) % 2
    settings = [replace(one, batch_size=13) for one in all_methods()]
    heads = train_heads(states, labels, [(one, 0) for one in settings], sae=sae64(), unintended=U)
    assert all(bool(head.weight.isfinite().all()) for head in heads)


@pytest.mark.parametrize(
    ("objective", "select_by"),
    covering(["binary", "multi_class", "multi_label", "pairwise"], ["f1", "macro_f1", "accuracy", "auroc"]),
)
def test_every_objective_learns(objective: str, select_by: str) -> None:
    states, labels = texts(240, classes=3 if objective == "multi_class" else 2)
    states = states + 2 * F.one_hot(labels, WIDTH)
    if objective == "multi_label":
        labels = torch.stack([labels, (states[:, 2] > 0).long()], -1)
    if objective == "pairwise":
        shift = torch.zeros(WIDTH, dtype=F64).index_fill(0, torch.tensor([0]), 3.0)
        states = torch.stack([states + shift, states.flip(0)], 1)
    given = None if objective == "pairwise" else labels
    settings = replace(QUICK, epochs=25, select_by=select_by)
    also = [settings, replace(settings, pair_loss="bradley_terry"), replace(settings, hidden_size=8)]
    for head in train_heads(states, given, [(one, 0) for one in also]):
        assert head.objective == objective and head.validation_score > 0.7
        expected = {"multi_class": (240, 3), "multi_label": (240, 2), "pairwise": (240, 2)}.get(objective, (240,))
        assert head.logits(states).shape == expected


def test_report_names_the_run() -> None:
    seen: list[tuple[int, float]] = []
    heads = train_heads(
        *texts(),
        [(QUICK, 0), (replace(QUICK, epochs=2), 1)],
        report=lambda run, entry: seen.append((run, entry["epoch"])),
    )
    assert seen == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (0, 4)]
    assert [len(head.history) for head in heads] == [4, 2]


def test_label_ids() -> None:
    ids, names = label_ids(["safe", "unsafe", "safe"])
    assert ids.tolist() == [0, 1, 0] and names == {"safe": 0, "unsafe": 1}
    assert label_ids(["b", "a"], {"b": 0, "a": 1})[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="Received: c"):
        label_ids(["c"], {"a": 0, "b": 1})


@pytest.mark.parametrize(
    ("states", "labels", "options", "received"),
    [
        (torch.zeros(4, 3), torch.zeros(4), {}, "only 0 in all labels"),
        (torch.full((4, 3), torch.nan), torch.tensor([0, 1, 0, 1]), {}, "4 of 4"),
        (torch.zeros(4, 3), torch.zeros(3), {}, r"labels \(3,\)"),
        (torch.zeros(4, 3), torch.tensor([0, 0, 2, 2]), {}, "none of class 1"),
        (torch.zeros(4, 3), torch.tensor([0.0, 0.5, 1, 1]), {}, "0.5"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {}, "one of each class"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), {"validation": 1.0}, "validation=1.0"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), {"validation": torch.tensor([0, 0])}, "distinct"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), {"validation": torch.arange(4)}, "4 rows"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), {"objective": "regression"}, "'regression'"),
        (torch.zeros(4, 3), torch.tensor([[0, 1], [0, 0], [0, 1], [0, 1]]), {}, "in label 0"),
    ],
)
def test_bad_data_is_refused(states: Tensor, labels: Tensor, options: dict, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        train_heads(states, labels, [(QUICK, 0)], **options)


def test_selfreg_is_refused_without_its_features() -> None:
    with pytest.raises(ValueError, match="method='selfreg'"):
        train_heads(*texts(), [(replace(QUICK, method="selfreg"), 0)])
    with pytest.raises(ValueError, match=r"\[0, 64\).*64"):
        train_heads(*texts(), [(QUICK, 0)], sae=sae64(), unintended=torch.tensor([64]))
    with pytest.raises(TypeError, match="list"):
        train_heads(texts()[0], ["a"] * 70, [(QUICK, 0)])  # pyright: ignore[reportArgumentType]
