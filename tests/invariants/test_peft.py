"""LoRA on the base beside SAEs that train: the copy that PEFT trains is the one that hooks run."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from tests.invariants.test_trainer import checkpoint_blocks
from tests.tiny import prompt, tiny_base, tiny_sae

EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
TERMS = {"lm": 1.0, "reconstruction": 0.5, "sparsity": 0.1, "conditioning": 0.8}
STEERING = Steering([FeatureEdit(feature="anger", op="add", value=6.0), FeatureEdit(feature=7, op="scale", value=-2)])
TRAINED = ["saes", "saes.0"]

pytestmark = [
    # Releases before 0.21 look for the config of a base without a name, to compare vocabularies.
    pytest.mark.filterwarnings("ignore:Could not find a config file in  :UserWarning"),
]


def model_with_sae(site: str = "resid_post", two: bool = False) -> Any:
    saes = [tiny_sae(layer=1, site=site, concepts={"anger": 3})]
    if two:
        saes.append(tiny_sae(2, layer=2, site="attn_out", activation="relu"))
    return SaeForCausalLM.from_base(tiny_base(), saes, loss_weights=TERMS, detach_hidden=False)


def lora(trained: str | None, **options) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=None if trained is None else [trained], **options,
    )  # fmt: skip


def run(model: Any, **options) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=prompt(), **options).logits


def features(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=prompt(), output_features=True).sae_features[0].to_dense()


def train(model: Any, steps: int = 3) -> list[float]:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(steps):
        ids = prompt(4, 8, seed=step)
        loss = model(input_ids=ids, labels=ids, concept_targets=torch.tensor([[1], [0], [1], [-100]])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def hooked_sae(model) -> Any:
    """A plain SAE with the weights that PEFT has trained."""
    state = {n: p for n, p in model.named_parameters() if "modules_to_save.default" in n}
    sae = tiny_sae(layer=1, concepts={"anger": 3})
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            (trained,) = [p for n, p in state.items() if n.endswith(f".{name}") and ".1." not in n.split("saes")[1]]
            parameter.copy_(trained)
    return sae


@pytest.mark.parametrize("trained", [*TRAINED, None])
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_an_untrained_adapter_changes_nothing(trained, site):
    plain = model_with_sae(site)
    expected, steered, latents = run(plain), run(plain, steering=STEERING), features(plain)
    model = get_peft_model(model_with_sae(site), lora(trained))
    torch.testing.assert_close(run(model), expected, **EXACT)
    torch.testing.assert_close(run(model, steering=STEERING), steered, **EXACT)
    torch.testing.assert_close(features(model), latents, **EXACT)
    inner: Any = model.get_base_model()
    with inner.steered(STEERING):
        torch.testing.assert_close(run(model), steered, **EXACT)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(input_ids=prompt(), steering=STEERING, **options)
    assert torch.equal(found, plain.generate(prompt(), steering=STEERING, **options))
    assert not torch.equal(steered, expected)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
@pytest.mark.parametrize("two", [False, True])
def test_the_trained_copy_is_what_hooks_run(trained, site, two):
    model = get_peft_model(model_with_sae(site, two), lora(trained))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = features(model)
    losses = train(model)
    assert losses[-1] != losses[0]
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, start[name])
        assert moved == parameter.requires_grad, name
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save.default" in name), name
    assert any("W_enc" in n and p.requires_grad for n, p in model.named_parameters())
    # The features that a pass reports are those of the trained weights, at this pass's hidden states.
    latents = features(model)
    assert not torch.allclose(latents, before, atol=1e-4)
    with torch.no_grad():
        x = model(input_ids=prompt(), output_sae_inputs=True).sae_inputs[0]
    sae = hooked_sae(model)
    torch.testing.assert_close(latents, sae.encode(x).detach(), **CLOSE)
    # And so is the edit.
    if site == "resid_post":
        with torch.no_grad():
            out = model(input_ids=prompt(), steering=STEERING, output_hidden_states=True)
        change = 6.0 * sae.W_dec[3] - 3.0 * latents[..., 7:8] * sae.W_dec[7]
        torch.testing.assert_close(out.hidden_states[2], (x + change).detach(), **CLOSE)


def test_training_with_peft_equals_training_without():
    """With LoRA frozen at zero only the SAE moves, as it does in a plain model."""
    plain = model_with_sae()
    expected = train(plain)
    model = get_peft_model(model_with_sae(), lora("saes"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    assert train(model) == pytest.approx(expected, rel=1e-6)
    for name, parameter in hooked_sae(model).named_parameters():
        torch.testing.assert_close(parameter, dict(plain.saes[0].named_parameters())[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("trained", TRAINED)
def test_saved_adapters_load(tmp_path, trained):
    model = get_peft_model(model_with_sae(), lora(trained))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(model_with_sae(), str(tmp_path / "adapter"))
    torch.testing.assert_close(run(loaded), run(model), **CLOSE)
    torch.testing.assert_close(run(loaded, steering=STEERING), run(model, steering=STEERING), **CLOSE)
    torch.testing.assert_close(features(loaded), features(model), **CLOSE)
    assert not torch.allclose(run(loaded), run(model_with_sae()), atol=1e-4)


@pytest.mark.parametrize("trained", TRAINED)
def test_merged_models_are_equal_and_plain(tmp_path, trained):
    model = get_peft_model(model_with_sae(), lora(trained))
    train(model)
    expected, steered, latents = run(model), run(model, steering=STEERING), features(model)
    merged = model.merge_and_unload()
    assert isinstance(merged, SaeForCausalLM)
    assert merged.state_dict().keys() == model_with_sae().state_dict().keys()
    torch.testing.assert_close(run(merged), expected, **CLOSE)
    torch.testing.assert_close(run(merged, steering=STEERING), steered, **CLOSE)
    torch.testing.assert_close(features(merged), latents, **CLOSE)
    merged.config.weights_scope = "full"
    merged.save_pretrained(tmp_path / "own")
    loaded = SaeForCausalLM.from_pretrained(tmp_path / "own")
    torch.testing.assert_close(run(loaded, steering=STEERING), steered, **CLOSE)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_with_gradient_checkpointing(trained, site):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        inner = model_with_sae(site)
        if checkpointing:
            checkpoint_blocks(inner)
        model = get_peft_model(inner, lora(trained))
        losses = train(model)
        results.append((losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    Version(version("peft")) < Version(transformers.integrations.peft.MIN_PEFT_VERSION),
    reason="this transformers wants a newer peft for `add_adapter` (5.24.0: 0.22); `get_peft_model` takes any",
)
def test_adapters_by_transformers_own_interface():
    model = model_with_sae()
    expected, steered = run(model), run(model, steering=STEERING)
    model.add_adapter(lora("saes"), adapter_name="default")
    torch.testing.assert_close(run(model), expected, **EXACT)
    torch.testing.assert_close(run(model, steering=STEERING), steered, **EXACT)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save.default" in name), name
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    changed = run(model, steering=STEERING)
    assert not torch.allclose(changed, steered, atol=1e-4)
    with torch.no_grad():
        x = model(prompt(), output_sae_inputs=True).sae_inputs[0]
    torch.testing.assert_close(features(model), hooked_sae(model).encode(x).detach(), **CLOSE)
    model.disable_adapters()
    torch.testing.assert_close(run(model), expected, **EXACT)
    model.enable_adapters()
    torch.testing.assert_close(run(model, steering=STEERING), changed, **EXACT)


def test_a_disabled_adapter_gives_the_original_sae():
    plain = model_with_sae()
    steered, latents = run(plain, steering=STEERING), features(plain)
    model = get_peft_model(model_with_sae(), lora("saes"))
    train(model)
    with model.disable_adapter():
        torch.testing.assert_close(run(model, steering=STEERING), steered, **EXACT)
        torch.testing.assert_close(features(model), latents, **EXACT)
    assert not torch.allclose(run(model, steering=STEERING), steered, atol=1e-4)


def test_a_copy_of_a_peft_model_trains_its_own_sae():
    model = get_peft_model(model_with_sae(), lora("saes"))
    train(model)
    before = run(model, steering=STEERING)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(run(twin, steering=STEERING), before, **EXACT)
    train(twin)
    torch.testing.assert_close(run(model, steering=STEERING), before, **EXACT)
    assert not torch.allclose(run(twin, steering=STEERING), before, atol=1e-4)
