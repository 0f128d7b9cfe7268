"""SAELens checkpoints: the library's own numbers, formulas written out again here, and the way back."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.conversion import saelens
from tests.modeling.conversion.golden import ROOT, check_variant, needs_golden, variants
from tests.modeling.conversion.made import assert_close, check_refused, random_sae, round_trip

D_IN, D_SAE, D_OUT = 12, 40, 7
METADATA = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2"}


# -- the library's own numbers ---------------------------------------------------------------------------------------

WARNS = {
    "standard_expected_average_unfolded": "input_scale=",
    "v3_old_config_keys": "before SAELens 3",
}


@pytest.mark.parametrize("variant", variants("saelens"))
def test_golden(variant):
    if variant in WARNS:
        with pytest.warns(UserWarning, match=WARNS[variant]):
            check_variant("saelens", variant)
    else:
        check_variant("saelens", variant)


@needs_golden
def test_golden_scale_that_no_file_holds():
    sae = check_variant(
        "saelens",
        "standard_expected_average_unfolded",
        features="features_folded",
        reconstruction="reconstruction_folded",
        input_scale=0.37,
    )
    assert (sae.config.normalization, sae.config.input_scale) == ("scalar", 0.37)


@needs_golden
@pytest.mark.parametrize(
    ("variant", "place"),
    [
        ("standard", ("layers.1.resid_post", "layers.1.resid_post")),
        ("standard_hook_z", ("layers.1.attn_heads", "layers.1.attn_heads")),
        ("transcoder", ("model.layers.1.post_attention_layernorm", "layers.1.mlp_out")),
    ],
)
def test_golden_places(variant, place):
    config = SparseAutoencoder.from_pretrained(ROOT / "saelens" / variant).config
    assert (config.read_at, config.write_at) == place
    assert config.metadata["base_model"] == "tiny-random-llama" and config.metadata["context_length"] == 64


@needs_golden
@pytest.mark.parametrize("variant", [name for name in variants("saelens") if name not in WARNS])
def test_golden_written_and_read_again(variant, tmp_path):
    sae = SparseAutoencoder.from_pretrained(ROOT / "saelens" / variant)
    again = round_trip(saelens.FORMAT, sae, tmp_path)
    x = torch.randn(16, sae.config.d_in, dtype=sae.dtype, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.encode(x), again.encode(x)) and torch.equal(sae(x).reconstruction, again(x).reconstruction)


# -- formulas in float64 ---------------------------------------------------------------------------------------------


def made(folder: Path, kind: str, **config: Any) -> dict[str, Tensor]:
    """Write a checkpoint of an architecture, with random weights; gives its tensors."""
    torch.manual_seed(0)
    d_out = D_OUT if "transcoder" in kind else D_IN
    names = ["W_enc", "W_dec", "b_dec"]
    names += ["b_gate", "b_mag", "r_mag"] if kind == "gated" else ["b_enc"]
    names += ["threshold"] if "jumprelu" in kind else []
    names += ["W_skip"] if "skip" in kind else []
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, d_out), "b_dec": (d_out,), "W_skip": (d_out, D_IN)}
    tensors = {name: torch.randn(shapes.get(name, (D_SAE,))) for name in names}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs()
    if "batchtopk" in kind:
        tensors["topk_threshold"] = torch.tensor(1.3, dtype=torch.float64)
    said = {"architecture": kind, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": METADATA}
    said |= {"apply_b_dec_to_input": False, "normalize_activations": "none"}
    if "transcoder" in kind:
        said["d_out"] = d_out
    write(folder, said | config, tensors)
    return tensors


def write(folder: Path, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(said))
    save_file(tensors, folder / "sae_weights.safetensors")


def naive(x: Tensor, tensors: dict[str, Tensor], architecture: str, **config: Any) -> tuple[Tensor, Tensor]:
    """Latents and output, one token after the other, in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    latents, outputs = [], []
    for token in x.double():
        inside, scale, shift = token, 1.0, 0.0
        if config.get("normalize_activations") == "layer_norm":
            shift, deviation = token.mean(), math.sqrt(float(((token - token.mean()) ** 2).sum()) / (D_IN - 1))
            inside, scale = (token - shift) / (deviation + 1e-5), deviation
        elif config.get("normalize_activations") == "constant_norm_rescale":
            scale = math.sqrt(float((token**2).sum()) / D_IN)
            inside = token / scale
        if config.get("apply_b_dec_to_input"):
            inside = inside - w["b_dec"]
        product = inside @ w["W_enc"]
        norms = (w["W_dec"] ** 2).sum(1).sqrt()
        rescale = config.get("rescale_acts_by_decoder_norm", False)
        if architecture == "gated":
            z = torch.zeros(D_SAE).double()
            for n in range(D_SAE):
                magnitude = float(inside @ (w["W_enc"][:, n] * w["r_mag"][n].exp()) + w["b_mag"][n])
                z[n] = max(magnitude, 0.0) if float(product[n] + w["b_gate"][n]) > 0 else 0.0
        else:
            pre = (product + w["b_enc"]) * (norms if rescale else 1.0)
            z = pre.clamp(min=0)
            if architecture in ("topk", "abstopk"):
                score = pre.abs() if architecture == "abstopk" else pre
                kept = sorted(range(D_SAE), key=lambda n: -float(score[n]))[: config["k"]]  # noqa: B023
                z = torch.zeros(D_SAE).double()
                z[kept] = pre[kept] if architecture == "abstopk" else pre[kept].clamp(min=0)
            elif "jumprelu" in architecture:
                z = z * (pre > w["threshold"])
            elif "batchtopk" in architecture:
                z = z * (pre > w["topk_threshold"])
        latents.append(z)
        out = (z / norms if rescale else z) @ w["W_dec"] + w["b_dec"]
        if "transcoder" not in architecture:
            out = out * scale + shift
        if "W_skip" in w:
            out = out + w["W_skip"] @ token
        outputs.append(out)
    return torch.stack(latents), torch.stack(outputs)


CASES: dict[str, dict[str, Any]] = {
    "standard": {"apply_b_dec_to_input": True},
    "gated": {"apply_b_dec_to_input": True, "normalize_activations": "layer_norm"},
    "topk": {"k": 6, "normalize_activations": "constant_norm_rescale"},
    "abstopk": {"k": 5, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"normalize_activations": "layer_norm", "apply_b_dec_to_input": True},
    "transcoder": {"normalize_activations": "layer_norm"},
    "skip_transcoder": {},
    "jumprelu_transcoder": {"normalize_activations": "constant_norm_rescale"},
    "jumprelu_skip_transcoder": {"normalize_activations": "layer_norm"},
    "batchtopk": {"k": 4.0, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True},
    "matryoshka_batchtopk": {"k": 4.5, "rescale_acts_by_decoder_norm": False},
}


@pytest.mark.parametrize("architecture", CASES)
def test_formula(tmp_path, architecture):
    config = CASES[architecture]
    tensors = made(tmp_path, architecture, **config)
    x = torch.randn(9, D_IN)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    latents, output = naive(x, tensors, architecture, **config)
    assert_close(sae.encode(x), latents)
    assert_close(sae(x).reconstruction, output)


def test_weights_that_need_no_arithmetic_are_not_touched(tmp_path):
    tensors = made(tmp_path, "jumprelu")
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert all(torch.equal(sae.state_dict()[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_factor_of_a_fine_tuning(tmp_path, name):
    tensors = made(tmp_path, "standard")
    said = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": False, "activation_fn_str": "relu"}
    factor = torch.rand(D_SAE) + 0.5
    write(tmp_path, {**said, "finetuning_scaling_factor": True}, {**tensors, name: factor})
    x = torch.randn(9, D_IN)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    latents, _ = naive(x, tensors, "standard")
    assert_close(sae.encode(x), latents)
    assert_close(sae(x).reconstruction, latents * factor @ tensors["W_dec"].double() + tensors["b_dec"])
    write(tmp_path, said, {**tensors, name: factor})
    with pytest.raises(ValueError, match="finetuning_scaling_factor=False"):
        SparseAutoencoder.from_pretrained(tmp_path)
    write(tmp_path, said, {**tensors, name: torch.ones(D_SAE)})
    assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path).W_dec, tensors["W_dec"])


def test_logarithmic_threshold(tmp_path):
    tensors = made(tmp_path, "jumprelu")
    said = json.loads((tmp_path / "cfg.json").read_text())
    threshold = tensors.pop("threshold")
    write(tmp_path, said, {**tensors, "log_threshold": threshold.log()})
    x = torch.randn(9, D_IN)
    latents, _ = naive(x, {**tensors, "threshold": threshold}, "jumprelu")
    assert_close(SparseAutoencoder.from_pretrained(tmp_path).encode(x), latents)


def test_scale_that_no_file_holds(tmp_path):
    tensors = made(tmp_path, "standard", normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)
    x = torch.randn(9, D_IN)
    sae = SparseAutoencoder.from_pretrained(tmp_path, input_scale=0.25)
    latents, output = naive(0.25 * x, tensors, "standard", apply_b_dec_to_input=True)
    assert_close(sae.encode(x), latents)
    assert_close(sae(x).reconstruction, output / 0.25)
    with pytest.warns(UserWarning, match="input_scale="):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_bfloat16_stays(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in made(tmp_path, "batchtopk").items()}
    tensors["topk_threshold"] = torch.tensor(1.3, dtype=torch.float64)
    said = json.loads((tmp_path / "cfg.json").read_text())
    write(tmp_path, {**said, "rescale_acts_by_decoder_norm": True}, tensors)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.bfloat16}


# -- configs ---------------------------------------------------------------------------------------------------------


def test_config_before_3(tmp_path):
    tensors = made(tmp_path, "standard")
    said = {"d_in": D_IN, "d_sae": D_SAE, "hook_point": "blocks.2.hook_resid_pre", "normalize_activations": False}
    write(tmp_path, {**said, "model_name": "gpt2-small"}, tensors)
    with pytest.warns(UserWarning, match="before SAELens 3"):
        config = SparseAutoencoder.from_pretrained(tmp_path).config
    assert config.apply_b_dec_to_input and config.read_at == "layers.2.resid_pre"
    assert config.metadata["original_hook"] == "blocks.2.hook_resid_pre"


def test_top_k_of_a_config_before_6(tmp_path):
    tensors = made(tmp_path, "standard")
    said = {"d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "topk", "architecture": "standard"}
    write(tmp_path, {**said, "activation_fn_kwargs": {"k": 3}}, tensors)
    config = SparseAutoencoder.from_pretrained(tmp_path).config
    assert (config.activation, config.k, config.apply_b_dec_to_input) == ("topk", 3, True)
    write(tmp_path, {**said, "activation_fn_str": "tanh-relu"}, tensors)
    with pytest.raises(ValueError, match="tanh-relu"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_k_is_given_where_it_is_missing(tmp_path):
    made(tmp_path, "topk")
    with pytest.raises(ValueError, match="k="):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, k=3).config.k == 3
    made(tmp_path, "topk", k=8)
    with pytest.raises(TypeError, match="k"):
        SparseAutoencoder.from_pretrained(tmp_path, k=3)
    with pytest.raises(TypeError, match="input_scale"):
        SparseAutoencoder.from_pretrained(tmp_path, input_scale=3.0)


def test_k_may_be_written_as_a_fraction(tmp_path):
    made(tmp_path, "topk", k=8.0)
    assert SparseAutoencoder.from_pretrained(tmp_path).config.k == 8
    made(tmp_path, "batchtopk", k=8.5)
    assert SparseAutoencoder.from_pretrained(tmp_path).config.k is None


def test_changed_weights_of_the_model_are_told(tmp_path):
    metadata = {**METADATA, "model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": False}}
    made(tmp_path, "standard", metadata=metadata)
    with pytest.warns(UserWarning, match=r"\(center_writing_weights\)"):
        config = SparseAutoencoder.from_pretrained(tmp_path).config
    assert config.metadata["processing"] == {"center_writing_weights": True, "fold_ln": False}
    made(
        tmp_path, "standard", metadata={**METADATA, "model_from_pretrained_kwargs": {"center_writing_weights": False}}
    )
    SparseAutoencoder.from_pretrained(tmp_path)  # and no warning


def test_places(tmp_path):
    def place(architecture: str = "standard", **metadata: Any) -> tuple[str, str] | None:
        made(tmp_path, architecture, metadata={"sae_lens_version": "6.54.12", **metadata})
        config = SparseAutoencoder.from_pretrained(tmp_path).config
        return (config.read_at, config.write_at) if config.placed else None

    assert place() is None
    assert place(hook_name="blocks.7.attn.hook_z") == ("layers.7.attn_heads",) * 2
    assert place(hook_name="blocks.7.hook_resid_mid") is None
    assert place(hook_name="?", hf_hook_name="model.layers.7") == ("model.layers.7",) * 2
    between = {"hook_name": "blocks.7.mlp.hook_in", "hook_name_out": "blocks.7.hook_mlp_out"}
    assert place("transcoder", **between) == ("layers.7.mlp_in", "layers.7.mlp_out")
    assert place("transcoder", hook_name="blocks.7.mlp.hook_in") is None
    assert place("transcoder", hf_hook_name="a.input", hf_hook_name_out="a.output") == ("a.input", "a.output")
    with pytest.warns(UserWarning, match="head 3"):
        assert place(hook_name="blocks.7.attn.hook_z", hook_head_index=3) is None


# -- what is refused -------------------------------------------------------------------------------------------------

LIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown architecture": ("standard", {"architecture": "temporal"}, "temporal"),
    "no affine encoder": ("standard", {"architecture": "matching_pursuit"}, "affine"),
    "architecture is a number": ("standard", {"architecture": 3}, "architecture=3"),
    "unknown normalisation": ("standard", {"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
    "normalisation is a list": ("standard", {"normalize_activations": ["none"]}, "normalize_activations"),
    "unknown reshape": ("standard", {"reshape_activations": "hook_q"}, "hook_q"),
    "another d_in": ("standard", {"d_in": D_IN + 1}, "d_in=13"),
    "another d_sae": ("standard", {"d_sae": "many"}, "many"),
    "another d_out": ("transcoder", {"d_out": D_IN}, "d_out=12"),
    "d_in is NaN": ("standard", {"d_in": math.nan}, "d_in=nan"),
    "k is negative": ("topk", {"k": -3}, "k=-3"),
    "k is a fraction": ("topk", {"k": 3.5}, "k=3.5"),
    "k is too large": ("topk", {"k": D_SAE + 1}, "k=41"),
    "k is a text": ("topk", {"k": "8"}, "k='8'"),
    "k is true": ("topk", {"k": True}, "k=True"),
    "batch k is infinite": ("batchtopk", {"k": math.inf}, "k=inf"),
    "bias flag is a text": ("standard", {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input='yes'"),
    "transcoder with bias": ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True"),
    "rescale is null": ("topk", {"k": 3, "rescale_acts_by_decoder_norm": None}, "rescale_acts_by_decoder_norm=None"),
    "metadata is a list": ("standard", {"metadata": []}, "metadata="),
    "hook is a number": ("standard", {"metadata": {**METADATA, "hook_name": 3}}, "hook_name=3"),
    "head is a text": ("standard", {"metadata": {**METADATA, "hook_head_index": "3"}}, "hook_head_index='3'"),
    "version is a number": ("standard", {"metadata": {"sae_lens_version": 6}}, "sae_lens_version=6"),
    "processing is a list": (
        "standard", {"metadata": {**METADATA, "model_from_pretrained_kwargs": [1]}}, "model_from_pretrained_kwargs"
    ),
    "context is a text": ("standard", {"metadata": {**METADATA, "context_size": "64"}}, "context_size='64'"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_configs_that_lie(tmp_path, lie):
    architecture, config, message = LIES[lie]
    made(tmp_path, architecture, **config)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", CASES)
def test_tensors_that_are_missing_unknown_or_of_another_shape(tmp_path, architecture):
    tensors = made(tmp_path, architecture, **CASES[architecture])
    said = json.loads((tmp_path / "cfg.json").read_text())
    for name, tensor in tensors.items():
        write(tmp_path, said, {key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match=name):
            SparseAutoencoder.from_pretrained(tmp_path)
        for other in (torch.zeros(3, 2, 5), torch.zeros(tensor.shape, dtype=torch.int64), torch.zeros(1)):
            write(tmp_path, said, {**tensors, name: other})
            with pytest.raises(ValueError):
                SparseAutoencoder.from_pretrained(tmp_path)
    write(tmp_path, said, {**tensors, "W_extra": torch.zeros(3)})
    with pytest.raises(ValueError, match="W_extra"):
        SparseAutoencoder.from_pretrained(tmp_path)


# -- the way back ----------------------------------------------------------------------------------------------------

AT = {"hook": "model.layers.2.mlp.input", "hook_out": "model.layers.2.mlp.output"}
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"activation": "relu", "layer": 3, "site": "resid_pre"},
    "gated": {"activation": "gated", "normalization": "layer_norm", "layer": 3, "site": "attn_heads"},
    "topk": {"activation": "topk", "k": 4, "normalization": "constant_norm", "hook": "model.layers.2.mlp"},
    "abstopk": {"activation": "abs_topk", "k": 4, "apply_b_dec_to_input": False, "layer": 0, "site": "mlp_act"},
    "jumprelu": {"activation": "jumprelu", "layer": 11, "site": "mlp_out", "concepts": {"anger": 3}},
    "transcoder": {"activation": "relu", "d_out": 9, "apply_b_dec_to_input": False, **AT},
    "skip_transcoder": {
        "activation": "relu", "skip_connection": True, "apply_b_dec_to_input": False, "layer": 2, "site": "mlp_in",
        "hook_out": "layers.2.mlp_out", "normalization": "layer_norm", "normalize_output": False,
    },
    "jumprelu_transcoder": {"activation": "jumprelu", "d_out": 9, "apply_b_dec_to_input": False, **AT},
    "jumprelu_skip_transcoder": {
        "activation": "jumprelu", "skip_connection": True, "apply_b_dec_to_input": False, "layer": 2, "site": "mlp_in"
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", KINDS)
def test_written_and_read_again_is_the_same(tmp_path, architecture, dtype):
    metadata = {"base_model": "gpt2", "context_length": 128, "prepend_bos": False}
    sae = random_sae(dtype=dtype, metadata=metadata, **KINDS[architecture])
    again = round_trip(saelens.FORMAT, sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == architecture
    own, found = sae.state_dict(), again.state_dict()
    assert own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
    assert metadata.items() <= again.config.metadata.items()
    again.config.metadata = sae.config.metadata
    assert again.config == sae.config


def test_what_is_said_otherwise_computes_the_same(tmp_path):
    x = torch.randn(9, 16)
    batch = random_sae(activation="batch_topk", k=4, layer=1)
    again = round_trip(saelens.FORMAT, batch, tmp_path / "batch")
    assert again.config.activation == "jumprelu" and torch.equal(again.encode(x), batch.encode(x))
    tied = random_sae(activation="relu", tied=True)
    again = round_trip(saelens.FORMAT, tied, tmp_path / "tied")
    assert not again.config.tied and torch.equal(again.W_enc, tied.W_enc)
    for n, scale in enumerate(({"apply_b_dec_to_input": True}, {"output_scale": 2.5, "apply_b_dec_to_input": False})):
        scaled = random_sae(activation="gated", normalization="scalar", input_scale=0.4, **scale)
        again = round_trip(saelens.FORMAT, scaled, tmp_path / str(n))
        assert again.config.normalization == "none"
        assert_close(again.encode(x), scaled.encode(x))
        assert_close(again(x).reconstruction, scaled(x).reconstruction)


def test_written_whole_or_not_at_all(tmp_path):
    round_trip(saelens.FORMAT, random_sae(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert "feature_max" not in load_file(tmp_path / "sae_weights.safetensors")


REFUSED: dict[str, dict[str, Any]] = {
    "activation": {"activation": "topk-sigmoid", "k": 3},
    "activation=": {"activation": "topk", "k": 3, "skip_connection": True, "apply_b_dec_to_input": False},
    "glu": {"activation": "relu", "glu": True},
    "scaled_selection": {"activation": "topk", "k": 3, "scaled_selection": True},
    "layer_norm_eps": {"activation": "relu", "normalization": "layer_norm", "layer_norm_eps": 1e-6},
    "apply_b_dec_to_input": {"activation": "relu", "skip_connection": True},
    "normalize_output": {
        "activation": "relu", "skip_connection": True, "apply_b_dec_to_input": False, "normalization": "constant_norm"
    },
    "output_scale": {"activation": "relu", "normalization": "scalar", "input_scale": 0.4, "output_scale": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_say_is_refused(tmp_path, name):
    check_refused(saelens.FORMAT, random_sae(**REFUSED[name]), tmp_path / "new", name)


def test_no_warning_where_nothing_is_to_be_told(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        round_trip(saelens.FORMAT, random_sae(layer=1), tmp_path)
