from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from sae_transformers.evaluation.detection.detectors import best_threshold, split_rows
from sae_transformers.evaluation.results import Results, SuiteResult, compared_with
from sae_transformers.evaluation.settings import BootstrapSettings
from sae_transformers.evaluation.suites import DetectionSuite
from sae_transformers.evaluation.suites.settings import DetectionSettings
from sae_transformers.hub_cards.facts import ModelFacts
from sae_transformers.hub_cards.model_card import eval_results
from sae_transformers.latents.settings import ReadingSettings
from sae_transformers.latents.text_latents import encode_text_means, text_ids
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_model, tiny_sae

LABELS = [i % 2 for i in range(60)]


def concept_texts(seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join([*draw.choices(WORDS[:4] if label else WORDS[4:8], k=3), *draw.choices(WORDS[20:], k=8)])
        for label in LABELS
    ]


TEXTS = concept_texts()


def model():
    return tiny_model(saes=[tiny_sae(layer=1, site="resid_post", concepts={"sea": 9})])


OPTIONS = {
    "seeds": (0, 1), "ks": (1, 3), "reading": ReadingSettings(max_length=16), "bootstrap": BootstrapSettings(40),
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> SuiteResult:
    settings = DetectionSettings(**OPTIONS)
    return DetectionSuite(TEXTS, LABELS, [(0, "sea"), (0, 5)], settings)(model(), word_tokenizer())


@pytest.fixture(scope="module")
def codes():
    rows, _ = text_ids(model(), word_tokenizer(), TEXTS, max_length=16)
    return encode_text_means(model(), rows, asked=[[9, 5]])[0]


def number(result: SuiteResult, metric: str, method: str) -> float:
    value = result.value(metric, method)
    assert value is not None
    return value


def f1(truth: torch.Tensor, predicted: torch.Tensor) -> float:
    return f1_score(truth, predicted, zero_division=0)  # pyright: ignore[reportArgumentType]


def of_splits(score, metric: str) -> float:
    """Mean over splits of a scikit-learn metric on the test part; thresholds are tried on the validation part."""
    truth, found = torch.tensor(LABELS), []
    for seed in OPTIONS["seeds"]:
        split = split_rows(truth, seed)
        scores = score(split, truth)
        known, test = truth[split.validation], truth[split.test]
        if metric == "auroc":
            found.append(roc_auc_score(test, scores[split.test]))
            continue
        judge: Any = f1 if metric == "f1" else accuracy_score
        seen = scores[split.validation]
        best = max(judge(known, (seen > t).long()) for t in [seen.min() - 1, *seen])
        threshold = best_threshold(seen, known, metric)
        assert judge(known, (seen > threshold).long()) == pytest.approx(best)
        found.append(judge(test, (scores[split.test] > threshold).long()))
    return sum(found) / len(found)


@pytest.mark.parametrize("metric", ["auroc", "f1", "accuracy"])
def test_numbers_are_scikit_learns(result: SuiteResult, codes, metric: str) -> None:
    dense = codes.codes.to_dense()

    def diffmean(split, truth):
        hidden, labels = codes.hidden[split.train].double(), truth[split.train]
        return codes.hidden.double() @ (hidden[labels == 1].mean(0) - hidden[labels == 0].mean(0))

    def best(split, truth):
        areas = [roc_auc_score(truth[split.train], column) for column in dense[split.train].T]
        return dense[:, int(torch.tensor(areas).argmax())]

    def three(split, truth):
        part, labels = dense[split.train], truth[split.train]
        chosen = (part[labels == 1].mean(0) - part[labels == 0].mean(0)).abs().argsort(descending=True)[:3]
        mean, scale = part[:, chosen].mean(0), part[:, chosen].std(0)
        fit = LogisticRegression(max_iter=1000).fit(((part[:, chosen] - mean) / scale).numpy(), labels.numpy())
        return torch.from_numpy(fit.decision_function(((dense[:, chosen] - mean) / scale).numpy()))

    expected = {
        "sea of SAE 0": lambda split, truth: dense[:, 9],
        "latent 5 of SAE 0": lambda split, truth: dense[:, 5],
        "sea of SAE 0 before activation": lambda split, truth: codes.pre_acts[:, 0],
        "latent 5 of SAE 0 before activation": lambda split, truth: codes.pre_acts[:, 1],
        "best latent of SAE 0": best,
        "3 latents of SAE 0": three,
        "DiffMean at layers.1.resid_post": diffmean,
    }
    for name, score in list(expected.items())[: None if metric == "auroc" else 2]:
        assert result.value(metric, name) == pytest.approx(of_splits(score, metric), abs=1e-9), name


def test_every_number_has_its_interval_and_n(result: SuiteResult) -> None:
    methods = {one.method for one in result.measurements}
    assert {"bag of words", "linear probe at layers.1.resid_post", "random latent of SAE 0"} < methods
    for one in result.measurements:
        assert one.n and one.value is not None and one.seeds == 2
        if one.metric in ("auroc", "f1", "accuracy", "tree_accuracy"):
            assert one.low is not None and one.high is not None and one.low <= one.high and 0 <= one.value <= 1
    gain = number(result, "auroc_minus_diffmean", "sea of SAE 0")
    parts = [number(result, "auroc", name) for name in ("sea of SAE 0", "DiffMean at layers.1.resid_post")]
    assert gain == pytest.approx(parts[0] - parts[1])
    assert result.settings["positives"] == 30 and result.settings["features"] == [[0, 9], [0, 5]]
    told = {row["method"] for row in result.curves["chosen latents"]}
    assert told == {"best latent of SAE 0", "random latent of SAE 0", "1 latent of SAE 0", "3 latents of SAE 0"}


def test_trees(result: SuiteResult) -> None:
    for name in ("all latents of SAE 0", "sea of SAE 0", "hidden states at layers.1.resid_post"):
        assert number(result, "tree_nodes", f"tree on {name}") >= 3
    assert 0 <= number(result, "tree_top_share", "tree on best latent of SAE 0") <= 1
    assert result.value("tree_depth", "tree on all latents of SAE 0, fitted to all texts") is not None


def test_other_seeds_are_other_splits_and_trees_are_optional(result: SuiteResult) -> None:
    given = DetectionSettings(**{**OPTIONS, "seeds": (7,), "trees": False})
    features = [(0, "sea"), (0, 5)]
    fewer = [DetectionSuite(TEXTS, LABELS, features, given)(model(), word_tokenizer()) for _ in range(2)]
    assert fewer[0].measurements == fewer[1].measurements
    assert fewer[0].value("auroc", "sea of SAE 0") != result.value("auroc", "sea of SAE 0")
    assert not any(one.metric.startswith("tree") for one in fewer[0].measurements)


def test_splits_are_disjoint_and_of_both_labels() -> None:
    truth = torch.tensor([0] * 20 + [1] * 40)
    split = split_rows(truth, 0)
    assert sorted(torch.cat(split).tolist()) == list(range(60))
    assert [len(part) for part in split] == [30, 12, 18] and [int(truth[p].sum()) for p in split] == [20, 8, 12]
    assert split_rows(truth, 0).train.tolist() == split.train.tolist() != split_rows(truth, 1).train.tolist()


def test_best_threshold_of_a_few() -> None:
    scores, labels = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    assert best_threshold(scores, labels, "f1") == pytest.approx(0.225)  # 2/3 precision, all found: F1 0.8
    assert best_threshold(scores, labels, "accuracy") == pytest.approx(0.225)
    ties = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert best_threshold(ties, labels, "f1") < 1  # all or none
    assert best_threshold(scores, torch.tensor([0, 0, 0, 0]), "accuracy") == pytest.approx(0.8)  # none
    assert best_threshold(torch.tensor([0.9, 0.1, 0.2]), torch.tensor([0, 1, 0]), "accuracy") == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("labels", "options", "features", "told"),
    [
        (LABELS[1:], {}, None, "59 labels"),
        ([*LABELS[1:], 2], {}, None, "60 labels, .0, 1, 2."),
        ([0] * 50 + [1] * 10, {}, None, "10 of label 1"),
        (LABELS, {}, [(0, 64)], "64"),
        (LABELS, {}, [(1, 3)], "3 of SAE 1"),
        (LABELS, {}, [(0, "joy")], "joy"),
        (LABELS, {"choose_by": "luck"}, None, "choose_by='luck'"),
        (LABELS, {"ks": (0,)}, None, r"ks=\[0\]"),
        (LABELS, {"seeds": ()}, None, r"seeds=\[\]"),
    ],
)
def test_bad_input_is_refused(labels: list[int], options: dict, features: list | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings = DetectionSettings(**{**OPTIONS, **options})
        DetectionSuite(TEXTS, labels, features, settings)(model(), word_tokenizer())


def test_a_concept_may_be_called_like_a_baseline() -> None:
    names = ["random access", "base rate neglect", "mean-spirited", "prompt injection", "best friend", "SAE of SAE x"]
    sae = tiny_sae(layer=1, site="resid_post", concepts={name: 9 + i for i, name in enumerate(names)})
    suite = DetectionSuite(TEXTS, LABELS, settings=DetectionSettings(**OPTIONS))
    found = suite(tiny_model(saes=[sae]), word_tokenizer())
    baselines = {one.method for one in found.measurements if one.baseline}
    place = "layers.1.resid_post"
    assert baselines == {
        f"DiffMean at {place}", f"linear probe at {place}", f"tree on hidden states at {place}", "bag of words",
        "random latent of SAE 0",
    }  # fmt: skip
    assert all(one.baseline is not None for one in found.measurements)
    of_data = replace(found, measurements=[replace(one, data="test.csv") for one in found.measurements])
    results = Results({}, "", "", {"detection": of_data})
    read = Results.from_dict(results.to_dict()).suites["detection"]
    assert read.measurements == of_data.measurements
    model = ModelFacts(Path("m"), {}, [])
    told = {str(one.metric_name) for one in eval_results(model, results)}
    for name in names:
        assert {f"detection: auroc ({name} of SAE 0)", f"detection: f1 ({name} of SAE 0)"} <= told
        (one,) = [m for m in found.measurements if (m.metric, m.method) == ("auroc", f"{name} of SAE 0")]
        other = compared_with(one, found.measurements)
        assert other is not None and other.method == f"DiffMean at {place}"
    assert not any(name in text for text in told for name in ("DiffMean", "bag of words", "random latent"))
