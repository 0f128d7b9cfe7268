"""vLLM's engine against `generate`, token by token: chunks of prompts and answers of different steering in a pass."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, FeatureReweighting, Steering
from tests.tiny import VOCAB
from tests.vllm.worlds import STEERINGS, WIDTH, Job, answers, differing, mixed_jobs, published, run_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own"),
]


def assert_equal(folder: Path, model, **engine) -> None:
    """All answers in one call, and again on a warm prefix cache."""
    jobs = mixed_jobs()
    wanted = answers(model, jobs)
    assert len({tuple(answer.tokens) for answer in wanted}) > 20  # steering does something
    first, second = run_engine(folder, jobs, rounds=2, **engine)
    assert differing(first.tokens, wanted) == []
    assert differing(second.tokens, wanted) == []
    assert second.cached > first.cached > 0


@pytest.mark.parametrize("scope", ["sae", "full"])
def test_eight_prompts_with_eight_steerings(tmp_path, scope):
    assert_equal(tmp_path, published(tmp_path, scope=scope))


def test_compiled(tmp_path):
    assert_equal(tmp_path, published(tmp_path), enforce_eager=False)


def test_two_ranks_of_tensor_parallel(tmp_path):
    assert_equal(tmp_path, published(tmp_path), tensor_parallel_size=2)


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3", "gemma2", "gemma3_text", "olmo2", "mixtral"])
def test_families(tmp_path, architecture):
    assert_equal(tmp_path, published(tmp_path, architecture))


def test_preempted_requests(tmp_path):
    jobs = mixed_jobs()
    wanted = answers(published(tmp_path), jobs)
    (found,) = run_engine(tmp_path, jobs, num_gpu_blocks_override=8, block_size=32, max_model_len=192)
    assert found.preemptions > 0
    assert differing(found.tokens, wanted) == []


def long_prompt_jobs() -> list[Job]:
    prompt = torch.randint(3, VOCAB, (183,), generator=torch.Generator().manual_seed(7)).tolist()
    return [Job(prompt, False if steering is None else steering.to_dict()) for steering in STEERINGS.values()]


def test_the_prefix_cache_knows_the_steering(tmp_path):
    jobs = long_prompt_jobs()
    wanted = answers(published(tmp_path), jobs)
    engine: dict[str, Any] = {
        "max_num_seqs": 1,
        "block_size": 32,
    }  # one after the other: each could read what the one before left
    (found,) = run_engine(tmp_path, jobs, **engine)
    assert differing(found.tokens, wanted) == []
    assert found.cached > 0  # what lies before the first steered token is shared
    (careless,) = run_engine(tmp_path, jobs, without_key=True, **engine)
    assert differing(careless.tokens, wanted)  # the control


def test_the_published_default_and_none(tmp_path):
    default = Steering([FeatureEdit(feature=5, op="set", value=8.0)])
    model = published(tmp_path, steering=default)
    jobs = [Job(job.prompt, given) for job in mixed_jobs()[:12] for given in (None, False, job.steering)]
    plain = answers(
        model, [Job(job.prompt, default.to_dict() if job.steering is None else job.steering) for job in jobs]
    )
    (found,) = run_engine(tmp_path, jobs)
    assert differing(found.tokens, plain) == []


def test_steerings_that_share_no_plan(tmp_path):
    model = published(tmp_path)
    scores = torch.rand(WIDTH, generator=torch.Generator().manual_seed(1)).tolist()
    kinds = [
        Steering([FeatureEdit(feature=5, op="set", value=8.0)], balance=True),
        Steering([FeatureEdit(feature=5, op="set", value=8.0)], balance=False),
        Steering([FeatureReweighting(sae=1, scores=scores, mode="swap")], keep_error=False),
        Steering([FeatureReweighting(sae=1, scores=scores, mode="weight")], keep_error=False),
        Steering(reconstruct=(0, 1)),
    ]
    jobs = [Job(job.prompt, steering.to_dict()) for job in mixed_jobs()[:6] for steering in kinds]
    (found,) = run_engine(tmp_path, jobs)
    assert differing(found.tokens, answers(model, jobs)) == []


def test_a_base_with_other_weights(tmp_path):
    model = published(tmp_path)
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.mul_(1.5)
    model.lm.save_pretrained(tmp_path / "base")
    with pytest.raises(RuntimeError, match="were put into a base with other weights"):
        run_engine(tmp_path, [Job([5, 6], False)])


def test_a_default_that_vllm_cannot_do_is_told_at_start(tmp_path):
    published(tmp_path, steering=Steering([FeatureEdit(feature=5, op="set", value=8.0, when="active")]))
    with pytest.raises(RuntimeError, match="not supported on vLLM"):
        run_engine(tmp_path, [])


def test_bad_steering_ends_nothing(tmp_path):
    published(tmp_path)
    with pytest.raises(RuntimeError, match="Bad steering. `feature` must be a name or an integer"):
        run_engine(tmp_path, [Job([5, 6], {"edits": [{"feature": 999, "op": "set", "value": 1.0}]})])
