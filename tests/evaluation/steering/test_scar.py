"""SCAR's protocol: bins, perplexity with a stride, references and first divergent tokens under every factor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sae_transformers import Steering
from sae_transformers.evaluation.generation.continuations import continue_prompts
from sae_transformers.evaluation.generation.first_divergent_token import mean_first_divergent_token
from sae_transformers.evaluation.settings import BootstrapSettings, GenerationSettings
from sae_transformers.evaluation.steering.scar import (
    PromptRow,
    scar_steering,
    strided_perplexity,
    toxicity_bins,
)
from sae_transformers.evaluation.suites import ScarSuite
from sae_transformers.evaluation.suites.settings import ScarSettings
from tests.tiny import tiny_model

ROWS = [
    PromptRow("w1 w2 w3", 0.02, "w4 w5"),
    PromptRow("w4 w5", 0.55, "w6"),
    PromptRow("w6 w7 w8", 0.97, "w1 w2 w3"),
    PromptRow("w9 w3", 0.99, "w7 w8"),
]
TEXTS = [" ".join(f"w{(7 * i + j) % 90}" for j in range(n)) for i, n in enumerate((55, 60, 12))]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(normalization="layer_norm", concepts={"toxicity": 5}).eval()


def word_count(texts: Any) -> list[float]:
    return [len(set(text.split())) / 100 for text in texts]


@pytest.fixture(scope="module")
def result(model: Any, tokenizer: Any) -> Any:
    small: dict[str, Any] = {"continuation_tokens": 5, "window": 32, "stride": 16}
    small["bootstrap"] = BootstrapSettings(40, 42)
    return ScarSuite(ROWS, "toxicity", word_count, TEXTS, ScarSettings((-100.0, 0.0, 1.0), **small))(model, tokenizer)


def test_bins() -> None:
    assert toxicity_bins([0.0, 0.049, 0.05, 0.15, 1.0, 0.999]) == {
        (0.0, 0.05): [0, 1], (0.05, 0.1): [2], (0.15, 0.2): [3], (0.95, 1.0): [4, 5],
    }  # fmt: skip
    values = [number / 1000 for number in range(1001)]
    bins = toxicity_bins(values, most=10, seed=1)
    assert len(bins) == 20 and all(len(set(places)) == 10 for places in bins.values())
    assert all(low - 1e-9 <= values[place] < high + 1e-3 for (low, high), places in bins.items() for place in places)
    assert bins != toxicity_bins(values, most=10, seed=2) and bins == toxicity_bins(values, most=10, seed=1)
    with pytest.raises(ValueError, match="width=0.0"):
        toxicity_bins([0.5], width=0.0)
    with pytest.raises(ValueError, match="most=0"):
        toxicity_bins([0.5], most=0)
    with pytest.raises(ValueError, match="1 values of toxicity outside"):
        toxicity_bins([0.5, 1.2])


def by_window(model: Any, ids: list[int], window: int, stride: int, steering: Any) -> tuple[list[float], list[int]]:
    """Summed losses and counts of each window, as the reference loop over windows has them: labels of what an
    earlier window scored are masked."""
    losses, counts, done = [], [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        row = torch.tensor([ids[begin:end]])
        labels = row.clone()
        labels[:, : -(end - done)] = -100
        with torch.no_grad():
            logits = model(row, steering=steering).logits[0, :-1]
        losses.append(float(F.cross_entropy(logits, labels[0, 1:], reduction="sum")))
        counts.append(int((labels[0, 1:] != -100).sum()))
        done = end
        if end == len(ids):
            break
    return losses, counts


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (20, 19), (64, 8), (200, 50)])
@pytest.mark.parametrize("factor", [None, -100.0])
def test_perplexity_with_a_stride(model: Any, window: int, stride: int, factor: float | None) -> None:
    ids = torch.randint(3, 99, (75,), generator=torch.Generator().manual_seed(2)).tolist()
    way: Any = False if factor is None else scar_steering("toxicity", factor)
    losses, counts = by_window(model, ids, window, stride, way)
    found = strided_perplexity(model, ids, window=window, stride=stride, steering=way)
    assert sum(counts) == 74
    assert found == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-4)
    means = [loss / count for loss, count in zip(losses, counts, strict=True)]
    legacy = strided_perplexity(model, ids, window=window, stride=stride, steering=way, legacy=True)
    assert legacy == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-4)


def test_uniform_text_has_the_vocabulary_for_its_perplexity() -> None:
    flat: Any = tiny_model().eval()
    with torch.no_grad():
        flat.lm.lm_head.weight.zero_()
    assert strided_perplexity(flat, list(range(3, 60)), window=16, stride=5) == pytest.approx(99)


@pytest.mark.parametrize(("ids", "window", "stride"), [([1], 8, 4), ([1, 2, 3], 8, 8), ([1, 2, 3], 8, 0)])
def test_windows_that_do_not_work(model: Any, ids: list[int], window: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"Received: {len(ids)} tokens, window={window}, stride={stride}"):
        strided_perplexity(model, ids, window=window, stride=stride)


def test_every_factor_by_hand(result: Any, model: Any, tokenizer: Any) -> None:
    assert scar_steering("toxicity", 2.0) == Steering.from_dict(scar_steering("toxicity", 2.0).to_dict())
    assert not scar_steering("toxicity", 2.0).keep_error and ScarSettings().factors == (-100, -50, -1, 0, 1, 50, 100)
    prompts = [row.prompt for row in ROWS]
    plain = continue_prompts(model, tokenizer, prompts, settings=GenerationSettings(5, temperature=0.0))
    way = scar_steering("toxicity", -100.0)
    steered = continue_prompts(model, tokenizer, prompts, [way] * 4, GenerationSettings(5, temperature=0.0))
    name = "factor -100"
    assert result.value("toxicity", name) == pytest.approx(sum(word_count(steered.texts)) / 4)
    change = sum(word_count(steered.texts)) / 4 - sum(word_count(plain.texts)) / 4
    assert result.value("toxicity_change", name) == pytest.approx(change)
    whole = [f"{prompt}{text}" for prompt, text in zip(prompts, steered.texts, strict=True)]
    assert result.value("toxicity_with_prompt", name) == pytest.approx(sum(word_count(whole)) / 4)
    assert result.value("perplexity", name) == pytest.approx(steered.perplexity, rel=1e-4)
    losses, count = 0.0, 0
    for row in ROWS:
        ids, length = tokenizer(f"{row.prompt} {row.continuation}")["input_ids"], len(row.prompt.split())
        with torch.no_grad():
            logits = model(torch.tensor([ids]), steering=way).logits[0, length - 1 : -1]
        losses += float(F.cross_entropy(logits, torch.tensor(ids[length:]), reduction="sum"))
        count += len(ids) - length
    assert result.value("reference_perplexity", name) == pytest.approx(math.exp(losses / count), rel=1e-4)
    ids = [1, *(token for text in TEXTS for token in tokenizer(text)["input_ids"])]
    expected = strided_perplexity(model, ids, window=32, stride=16, steering=way)
    assert result.value("text_perplexity", name) == pytest.approx(expected)


def test_first_divergent_tokens(result: Any, model: Any, tokenizer: Any) -> None:
    made = {}
    prefixes = [" ".join(text.split()[:50]) for text in TEXTS[:2]]
    for factor in (None, -100.0, 0.0, 1.0):
        ways = None if factor is None else [scar_steering("toxicity", factor)] * 2
        made[factor] = continue_prompts(model, tokenizer, prefixes, ways, GenerationSettings(50, temperature=0.0)).ids
    for factor in (-100.0, 0.0, 1.0):
        for metric, other in (("fdt_base", None), ("fdt_factor_1", 1.0)):
            expected = mean_first_divergent_token(made[factor], made[other])
            assert result.value(metric, f"factor {factor:g}") == expected
    lengths = [sum(map(len, made[factor])) / 2 for factor in (None, 1.0)]
    assert result.value("fdt_base", "none") == lengths[0]
    assert result.value("fdt_factor_1", "factor 1") == lengths[1]  # with itself: the whole length


def test_bins_of_the_result(result: Any) -> None:
    rows = [row for row in result.curves["by_bin"] if row["method"] == "factor 0"]
    assert [(row["low"], row["n"]) for row in rows] == [(0.0, 1), (0.55, 1), (0.95, 2)]
    mean = sum(row["toxicity"] * row["n"] for row in rows) / 4
    assert mean == pytest.approx(result.value("toxicity", "factor 0"))
    assert result.settings["prompts"] == 4 and result.settings["fdt_texts"] == 2


def test_the_most_toxic_alone(model: Any, tokenizer: Any) -> None:
    settings = ScarSettings((1.0,), least_toxicity=0.9, continuation_tokens=2, bootstrap=BootstrapSettings(5, 42))
    found = ScarSuite(ROWS, 5, word_count, settings=settings)(model, tokenizer)
    assert found.settings["prompts"] == 2 and len(found.curves["by_bin"]) == 2
    assert not [one for one in found.measurements if one.metric.startswith(("fdt", "text"))]
    with pytest.raises(ValueError, match="Received: 0 prompts"):
        ScarSuite(ROWS[:1], 5, word_count, settings=ScarSettings(least_toxicity=0.9))(model, tokenizer)
    with pytest.raises(ValueError, match="999"):
        ScarSuite(ROWS, 999, word_count)(model, tokenizer)
