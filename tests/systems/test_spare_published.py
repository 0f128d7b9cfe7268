"""What SpARE published, computed again: the selection of its caches, the scores of its rows, its demonstrations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_transformers import SelectKnowledgeSettings, select_published_knowledge
from sae_transformers.create_training_data.grouped_prompts import grouped_rows, read_grouped_prompts
from sae_transformers.create_training_data.knowledge_conflict import question_groups, read_conflicts
from sae_transformers.evaluation.knowledge import answer_behaviours
from sae_transformers.training.steering.functional_features import (
    loss_weights,
    read_functional_features,
    select_features,
)

DATA = Path(__file__).parents[3] / "shared/data/knowledge_conflict"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")

SELECTED = {  # K, sum of information, features of context and of memory, the first of both
    "llama-2-7b/layer12": (0.07, 533.099556, 502, 404, [83995, 43152, 104461], [9298, 71670, 10902]),
    "gemma-2-9b/layer24": (0.01, 232.058767, 42, 18, [76071, 55422, 82954], [10649, 68997, 80242]),
}
SUMS = {"llama-2-7b/layer12": (48.033977, 29.953465), "gemma-2-9b/layer24": (100.901384, 76.728829)}
SAMPLES = {
    "llama-2-7b/layer12": (83995, 0.1048833156, 0.09951721, 0.22952302, 0.12997164),
    "gemma-2-9b/layer24": (76071, 0.1377079463, 5.47984219, 9.32566452, 3.88369226),
}


@pytest.mark.parametrize("name", SELECTED)
def test_fact_d_selection(name):
    proportion, total, n_context, n_memory, context, memory = SELECTED[name]
    features = read_functional_features(DATA / "spare" / name)
    assert float(features.mutual_information.sum()) == pytest.approx(total, abs=1e-6)
    a, b = select_features(features, proportion=proportion, legacy=True)
    assert (len(a), len(b)) == (n_context, n_memory)
    assert (a[:3].tolist(), b[:3].tolist()) == (context, memory)
    sums = float(features.values_a[a].sum()), float(features.values_b[b].sum())
    assert sums == pytest.approx(SUMS[name], abs=1e-4)


@pytest.mark.parametrize("name", SAMPLES)
def test_fact_f_samples(name):
    feature, *expected = SAMPLES[name]
    features = read_functional_features(DATA / "spare" / name)
    assert [float(tensor[feature]) for tensor in features] == pytest.approx(expected, abs=1e-8)


def test_fact_f_expectation_is_the_difference_of_values():
    features = read_functional_features(DATA / "spare/llama-2-7b/layer12")
    difference = features.values_a - features.values_b
    assert float((features.expectation - difference).abs().max()) < 5e-4
    assert torch.equal(features.expectation == 0, (features.values_a == 0) & (features.values_b == 0))


def test_fact_b_information_of_dead_latents():
    """Noise: the published mean of latents that are never active, and what a selection without them is worth."""
    features = read_functional_features(DATA / "spare/gemma-2-9b/layer24")
    dead = features.mutual_information[~features.live]
    assert 0.00171 < float(dead.mean()) < 0.00174
    assert float(dead.sum() / features.mutual_information.sum()) > 0.9
    a, b = select_features(features, proportion=0.01)
    assert len(a) + len(b) in (2, 3)


@pytest.mark.parametrize("name", SELECTED)
def test_the_verb_selects_from_the_cache_without_a_model(name):
    proportion, _, n_context, n_memory, context, memory = SELECTED[name]
    config = "spare-llama-2-7b" if "llama" in name else "spare-gemma-2-9b-context"
    model, layer = name.split("/layer")
    settings = SelectKnowledgeSettings.from_config(
        config, features=str(DATA / "spare" / model), feature_layers=(int(layer),)
    )
    assert settings.selection.proportions == (proportion,)
    result = select_published_knowledge(settings)
    (found,) = result.layers
    assert (len(found.context), len(found.memory)) == (n_context, n_memory)
    assert (found.context[:3].tolist(), found.memory[:3].tolist()) == (context, memory)
    edits = result.steering["context"].feature_edits
    strength = settings.selection.strengths[0]
    sums = [sum(edit.value or 0.0 for edit in edits if edit.op == op) for op in ("at_least", "shrink")]
    feature, _, _, z_context, _ = SAMPLES[name]
    assert sums[0] == pytest.approx(strength * SUMS[name][0], rel=1e-5)
    assert (edits[-n_context].feature, edits[-n_context].value) == (feature, pytest.approx(strength * z_context))


def test_published_prompts_are_read_whole(rows):
    questions = read_conflicts(str(DATA / "nq_swap_dev.parquet"))
    grouped = read_grouped_prompts(DATA / "spare/llama-2-7b/grouped_prompts", questions)
    assert len(grouped) == 5 * 1044
    first = grouped[:1044]
    assert (sum(one.from_context for one in first), sum(one.from_memory for one in first)) == (413, 239)
    assert grouped_rows(first, questions) == rows[42]
    assert first[0].prompt(questions).count("question: ") == 4


@pytest.fixture(scope="module")
def rows() -> dict[int, list[dict]]:
    folder = DATA / "spare/llama-2-7b/grouped_prompts"
    return {seed: json.loads((folder / f"3shot-seed{seed}.json").read_text()) for seed in range(42, 47)}


def test_fact_g_scores(rows):
    for found in rows.values():
        columns = [[row[name] for row in found] for name in ("pred_answer", "sub_answer", "org_answer")]
        told = answer_behaviours(*columns)
        assert told.context == [bool(row["sub_answer_em"]) for row in found]
        assert told.memory == [bool(row["org_answer_em"]) for row in found]
        assert not any(c and m for c, m in zip(*told, strict=True))
        assert len(found) == 1044
    told = answer_behaviours(*[[row[n] for row in rows[42]] for n in ("pred_answer", "sub_answer", "org_answer")])
    assert (sum(told.context), sum(told.memory)) == (413, 239)


def test_fact_h_weights_are_nearly_uniform(rows):
    found = [row for part in rows.values() for row in part]
    for own, other, name in (("ss_loss", "so_loss", "sub_answer_em"), ("so_loss", "ss_loss", "org_answer_em")):
        group = [row for row in found if row[name]]
        losses = [torch.tensor([row[key] for row in group], dtype=torch.float64) for key in (own, other)]
        raw = losses[1] / (losses[0] + losses[1])
        assert float(raw.min()) >= 0.49755 and float(raw.max()) <= 0.5115
        weights = loss_weights(*losses)
        assert float((weights * len(group) - 1).abs().max()) < 0.025
        assert float(weights.sum()) == pytest.approx(1.0)


def test_fact_i_and_the_rows_of_nq_swap(rows):
    questions = read_conflicts(str(DATA / "nq_swap_dev.parquet"))
    assert len(questions) == 4746
    assert np.random.RandomState(42).choice(len(questions), 3, replace=False).tolist() == [1566, 3159, 538]
    groups = question_groups(questions)
    assert sorted(row for group in groups for row in group) == list(range(4746))
    group_of = {row: number for number, group in enumerate(groups) for row in group}
    for row in rows[42]:
        question = questions[row["item_idx"]]
        assert list(question.sub_answer) == row["sub_answer"]
        assert list(question.org_answer) == row["org_answer"]
    pool = {group_of[row["item_idx"]] for row in rows[42]}
    assert len(pool) == 128
