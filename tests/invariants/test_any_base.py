"""What a base decides stays its own: caches, positions, outputs. And whose steering is in force."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
)

from sae_transformers import (
    FeatureEdit,
    SaeForCausalLM,
    SaeForSequenceClassification,
    SparseAutoencoder,
    Steering,
)
from sae_transformers.modeling.base_arguments import cache_argument, cache_of
from tests.architectures import tiny_bases
from tests.tiny import COMMON, VOCAB, prompt, tiny_base, tiny_model, tiny_sae

GREEDY = {"max_new_tokens": 6, "do_sample": False}
STATE = {"state_size": 8, "time_step_rank": 4}
RECURRENT = {
    "mamba": STATE,
    "falcon_mamba": STATE,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}
PUSH = Steering([FeatureEdit(feature=3, op="set", value=9.0), FeatureEdit(feature=5, op="direction", value=4.0)])


def tiny_family(family: str):
    return tiny_bases.tiny_base(family)


def recurrent(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **RECURRENT[family]})
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim > 1 and not any(part in name for part in ("norm", "A_log", "conv", "time")):
                parameter.normal_(std=0.15)
    base.generation_config.eos_token_id = None
    return base


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_bases_generate_as_they_do_alone(family):
    base = recurrent(family)
    expected = base.generate(prompt(), **GREEDY)
    model = SaeForCausalLM.from_base(copy.deepcopy(base), saes=[tiny_sae(layer=1)])
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert not torch.equal(model.generate(prompt(), steering=PUSH, **GREEDY), expected)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last_prompt", [(2, 4), (-2, None)]])
@pytest.mark.parametrize("family", [name for name in RECURRENT if name != "rwkv"])  # RWKV alone differs with its cache
def test_recurrent_bases_are_steered_alike_with_and_without_their_state(family, positions):
    model = SaeForCausalLM.from_base(recurrent(family), saes=[tiny_sae(layer=1)])
    steering = Steering(PUSH.edits, positions=positions)
    options = {"steering": steering, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    cached, uncached = (model.generate(prompt(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)


def test_a_state_that_cannot_tell_its_length_needs_a_mask():
    model = SaeForCausalLM.from_base(recurrent("mamba"), saes=[tiny_sae(layer=1)])
    first = model(prompt(), use_cache=True)
    options = {cache_argument(model.lm): cache_of(first), "steering": Steering(PUSH.edits, positions="prompt")}
    with pytest.raises(ValueError, match="attention_mask"):
        model(prompt()[:, :1], **options)


def test_outputs_are_the_bases_own_whole():
    base = tiny_base("mixtral")
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)])
    expected = base(prompt(), labels=prompt(), output_router_logits=True)
    found = model(prompt(), labels=prompt(), output_router_logits=True, output_features=True)
    assert isinstance(found, type(expected))
    assert torch.equal(found.aux_loss, expected.aux_loss) and torch.equal(found.loss, expected.loss)
    assert all(torch.equal(*pair) for pair in zip(found.router_logits, expected.router_logits, strict=True))
    assert found.sae_features[0].values.shape == (2, 9, 8)
    assert set(copy.copy(found).keys()) == set(expected.keys()) | {"sae_features", "lm_loss"}


@pytest.mark.parametrize("head", [SaeForCausalLM, SaeForSequenceClassification])
def test_an_argument_that_nobody_reads_is_refused(head):
    model = head.from_base(tiny_base(), saes=[tiny_sae(layer=1)]) if head is SaeForCausalLM else classifier()
    for wrong, meant in (("steerin", "steering"), ("output_feature", "output_features")):
        with pytest.raises(TypeError, match=f"'{wrong}'. Did you mean '{meant}'"):
            model(prompt(), **{wrong: True})


def classifier(**options):
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(tiny_base("gpt2").config)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config).eval()
    return SaeForSequenceClassification.from_base(base, saes=[tiny_sae(layer=1)], **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_either_name(name):
    model = tiny_model()
    steering = Steering(PUSH.edits, positions=[(2, 4), (7, 9)])
    whole = model(prompt(), steering=steering).logits
    first = model(prompt()[:, :6], steering=steering, use_cache=True)
    cache = cache_of(first)
    rest = model(prompt()[:, 6:], **{name: copy.deepcopy(cache)}, steering=steering)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-5, atol=1e-5)
    expected = model.generate(prompt(), steering=steering, **GREEDY)
    assert torch.equal(model.generate(prompt(), **{name: copy.deepcopy(cache)}, steering=steering, **GREEDY), expected)
    with pytest.raises(TypeError, match="given twice"):
        model(prompt(), cache=cache, past_key_values=cache)


def test_generate_has_no_place_for_reports():
    with pytest.raises(TypeError, match="output_features=True"):
        tiny_model().generate(prompt(), output_features=True, max_new_tokens=1)


def padded(ids: torch.Tensor, width: int = 4) -> dict[str, torch.Tensor]:
    zeros = ids.new_zeros(len(ids), width)
    return {"input_ids": torch.cat([zeros, ids], 1), "attention_mask": torch.cat([zeros, torch.ones_like(ids)], 1)}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_detect_scores_a_padded_text_as_the_text_alone(architecture):
    model = tiny_model(architecture)
    alone = model.detect(prompt(), feature=3, pre_activations=True, skip_first=0).per_text
    left = padded(prompt())
    torch.testing.assert_close(
        model.detect(left, feature=3, pre_activations=True, skip_first=0).per_text, alone, rtol=1e-5, atol=1e-5
    )
    unmasked = model.detect(
        left["input_ids"], feature=3, pre_activations=True, skip_first=0
    ).per_text  # padding is known by its id
    torch.testing.assert_close(unmasked, alone, rtol=1e-5, atol=1e-5)
    positions = {"position_ids": torch.arange(9).flip(0).expand(2, 9)}
    assert not torch.allclose(
        model.detect({"input_ids": prompt(), **positions}, feature=3, pre_activations=True, skip_first=0).per_text,
        alone,
    )


def test_a_feature_head_scores_a_padded_text_as_the_text_alone():
    model = classifier(feature_head={"pooling": "mean"})
    with torch.no_grad():
        torch.testing.assert_close(model(**padded(prompt())).logits, model(prompt()).logits, rtol=1e-5, atol=1e-5)


def test_a_text_without_a_token_that_counts_has_no_score():
    ids = prompt(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    found = tiny_model().detect({"input_ids": ids, "attention_mask": mask}, feature=3, pre_activations=True)
    alone = tiny_model().detect(ids[:1], feature=3, pre_activations=True)
    torch.testing.assert_close(found.per_text[:1], alone.per_text, rtol=1e-5, atol=1e-5)
    assert torch.isnan(found.per_text[1]) and not found.per_token[1].any() and found.per_token[0, 0] == 0


def test_detect_of_no_tokens():
    with pytest.raises(ValueError, match="0 tokens"):
        tiny_model().detect(torch.empty(1, 0, dtype=torch.long), feature=3, pre_activations=True, skip_first=0)


def test_generate_takes_embeddings():
    base = tiny_base()
    embeddings = base.get_input_embeddings()(prompt()).detach()
    model = tiny_model()
    expected = base.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), expected)
    for positions in ("prompt", "generated", [(2, 4)]):
        steering = Steering(PUSH.edits, positions=positions)
        by_ids = model.generate(prompt(), steering=steering, **GREEDY)[:, 9:]
        assert torch.equal(model.generate(inputs_embeds=embeddings, steering=steering, **GREEDY), by_ids)


# -- whose steering --------------------------------------------------------------------------------------------------


def other(feature: int) -> Steering:
    return Steering(
        [FeatureEdit(feature=feature, op="set", value=12.0), FeatureEdit(feature=9, op="direction", value=6)]
    )


def test_the_nearest_steering_wins():
    model = tiny_model()
    a, b, c, d = (other(n) for n in (3, 12, 25, 40))
    tokens = {s: model.generate(prompt(), steering=s, **GREEDY) for s in (a, b, c, d)}
    plain = model.generate(prompt(), **GREEDY)
    assert len({tuple(t.flatten().tolist()) for t in (*tokens.values(), plain)}) == 5
    model.steering = a
    assert torch.equal(model.generate(prompt(), **GREEDY), tokens[a])
    model.generation_config.sae_steering = b.to_dict()
    assert torch.equal(model.generate(prompt(), **GREEDY), tokens[b])
    with model.steered(c):
        assert torch.equal(model.generate(prompt(), **GREEDY), tokens[c])
        same = copy.deepcopy(model.generation_config)  # as a pipeline passes it
        assert torch.equal(model.generate(prompt(), same, **GREEDY), tokens[c])
        passed = copy.deepcopy(model.generation_config)
        passed.sae_steering = d.to_dict()
        assert torch.equal(model.generate(prompt(), passed, **GREEDY), tokens[d])
        assert torch.equal(model.generate(prompt(), passed, steering=a, **GREEDY), tokens[a])
    with model.steered(False):
        assert torch.equal(model.generate(prompt(), **GREEDY), plain)


def test_two_models_on_one_base_have_a_generation_config_each():
    base = tiny_base()
    one, two = (SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)]) for _ in range(2))
    one.generation_config.sae_steering = PUSH.to_dict()
    assert getattr(two.generation_config, "sae_steering", None) is None
    assert getattr(base.generation_config, "sae_steering", None) is None


def test_tasks_of_one_thread_have_blocks_of_their_own():
    model = tiny_model()
    expected = [model(prompt(), steering=s).logits for s in (other(3), other(12))]
    plain = model(prompt()).logits

    async def task(steering: Steering) -> torch.Tensor:
        with model.steered(steering):
            await asyncio.sleep(0)
            return model(prompt()).logits

    async def outside() -> torch.Tensor:
        await asyncio.sleep(0)
        return model(prompt()).logits

    async def both() -> tuple:
        return await asyncio.gather(task(other(3)), task(other(12)), outside())

    found = asyncio.run(both())
    assert all(torch.equal(*pair) for pair in zip(found, [*expected, plain], strict=True))


def test_a_suspended_generators_block_is_not_in_force():
    model = tiny_model()
    plain = model(prompt()).logits
    steered = model(prompt(), steering=PUSH).logits

    def passes():
        with model.steered(PUSH):
            yield model(prompt()).logits
            yield model(prompt()).logits

    running = passes()
    assert torch.equal(next(running), steered)
    assert torch.equal(model(prompt()).logits, plain)
    assert torch.equal(next(running), steered)
    running.close()
    assert torch.equal(model(prompt()).logits, plain)


def test_steering_set_in_the_config_is_in_force():
    model = tiny_model()
    expected = model(prompt(), steering=PUSH).logits
    model.config.steering = PUSH.to_dict()
    assert torch.equal(model(prompt()).logits, expected)
    assert model.steering == PUSH


def test_a_plan_made_before_the_dtype_changed():
    model = tiny_model()
    plan = model.prepare_steering(PUSH)
    model.double()
    assert torch.equal(model(prompt(), steering=plan).logits, model(prompt(), steering=PUSH).logits)
    assert model(prompt(), steering=plan).logits.shape[-1] == VOCAB


# -- loading ---------------------------------------------------------------------------------------------------------


def test_buffers_that_no_file_holds_are_the_bases_own_after_loading(tmp_path):
    """Falcon-H1 fills its mixers' `mup_vector` where transformers initialises the model around them."""
    base = tiny_family("falcon_h1")
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)], weights_scope="full")
    model.save_pretrained(tmp_path)
    loaded = SaeForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(prompt()).logits, model(prompt()).logits)


def test_another_base_of_the_same_shape_is_told(tmp_path):
    tiny_base(seed=0).save_pretrained(tmp_path / "base")
    SaeForCausalLM.from_base(str(tmp_path / "base"), [tiny_sae(layer=1)]).save_pretrained(tmp_path / "model")
    rounded = SaeForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)  # is no other base
    assert len(rounded.config.base_fingerprint) > 2
    tiny_base(seed=7).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="other weights.*force=True"):
        SaeForCausalLM.from_pretrained(tmp_path / "model")
    forced = SaeForCausalLM.from_pretrained(tmp_path / "model", force=True)
    assert torch.equal(forced(prompt()).logits, tiny_base(seed=7)(prompt()).logits)


def test_what_is_not_there_and_what_has_no_saes_is_said(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base model without SAEs.*from_base"):
        SaeForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder.*nowhere"):
        SparseAutoencoder.from_pretrained(str(tmp_path / "nowhere"))


def test_steering_in_a_generation_config_has_a_json_form():
    config = GenerationConfig(sae_steering=PUSH)
    assert Steering.coerce(json.loads(config.to_json_string())["sae_steering"]) == PUSH


@pytest.mark.parametrize("unknown", [-100.0, -1.0])
def test_a_negative_concept_label_is_unknown(unknown):
    model = tiny_model(concepts={"one": 3})
    model.config.loss_weights["conditioning"] = 1.0
    targets = torch.tensor([[1.0], [unknown]])
    first = model(prompt()[:1], concept_targets=targets[:1]).sae_losses["conditioning"]
    both = model(prompt(), concept_targets=targets).sae_losses["conditioning"]
    torch.testing.assert_close(both, first / 2)


def test_a_quantised_base_is_not_saved_whole_and_its_pointer_says_so(tmp_path):
    """By the attributes that transformers sets; bitsandbytes itself, 8 and 4 bit on a CPU, is not installed here."""
    tiny_base().save_pretrained(tmp_path / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.is_quantized, base.quantization_method = True, "bitsandbytes"
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)])
    with pytest.warns(UserWarning, match="bitsandbytes.*quantization_config="):
        model.save_pretrained(tmp_path / "sae")
    model.config.weights_scope = "full"
    with pytest.raises(ValueError, match="quantised base cannot be saved whole.*bitsandbytes"):
        model.save_pretrained(tmp_path / "full")
