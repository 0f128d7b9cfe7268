"""Scores of a latent's effect: against full forwards and numpy over dense activations, planted latents, bad input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_transformers import FeatureEdit, GenerationSettings, Journal, SaeForCausalLM, Steering
from sae_transformers.evaluation.generation.continuations import continue_prompts, prompt_ids
from sae_transformers.latents.sparse_codes import SparseCodes
from sae_transformers.training.steering.effect_scores import (
    OutcomeMoments,
    delta_confidences,
    generated_correlations,
    outcome_correlations,
    token_confidences,
)
from sae_transformers.training.steering.settings import OutputScoreSettings
from tests.create_training_data.words import word_tokenizer
from tests.tiny import VOCAB, tiny_base, tiny_model, tiny_sae

PROMPT = "w1 w2 w3"
NEUTRAL = OutputScoreSettings(prompt=PROMPT)
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w10", "w2 w3"]


@pytest.fixture(scope="module")
def model() -> Any:
    """Two SAEs of different kinds."""
    saes = [tiny_sae(layer=0, site="resid_post"), tiny_sae(2, activation="relu", d_sae=40, layer=2, site="resid_post")]
    return tiny_model(saes=saes).eval()


@pytest.mark.parametrize("k", [1, 4])
@torch.no_grad()
def test_delta_confidence_is_that_of_two_full_forwards(model: Any, k: int) -> None:
    tokenizer, features = word_tokenizer(), torch.tensor([0, 9, 33, 39])
    settings = replace(NEUTRAL, confidence_tokens=k, amplification=3.0)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for sae in (0, 1):
        found = delta_confidences(model, tokenizer, features, settings, sae=sae, rows_at_once=3)
        hidden = model(input_ids=ids, output_sae_inputs=True).sae_inputs[sae]
        peak = float(model.saes[sae].encode(hidden)[0, -1].max())
        base = model.lm(input_ids=ids).logits[0, -1].double().softmax(-1)
        for feature, score in zip(features.tolist(), found.tolist(), strict=True):
            edit = Steering([FeatureEdit(sae, feature, "add", 3 * peak)], positions="last_prompt")
            raised = model(input_ids=ids, steering=edit).logits[0, -1].double().softmax(-1)
            expected = [-sum(sorted(p.log().tolist())[-k:]) / k for p in (raised, base)]
            assert score == pytest.approx(expected[0] - expected[1], abs=1e-5)
    assert token_confidences(torch.zeros(1, VOCAB).double(), k).item() == pytest.approx(np.log(VOCAB))


def test_delta_confidence_finds_the_latents_that_decide_the_next_token() -> None:
    made = tiny_model(saes=[tiny_sae(layer=2, site="resid_post")]).eval()
    with torch.no_grad():
        made.saes[0].W_dec *= 1e-3
        made.lm.lm_head.weight[50] *= 5
        made.saes[0].W_dec[7] = made.lm.lm_head.weight[50]
    found = delta_confidences(made, word_tokenizer(), torch.arange(64), NEUTRAL)
    assert found.abs().argmax() == 7 and found[7] < -1 and float(found.abs().sort().values[-2]) < 0.1


def dense(model: Any, before: Sequence[Sequence[int]], generated: Sequence[Sequence[int]], sae: int) -> list[Tensor]:
    """Of each text the latents of the positions that give its tokens, (n_tokens, d_sae), each text read alone."""
    found = []
    for given, new in zip(before, generated, strict=True):
        ids = torch.tensor([[*given, *new]])
        hidden = model(input_ids=ids, steering=False, output_sae_inputs=True).sae_inputs[sae]
        found.append(model.saes[sae].encode(hidden)[0, len(given) - 1 : -1].double())
    return found


@pytest.fixture(scope="module")
def written(model: Any) -> tuple[list[list[int]], list[list[int]], Tensor]:
    """Prompts, what follows each, of one to nine tokens, and an outcome far from 0."""
    draw = torch.Generator().manual_seed(3)
    before = [torch.randint(3, VOCAB, (1 + i % 4,), generator=draw).tolist() for i in range(24)]
    after = [torch.randint(3, VOCAB, (1 + i % 9,), generator=draw).tolist() for i in range(24)]
    return before, after, 1000 + torch.randn(24, generator=draw).double()


@pytest.mark.parametrize("pooling", ["max", "mean", "count"])
@torch.no_grad()
def test_correlations_are_those_of_numpy_over_dense_activations(model: Any, written: tuple, pooling: str) -> None:
    before, after, outcomes = written
    seen: list[int] = []
    found = generated_correlations(
        model, before, after, outcomes, pooling=pooling, tokens_at_once=40, report=seen.append
    )
    assert [tuple(one.shape) for one in found] == [(64,), (40,)] and sum(seen) == 24 and len(seen) > 3
    pooled = {"max": lambda z: z.amax(0), "mean": lambda z: z.mean(0), "count": lambda z: (z != 0).double().sum(0)}
    for sae, mine in enumerate(found):
        table = torch.stack([pooled[pooling](z) for z in dense(model, before, after, sae)]).numpy()
        moving = 0
        for latent in range(table.shape[1]):
            if table[:, latent].std() < 1e-9:
                assert mine[latent] == 0
                continue
            moving += 1
            expected = np.corrcoef(table[:, latent], outcomes.numpy())[0, 1]
            assert float(mine[latent]) == pytest.approx(expected, abs=1e-6)
        assert moving > 20


def test_moments_of_batches_are_those_of_all_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    table = torch.rand(500, 30, generator=draw, dtype=torch.float64) * (torch.rand(500, 30, generator=draw) < 0.1)
    table[:, 3], table[:, 4] = 0, 0.1  # never, and always the same, whose mean is not exact
    outcomes = 1e6 + table[:, 5] + 0.3 * torch.randn(500, generator=draw, dtype=torch.float64)
    moments = OutcomeMoments(30)
    for rows in torch.arange(500).split(37):
        moments.add(SparseCodes.from_dense(table[rows]), outcomes[rows])
    moments.add(SparseCodes.from_dense(table[:0]), outcomes[:0])
    found = moments.correlations()
    moved = [i for i in range(30) if i not in (3, 4)]
    expected = np.corrcoef(table.numpy()[:, moved].T, outcomes.numpy())[-1, :-1]
    assert np.allclose(found[moved].numpy(), expected, atol=1e-9)
    assert found[3] == 0 and found[4] == 0 and found.argmax() == 5 and moments.n == 500


@torch.no_grad()
def test_a_planted_latent_is_found_by_what_the_model_writes() -> None:
    """Latent 11 reads the token w9, and the outcome is whether the model writes w9."""
    base = tiny_base(vocab_size=len(word_tokenizer()))
    sae = tiny_sae(activation="relu", layer=0, site="resid_pre")
    tokenizer = word_tokenizer()
    token = tokenizer("w9", add_special_tokens=False)["input_ids"][0]
    sae.W_enc[:, 11] = 10 * base.get_input_embeddings().weight[token]
    sae.b_enc[11] = -6 * float(base.get_input_embeddings().weight[token].square().sum())
    model = SaeForCausalLM.from_base(base, saes=[sae]).eval()
    settings = GenerationSettings(max_new_tokens=12, temperature=3.0, samples_per_prompt=40, batch_size=40)

    def scorer(texts: Sequence[str]) -> list[bool]:
        return ["w9" in text.split()[:-1] for text in texts]

    found = outcome_correlations(model, tokenizer, PROMPTS, scorer, settings)
    assert found[0].argmax() == 11 and float(found[0][11]) > 0.9 and float(found[0].sort().values[-2]) < 0.9


def test_a_stopped_correlation_goes_on(model: Any, tmp_path: Path) -> None:
    tokenizer, settings = word_tokenizer(), GenerationSettings(5, samples_per_prompt=3, batch_size=4)

    def scorer(texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    expected = outcome_correlations(model, tokenizer, PROMPTS, scorer, settings)
    done: list[int] = []

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    journal = Journal(tmp_path / "journal", "tiny")
    with pytest.raises(KeyboardInterrupt):
        outcome_correlations(model, tokenizer, PROMPTS, scorer, settings, report=stop, journal=journal)
    again = Journal(tmp_path / "journal", "tiny")
    found = outcome_correlations(model, tokenizer, PROMPTS, scorer, settings, journal=again)
    assert again.found == 2 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    rows = [prompt for prompt in PROMPTS for _ in range(3)]
    made = continue_prompts(model, tokenizer, rows, None, settings)
    by_hand = generated_correlations(
        model, prompt_ids(model, tokenizer, rows, 0), made.ids, torch.tensor(scorer(made.texts)).double()
    )
    assert all(torch.equal(a, b) for a, b in zip(found, by_hand, strict=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"outcomes": torch.ones(2)}, "2 rows, of which the outcome is 1 at"),
        ({"outcomes": torch.tensor([1.0, float("nan")])}, "1 that are not"),
        ({"outcomes": torch.ones(3)}, "2 texts, 3 outcomes"),
        ({"generated": [[5], []]}, "1 without a token"),
        ({"before": [[5], []]}, "1 without a token"),
        ({"pooling": "median"}, "pooling='median'"),
    ],
)
def test_bad_outcomes_are_refused(model: Any, change: dict, told: str) -> None:
    given = {"before": [[5], [6, 7]], "generated": [[5], [6]], "outcomes": torch.tensor([0.0, 1.0]), **change}
    with pytest.raises(ValueError, match=told):
        generated_correlations(model, **given)


def test_bad_codes_and_settings_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="Received: 4 latents, 2 rows"):
        OutcomeMoments(5).add(SparseCodes.from_dense(torch.ones(2, 4)), torch.zeros(2))
    same = OutcomeMoments(4)
    for rows in (3, 7, 11):
        same.add(SparseCodes.from_dense(torch.rand(rows, 4)), torch.full((rows,), 0.1, dtype=torch.float64))
    with pytest.raises(ValueError, match="Received: 21 rows, of which the outcome is 0.1"):
        same.correlations()
    with pytest.raises(ValueError, match="Received: 0 rows"):
        OutcomeMoments(5).correlations()
    with pytest.raises(ValueError, match="Received: confidence_tokens=0"):
        OutputScoreSettings(confidence_tokens=0)
    with pytest.raises(ValueError, match="Received: 3 to 64"):
        delta_confidences(model, word_tokenizer(), torch.tensor([3, 64]), NEUTRAL)
