"""Gemma 2 caps its attention scores. The attention that transformers takes by itself left the cap out, up to 5.19;
later releases take another, and refuse that one."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from sae_transformers import SaeForCausalLM, load_base
from tests.tiny import GEMMA2_TAKES_SDPA, prompt, tiny_base, tiny_sae


@pytest.fixture(autouse=True)
def the_releases_own_attention(monkeypatch):
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", GEMMA2_TAKES_SDPA)


@pytest.fixture
def base(tmp_path):
    """A folder of a base whose cap is felt, and the logits that its weights stand for."""
    model = tiny_base("gemma2", attn_logit_softcapping=2.0)
    model.save_pretrained(tmp_path / "base")
    model.set_attn_implementation("eager")
    capped = model(prompt()).logits
    model.config.attn_logit_softcapping = None
    for block in model.model.layers:
        block.self_attn.attn_logit_softcapping = None
    assert (capped - model(prompt()).logits).abs().max() > 1e-2
    return tmp_path / "base", capped


def test_every_way_to_load_it_keeps_the_cap(base, tmp_path):
    folder, logits = base
    sae = tiny_sae(layer=1, site="resid_post")
    made = SaeForCausalLM.from_base(str(folder), sae)
    torch.testing.assert_close(made(prompt()).logits, logits)
    for scope in ("sae", "full"):
        made.config.weights_scope = scope
        made.save_pretrained(tmp_path / scope)
        loaded = SaeForCausalLM.from_pretrained(tmp_path / scope)
        torch.testing.assert_close(loaded(prompt()).logits, logits)


def test_a_base_for_harvesting_keeps_the_cap(base, monkeypatch):
    folder, logits = base
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: None)
    torch.testing.assert_close(load_base(folder).model(prompt()).logits, logits)


@pytest.mark.skipif(not GEMMA2_TAKES_SDPA, reason="this release refuses it")
def test_who_asks_for_an_attention_gets_it(base):
    folder, _ = base
    asked = SaeForCausalLM.from_base(str(folder), attn_implementation="sdpa")
    assert asked.lm.config._attn_implementation == "sdpa"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert SaeForCausalLM.from_base(loaded).lm.config._attn_implementation == "sdpa"


def test_a_base_without_a_cap_stays_as_it_is(tmp_path):
    plain = tiny_base("llama")
    plain.save_pretrained(tmp_path)
    loaded = SaeForCausalLM.from_base(str(tmp_path))
    assert loaded.lm.config._attn_implementation == plain.config._attn_implementation == "sdpa"
