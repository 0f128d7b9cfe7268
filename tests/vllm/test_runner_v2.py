"""The state of vLLM's second model runner, with batches as it makes them: it does not run whole without a GPU."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.modeling.sae_bank import SaeBank
from sae_transformers.vllm.steps import Steps
from tests.tiny import WIDTH, tiny_sae

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own"),
    pytest.mark.filterwarnings("ignore"),
]
ADD = FeatureEdit(feature=3, op="direction", value=6.0)


def state():
    from sae_transformers.vllm.runner_v2 import SaeModelState

    made = object.__new__(SaeModelState)
    # What `DefaultModelState` has for a plain text model, without a device.
    made.steps = Steps(SaeBank([tiny_sae(activation="relu", layer=1)]))
    made.requests, made.rope_state, made.prompt_embeds_state = {}, None, None
    made.supports_mm_inputs = False
    return made


def new_request(name: str, prompt: int, steering: Steering | None, prefilled: int = 0):
    from vllm import SamplingParams

    extra = {} if steering is None else {"steering": steering.to_dict()}
    return SimpleNamespace(
        req_id=name, prompt_token_ids=list(range(prompt)), prefill_token_ids=list(range(prompt + prefilled)),
        sampling_params=SamplingParams(extra_args=extra or None), mm_features=[],
    )  # fmt: skip


def batch(*parts: tuple[str, int, int]):
    """(request, computed, scheduled) each; arrays are longer than the requests, as the runner's are."""
    names, computed, scheduled = zip(*parts, strict=True)
    return SimpleNamespace(
        req_ids=list(names), num_reqs=len(names), num_computed_tokens_np=np.array([*computed, 99]),
        num_scheduled_tokens=np.array([*scheduled, 99]),
    )  # fmt: skip


def steered(made, n_tokens: int) -> list[bool]:
    hidden = torch.zeros(n_tokens, WIDTH)
    return made.steps.apply(0, hidden).ne(hidden).any(-1).tolist()


def test_chunks_answers_padding_and_removal():
    made = state()
    made.add_request(0, new_request("all", 4, Steering([ADD])))
    made.add_request(1, new_request("plain", 3, None))
    made.add_request(2, new_request("generated", 3, Steering([ADD], positions="generated")))
    made.prepare_inputs(batch(("all", 0, 2), ("plain", 0, 3), ("generated", 0, 2)), None)
    assert steered(made, 9) == [True, True, False, False, False, False, False, False, False]
    made.prepare_inputs(batch(("generated", 2, 1), ("all", 2, 2), ("plain", 3, 1)), None)
    assert steered(made, 4) == [True, True, True, False]  # the last prompt token writes the first new one
    made.remove_request("all")
    made.prepare_inputs(batch(("generated", 3, 1), ("plain", 4, 1)), None)
    assert steered(made, 2) == [True, False]
    assert list(made.requests) == ["plain", "generated"]


def test_a_preempted_request_keeps_the_end_of_its_prompt():
    made = state()
    made.add_request(0, new_request("one", 3, Steering([ADD], positions="prompt")))
    made.remove_request("one")
    made.add_request(1, new_request("one", 3, Steering([ADD], positions="prompt"), prefilled=4))
    made.prepare_inputs(batch(("one", 0, 7)), None)
    assert steered(made, 7) == [True] * 3 + [False] * 4


def test_passes_that_warm_up_are_not_steered():
    made = state()
    made.add_request(0, new_request("all", 4, Steering([ADD])))
    made.prepare_inputs(batch(("all", 0, 4)), None)
    made.prepare_dummy_inputs(1, 4)
    assert steered(made, 4) == [False] * 4
