"""What a model is made of survives copying, saving, loading and wrapping; nothing leaks into the base."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from sae_transformers import FeatureEdit, SaeConfig, SaeForCausalLM, Steering
from tests.covering import covering
from tests.tiny import ARCHITECTURES, VOCAB, WIDTH, prompt, tiny_base, tiny_model, tiny_sae

EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}
# Tensors that come from a file lie at other addresses, where the CPU's matrix products round in another order.
LOADED: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
STEERING = Steering([FeatureEdit(feature=3, op="add", value=6.0), FeatureEdit(feature=7, op="scale", value=-2.0)])
SCOPES = ["sae", "full"]


def run(model, ids=None, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt() if ids is None else ids, **options).logits


def assert_same(a, b, steering=STEERING, tolerance=LOADED) -> None:
    """Equal parameters, equal logits with and without steering, and the steering does something."""
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in b.state_dict().items():
        torch.testing.assert_close(a.state_dict()[name], value, **EXACT)
    torch.testing.assert_close(run(a), run(b), **tolerance)
    torch.testing.assert_close(run(a, steering=steering), run(b, steering=steering), **tolerance)
    assert not torch.equal(run(a), run(a, steering=steering))


@pytest.fixture
def base_path(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def wrapped(base, weights_scope="sae", **settings) -> Any:
    return SaeForCausalLM.from_base(base, [tiny_sae(layer=1, **settings)], weights_scope=weights_scope)


# -- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_copies_are_equal_and_independent(how, site):
    model = tiny_model(site=site, concepts={"anger": 3})
    model.steering = Steering([FeatureEdit(feature="anger", op="add", value=2.0)])
    with model.steered(STEERING):  # a block of the original is none of the copy's
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
    assert twin.steering == model.steering
    assert_same(twin, model, tolerance=EXACT)
    before = run(model, steering=STEERING)
    with torch.no_grad():
        twin.saes[0].W_dec.mul_(3.0)
        twin.lm.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(run(model, steering=STEERING), before, **EXACT)
    assert not torch.allclose(run(twin, steering=STEERING), 2 * before, atol=1e-3), "the copy's hooks use its own SAE"
    with twin.steered(STEERING):
        torch.testing.assert_close(run(model), run(model, steering=model.steering), **EXACT)


def test_state_dict_through_torch_save():
    model, other = tiny_model(), SaeForCausalLM.from_base(tiny_base(seed=9), [tiny_sae(8, layer=1)])
    assert not torch.equal(run(model), run(other))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(other, model, tolerance=EXACT)


# -- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "weights_scope"), covering(ARCHITECTURES, SCOPES))
def test_round_trip_of_every_family_under_unchanged_names(tmp_path, architecture, weights_scope):
    """Also mixtral and the other mixture models, whose conversion mapping would rewrite names like `saes.mlp_out`."""
    tiny_base(architecture).save_pretrained(tmp_path / "base")
    saes = [tiny_sae(1, layer=1, site="mlp_out"), tiny_sae(2, layer=0, site="attn_out", activation="jumprelu")]
    model = SaeForCausalLM.from_base(str(tmp_path / "base"), saes, weights_scope=weights_scope).eval()
    model.save_pretrained(tmp_path / "own")
    with safe_open(str(tmp_path / "own" / "model.safetensors"), "pt") as tensors:
        names = tensors.keys()
        saved = {n: tensors.get_tensor(n) for n in names if n.startswith("saes.")}
    expected = {n: v for n, v in model.state_dict().items() if n.startswith("saes.")}
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, **EXACT)
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "own", output_loading_info=True)
    loaded, info = both
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same(loaded, model, Steering([FeatureEdit(1, 3, "add", 3.0), FeatureEdit(0, 7, "set", 2.0)]))


@pytest.mark.parametrize("weights_scope", SCOPES)
def test_sharded_saving(base_path, tmp_path, weights_scope):
    model = wrapped(base_path, weights_scope).eval()
    model.save_pretrained(tmp_path / "own", max_shard_size="8KB")
    shards = list((tmp_path / "own").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "own" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and {s.name for s in shards} == set(index["weight_map"].values())
    assert all(n.startswith("saes.") for n in index["weight_map"]) == (weights_scope == "sae")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "own"), model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("weights_scope", SCOPES)
def test_device_maps(base_path, tmp_path, weights_scope, device_map):
    model = wrapped(base_path, weights_scope).eval()
    model.save_pretrained(tmp_path / "own")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "own", device_map=device_map)
    if device_map == "auto" and torch.accelerator.is_available():
        loaded = loaded.cpu()
    assert_same(loaded, model)


@pytest.mark.parametrize("weights_scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "auto"])
def test_a_bf16_base_keeps_an_fp32_sae(tmp_path, weights_scope, dtype):
    tiny_base(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = SaeForCausalLM.from_base(
        str(tmp_path / "base"), [tiny_sae(layer=1)], weights_scope=weights_scope, dtype=torch.bfloat16
    ).eval()
    assert model.saes[0].dtype == torch.float32 and model.lm.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "own")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=dtype)
    assert {p.dtype for p in loaded.lm.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in loaded.saes.state_dict().values()} == {torch.float32}
    for name, value in model.saes.state_dict().items():
        torch.testing.assert_close(loaded.saes.state_dict()[name], value, **EXACT)
    assert_same(loaded, model)
    # Edits are made in fp32 and rounded once.
    ids = prompt()
    with torch.no_grad():
        out = model(ids, output_sae_inputs=True)
        steered = model(ids, steering=STEERING, output_hidden_states=True).hidden_states[2]
    x = out.sae_inputs[0]
    assert x.dtype == torch.bfloat16
    z = model.saes[0].encode(x)
    change = 6.0 * model.saes[0].W_dec[3] + (-3.0 * z[..., 7:8]) * model.saes[0].W_dec[7]
    torch.testing.assert_close(steered, (x.float() + change).to(torch.bfloat16), rtol=0.01, atol=0.01)
    assert (steered == (x.float() + change).to(torch.bfloat16)).float().mean() > 0.99


def test_generation_config_fields_survive(base_path, tmp_path):
    """`_from_model_config: true` in the file makes `from_pretrained` drop fields that it does not know."""
    value = STEERING.to_dict()
    for weights_scope in SCOPES:
        model = wrapped(base_path, weights_scope).eval()
        model.generation_config._from_model_config = True
        model.generation_config.sae_steering = value
        model.generation_config.max_new_tokens = 4
        model.save_pretrained(tmp_path / weights_scope)
        config: Any = GenerationConfig.from_pretrained(tmp_path / weights_scope)
        assert config.sae_steering == value
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / weights_scope)
        assert loaded.generation_config.sae_steering == value
        ids = prompt()
        options = {"do_sample": False, "max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
        found = loaded.generate(ids, **options).scores
        steered = wrapped(tiny_base()).generate(ids, steering=STEERING, **options).scores
        plain = tiny_base().generate(ids, **options).scores
        torch.testing.assert_close(found, steered, **LOADED)
        assert not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("weights_scope", SCOPES)
def test_attention_is_chosen_at_loading(base_path, tmp_path, weights_scope, attention):
    wrapped(base_path, weights_scope).save_pretrained(tmp_path / "own")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "own", attn_implementation=attention)
    assert loaded.lm.config._attn_implementation == attention
    base = AutoModelForCausalLM.from_pretrained(base_path, attn_implementation=attention)
    torch.testing.assert_close(run(loaded), run(base), **LOADED)
    loaded.set_attn_implementation("eager")
    assert loaded.lm.config._attn_implementation == "eager"


# -- a live base -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_wrapping_leaves_the_bases_attention_alone(attention):
    base = tiny_base()
    base.set_attn_implementation(attention)
    before = run(base)
    model = wrapped(base)
    assert base.config._attn_implementation == attention and model.config._attn_implementation == attention
    assert model.config.text_config is base.config
    torch.testing.assert_close(run(model), before, **EXACT)
    torch.testing.assert_close(run(base), before, **EXACT)
    attentions = model(prompt(), output_attentions=True).attentions if attention == "eager" else None
    assert attentions is None or len(attentions) == 3


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_wrapping_leaves_the_bases_experts_alone(architecture, experts):
    base = tiny_base(architecture)
    if not hasattr(base, "set_experts_implementation"):
        pytest.skip("this release of transformers has one implementation of experts")
    base.set_experts_implementation(experts)
    before = run(base)
    model = wrapped(base, site="mlp_out")
    assert base.config._experts_implementation == experts
    torch.testing.assert_close(run(model), before, **EXACT)
    again = SaeConfig(text_config=base.config, saes=model.config.saes)
    assert getattr(again.text_config, "_experts_implementation", None) == experts


def test_two_models_on_one_base_do_not_disturb_each_other():
    base, ids = tiny_base(), prompt()
    before = run(base)
    one = SaeForCausalLM.from_base(base, [tiny_sae(1, layer=1)])
    two = SaeForCausalLM.from_base(base, [tiny_sae(2, layer=1), tiny_sae(3, layer=0, site="mlp_out")])
    expected_one = run(wrapped(tiny_base()), steering=STEERING)
    both = Steering([FeatureEdit(0, 5, "add", 4.0), FeatureEdit(1, 6, "set", 5.0)])
    apart = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(2, layer=1), tiny_sae(3, layer=0, site="mlp_out")])
    expected_two = run(apart, steering=both)
    for _ in range(2):
        torch.testing.assert_close(run(one, steering=STEERING), expected_one, **EXACT)
        torch.testing.assert_close(run(two, steering=both), expected_two, **EXACT)
        torch.testing.assert_close(run(base), before, **EXACT)
    with one.steered(STEERING):
        torch.testing.assert_close(run(one), expected_one, **EXACT)
        torch.testing.assert_close(run(two), before, **EXACT)
        with two.steered(both):
            torch.testing.assert_close(run(one), expected_one, **EXACT)
            torch.testing.assert_close(run(two), expected_two, **EXACT)
    one.unwrap()
    torch.testing.assert_close(run(two, steering=both), expected_two, **EXACT)
    with torch.no_grad():
        found = two(ids, output_features=True).sae_features[0].to_dense()
        alone = apart(ids, output_features=True).sae_features[0].to_dense()
    torch.testing.assert_close(found, alone, **EXACT)


def test_unwrap_removes_every_hook():
    base = tiny_base()

    def hooks() -> int:
        kinds = (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        )
        return sum(len(getattr(module, kind)) for module in base.modules() for kind in kinds)

    start, before = hooks(), run(base)
    sites = ["resid_pre", "resid_post", "mlp_out", "attn_out"]
    saes = [tiny_sae(i, layer=1, site=site) for i, site in enumerate(sites)]
    transcoder = tiny_sae(
        hook="model.layers.0.mlp.input", hook_out="model.layers.0.mlp.output", apply_b_dec_to_input=False
    )
    model = SaeForCausalLM.from_base(base, [*saes, transcoder])
    assert hooks() > start
    steered, wrapped = run(model, steering=STEERING), hooks()
    assert model.unwrap() is base
    assert hooks() == start
    torch.testing.assert_close(run(base), before, **EXACT)
    torch.testing.assert_close(run(model), before, **EXACT)
    for _ in range(2):
        model.rewrap()
        assert hooks() == wrapped
        torch.testing.assert_close(run(model, steering=STEERING), steered, **EXACT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"steering": STEERING},
        {"output_features": True},
        {"features": {0: [1]}},
        {"output_sae_inputs": True},
        {"labels": prompt()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_saes_that_are_not_reached_are_an_error(options, training):
    """Or a safety edit would be missing and nobody told."""
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)], loss_weights={"sparsity": 0.5}).train(training)
    model(prompt(), **options)
    model.unwrap()
    with pytest.raises(RuntimeError, match="`rewrap` puts the SAEs back"):
        model(prompt(), **options)
    model.rewrap()
    model(prompt(), **options)


@pytest.mark.slow
def test_a_base_that_is_compiled_by_itself_is_an_error():
    """Its hooks would look for their work where the compiled whole finds it."""
    model = wrapped(tiny_base())
    model.lm = torch.compile(model.lm, backend="eager")
    run(model)
    with pytest.raises(RuntimeError, match="compile the whole model"):
        run(model, steering=STEERING)


def test_layers_that_are_dropped_in_training_are_no_error():
    base = tiny_base("opt", layerdrop=1.0)
    model = wrapped(base).train()
    assert model(prompt(), output_sae_inputs=True).sae_inputs == (None,)
    with pytest.raises(RuntimeError, match="was not reached"), torch.no_grad():
        model.eval()
        model.unwrap()
        model(prompt(), output_features=True)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bloom"])
def test_hidden_states_show_the_edit_from_the_next_entry_on(architecture, site):
    layer = 1
    model = tiny_model(architecture, site=site)
    ids = prompt()
    with torch.no_grad():
        plain = model.lm(input_ids=ids, output_hidden_states=True).hidden_states
        out = model(ids, output_hidden_states=True, steering=STEERING, output_features=True)
        x = model(ids, output_sae_inputs=True).sae_inputs[0]
        z = model.saes[0].encode(x)
        change = 6.0 * model.saes[0].W_dec[3] + (-3.0 * z[..., 7:8]) * model.saes[0].W_dec[7]
    assert len(out.hidden_states) == len(plain) == 4
    for i in range(layer + 1):
        torch.testing.assert_close(out.hidden_states[i], plain[i], **EXACT)
    for i in range(layer + 1, 4):
        assert not torch.allclose(out.hidden_states[i], plain[i], atol=1e-3), i
    if site == "resid_post":
        torch.testing.assert_close(out.hidden_states[layer + 1], plain[layer + 1] + change, rtol=1e-5, atol=1e-5)


# -- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_of_a_full_model(tmp_path, tied):
    plain = tiny_base(tie_word_embeddings=tied)
    model = wrapped(tiny_base(tie_word_embeddings=tied), "full").eval()
    for each in (plain, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert model.config.text_config.vocab_size == VOCAB + 6 == model.lm.config.vocab_size
    assert model.get_input_embeddings().weight.shape == (VOCAB + 6, WIDTH)
    ids = torch.tensor([[5, VOCAB + 5, 7, VOCAB]])
    torch.testing.assert_close(run(model, ids), run(plain, ids), **EXACT)
    assert run(model, ids).shape[-1] == VOCAB + 6
    model.save_pretrained(tmp_path / "own")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    torch.testing.assert_close(run(loaded, ids), run(model, ids), **LOADED)
    torch.testing.assert_close(run(loaded, ids, steering=STEERING), run(model, ids, steering=STEERING), **LOADED)


def test_resized_embeddings_do_not_fit_an_adapter(base_path, tmp_path):
    model = wrapped(base_path, "sae")
    model.resize_token_embeddings(VOCAB)  # no change
    model.save_pretrained(tmp_path / "same")
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    with pytest.raises(ValueError, match="weights_scope = 'full'"):
        model.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own" / "model.safetensors").exists()
    model.config.weights_scope = "full"
    model.save_pretrained(tmp_path / "full")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "full"), model.eval())


@pytest.mark.parametrize("weights_scope", SCOPES)
def test_tied_embeddings_stay_tied(tmp_path, weights_scope):
    tiny_base(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = wrapped(str(tmp_path / "base"), weights_scope).eval()
    model.save_pretrained(tmp_path / "own")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    twin = copy.deepcopy(loaded)
    for each in (model, loaded, twin):
        assert each.lm.lm_head.weight is each.lm.model.embed_tokens.weight
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    assert_same(loaded, model)
    if weights_scope == "full":
        with safe_open(str(tmp_path / "own" / "model.safetensors"), "pt") as tensors:
            names = set(tensors.keys())
        assert len(names & {"lm.lm_head.weight", "lm.model.embed_tokens.weight"}) == 1


@pytest.mark.parametrize("weights_scope", SCOPES)
def test_the_headless_model_has_the_same_weights(base_path, tmp_path, weights_scope):
    model = wrapped(base_path, weights_scope).eval()
    model.save_pretrained(tmp_path / "own")
    body = AutoModel.from_pretrained(tmp_path / "own")
    with torch.no_grad():
        hidden = body(prompt(), steering=STEERING).last_hidden_state
        torch.testing.assert_close(model.lm.lm_head(hidden), run(model, steering=STEERING), **LOADED)
