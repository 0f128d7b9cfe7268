"""From a call's options to what hooks are asked to do."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError

import pytest
import torch

from sae_transformers import SaeForCausalLM, SaeForSequenceClassification, SaeModel
from sae_transformers.modeling.call_options import SaeCallOptions
from sae_transformers.modeling.call_record import CallRecord, CallRequest
from tests.tiny import prompt, tiny_model, tiny_sae


def test_options_are_told_from_the_rest():
    kwargs = {"steering": False, "features": [3], "position_ids": None}
    options, others = SaeCallOptions.take(kwargs)
    assert (options.steering, options.features, options.stop_at_last_sae) == (False, [3], False)
    assert others == {"position_ids": None}
    assert set(kwargs) == {"steering", "features", "position_ids"}  # a compiled LLaVA needs it unchanged
    assert options.reports and not SaeCallOptions().reports


@pytest.mark.parametrize("head", [SaeForCausalLM, SaeForSequenceClassification, SaeModel])
def test_a_heads_signature_names_what_trainers_and_bases_name(head):
    names = set(inspect.signature(head.forward).parameters)
    assert {"input_ids", "attention_mask", "inputs_embeds", "return_dict", "kwargs"} <= names
    assert not names & set(SaeCallOptions.__dataclass_fields__)


@pytest.mark.parametrize(("given", "meant"), [("steerin", "steering"), ("output_feature", "output_features")])
def test_a_misspelt_option_is_refused(given, meant):
    with pytest.raises(TypeError, match=f"Received: '{given}'. Did you mean '{meant}'"):
        tiny_model()(prompt(), **{given: True})


def test_a_request_cannot_be_changed_and_a_record_starts_empty():
    request = CallRequest(2, 5, features={0: None})
    with pytest.raises(FrozenInstanceError):
        request.keep_inputs = True  # pyright: ignore[reportAttributeAccessIssue]
    record = CallRecord(request)
    assert request.works_at(0) and not request.concerns(1)
    assert record.missed(range(2)) == [0] and not record.is_complete


def test_every_use_of_an_sae_is_a_call_of_the_module():
    """Where hooks of offloading bring the weights."""
    sae, hidden = tiny_sae(), torch.randn(3, 32)
    calls = []
    sae.register_forward_pre_hook(lambda module, args: calls.append(module))
    some = torch.tensor([3, 9])
    z = sae.encode(hidden)
    sae.encode_pre_acts(hidden=hidden)
    sae.encode_selected(hidden, some)
    sae.encode_sparse(hidden)
    sae.decode(z, hidden=hidden)
    sae.alignment(hidden, features=some)
    sae.remove(hidden, some)
    sae.losses(hidden)
    sae(hidden)
    assert calls == [sae] * 9
