"""One small checkpoint of each format, written by hand with random weights: d_in 12, d_sae 40."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F = 12, 40


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


W_ENC, W_DEC, B_ENC, B_DEC = _random(D, F, seed=1), _random(F, D, seed=2), _random(F, seed=3), _random(D, seed=4)
THRESHOLD = _random(F, seed=5).abs()


def _json(folder: Path, name: str, values: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))


def _safetensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)


def _torch(folder: Path, name: str, values: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(values, folder / name)


def saelens(root: Path) -> Path:
    metadata = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post", "prepend_bos": True}
    config = {"architecture": "jumprelu", "d_in": D, "d_sae": F, "dtype": "float32", "apply_b_dec_to_input": True}
    _json(root, "cfg.json", {**config, "normalize_activations": "none", "metadata": metadata})
    weights = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    _safetensors(root, "sae_weights.safetensors", weights)
    return root


def sparsify(root: Path) -> Path:
    folder = root / "layers.1"
    config = {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": F, "k": 4}
    _json(folder, "cfg.json", {**config, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D})
    weights = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    _safetensors(folder, "sae.safetensors", weights)
    return folder


def dictionary_learning(root: Path) -> Path:
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": F, "k": 4, "layer": 1}
    _json(root, "config.json", {"trainer": {**trainer, "lm_name": "gpt2"}, "buffer": {"ctx_len": 128}})
    weights = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "b_dec": B_DEC}
    _torch(root, "ae.pt", {**weights, "k": torch.tensor(4), "threshold": torch.tensor(-1.0)})
    return root


def gemma_scope(root: Path) -> Path:
    folder = root / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_20"
    folder.mkdir(parents=True)
    arrays = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    np.savez(folder / "params.npz", **{key: tensor.numpy() for key, tensor in arrays.items()})  # pyright: ignore
    return folder


def gemma_scope_2(root: Path) -> Path:
    folder = root / "resid_post" / "layer_1_width_16k_l0_small"
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-270m", "affine_connection": False}
    hook = "model.layers.1.output"
    _json(folder, "config.json", {**config, "hf_hook_point_in": hook, "hf_hook_point_out": hook})
    weights = {"w_enc": W_ENC, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    _safetensors(folder, "params.safetensors", weights)
    return folder


def openai(root: Path) -> Path:
    state = {"pre_bias": B_DEC, "latent_bias": B_ENC, "encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T}
    counts = {"stats_last_nonzero": torch.zeros(F, dtype=torch.long)}
    counts |= {name: torch.zeros(F) for name in ("latents_activation_frequency", "latents_mean_square")}
    activation = {"activation": "TopK", "activation_state_dict": {"k": 4, "postact_fn": "ReLU"}}
    _torch(root, "6.pt", {**state, **counts, **activation})
    return root / "6.pt"


def llama_scope(root: Path) -> Path:
    folder = root / "Llama3_1-8B-Base-L1R-8x"
    config: dict[str, Any] = {"act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise"}
    config |= {"dataset_average_activation_norm": {"in": 7.5, "out": 7.5}, "sparsity_include_decoder_norm": True}
    config |= {
        "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True,
        "top_k": 4,
        "d_model": D,
        "d_sae": F,
    }
    hook = "blocks.1.hook_resid_post"
    _json(folder, "hyperparams.json", {**config, "hook_point_in": hook, "hook_point_out": hook})
    weights = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC}
    _safetensors(folder, "checkpoints/final.safetensors", weights)
    return folder


def llamascopium(root: Path) -> Path:
    hook = "blocks.1.hook_resid_post"
    config: dict[str, Any] = {"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "use_decoder_bias": True}
    config |= {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    config |= {"top_k": 4, "hook_point_in": hook, "hook_point_out": hook, "use_glu_encoder": False}
    _json(root, "config.json", config)
    weights = {"W_E": W_ENC, "b_E": B_ENC, "W_D": W_DEC, "b_D": B_DEC}
    weights["activation_function.log_jumprelu_threshold"] = THRESHOLD.log()
    weights[f"dataset_average_activation_norm.{hook}"] = torch.tensor(7.5)
    _safetensors(root, "sae_weights.safetensors", weights)
    return root


def goodfire(root: Path) -> Path:
    weights = {"encoder_linear.weight": W_ENC.T, "encoder_linear.bias": B_ENC}
    weights |= {"decoder_linear.weight": W_DEC.T, "decoder_linear.bias": B_DEC}
    _torch(root, "Llama-3.1-8B-Instruct-SAE-l19.pth", weights)
    return root / "Llama-3.1-8B-Instruct-SAE-l19.pth"


def qwen_scope(root: Path) -> Path:
    folder = root / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4"
    _torch(folder, "layer1.sae.pt", {"W_enc": W_ENC.T, "W_dec": W_DEC.T, "b_enc": B_ENC, "b_dec": B_DEC})
    return folder / "layer1.sae.pt"


def deepseek_r1(root: Path) -> Path:
    weights = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC}
    _torch(root, "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", weights)
    return root / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"


def circuit_tracer(root: Path) -> Path:
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(f"model_name: Qwen/Qwen3-4B\nmodel_kind: transcoder_set\n{hooks}")
    weights = {"W_enc": W_ENC.T, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
    _safetensors(root, "layer_1.safetensors", {**weights, "activation_function.threshold": THRESHOLD})
    return root / "layer_1.safetensors"


def gemma_scope_2_layers(root: Path) -> Path:
    folder = root / "clt" / "width_262k_l0_big"
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-270m", "affine_connection": False}
    hooks = {f"hf_hook_point_{side}": f"model.layers.{{3,4}}.mlp.{side}put" for side in ("in", "out")}
    _json(folder, "config.json", {**config, **hooks, "width": 2 * F})
    weights = {"w_enc": W_ENC, "w_dec": W_DEC.unflatten(1, (2, D // 2)), "b_enc": B_ENC, "b_dec": B_DEC[: D // 2]}
    _safetensors(folder, "params_layer_0.safetensors", {**weights, "threshold": THRESHOLD})
    return folder / "params_layer_0.safetensors"


def circuit_tracer_clt(root: Path) -> Path:
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(f"model_name: Qwen/Qwen3-4B\nmodel_kind: cross_layer_transcoder\n{hooks}")
    _safetensors(root, "W_dec_1.safetensors", {"W_dec_1": W_DEC.unflatten(1, (2, D // 2))})
    weights = {"W_enc_1": W_ENC.T, "b_enc_1": B_ENC, "b_dec_1": B_DEC[: D // 2], "threshold_1": THRESHOLD}
    _safetensors(root, "W_enc_1.safetensors", weights)
    return root / "W_enc_1.safetensors"


def kissane(root: Path) -> Path:
    name = "gpt2-small_L1_Hcat_z_lr1.20e-03_v9"
    _json(root, f"{name}_cfg.json", {"act_size": D, "dict_size": F, "act_name": "blocks.1.attn.hook_z"})
    _torch(root, f"{name}.pt", {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC})
    return root / f"{name}.pt"


def scar(root: Path) -> Path:
    config = {
        "architectures": ["LLama3_SAE"],
        "model_type": "llama3_SAE",
        "base_model_name": "meta-llama/Meta-Llama-3-8B",
        "hidden_size": D,
        "activation": "topk",
    }
    config |= {"hook_block_num": 1, "n_latents": F, "n_inputs": D, "activation_k": 4, "site": "mlp", "tied": False}
    _json(root, "config.json", {**config, "normalize": False})
    weights = {"SAE.pre_bias": B_DEC, "SAE.latent_bias": B_ENC, "SAE.encoder.weight": W_ENC.T}
    _safetensors(
        root, "model.safetensors", {**weights, "SAE.decoder.weight": W_DEC.T, "lm_head.weight": _random(9, D)}
    )
    return root


def selfreg(root: Path) -> Path:
    weights = {"mask": torch.ones(F), "W_enc": W_ENC, "b_enc": B_ENC, "b_dec": B_DEC}
    name = "TopK4_l16_h65k_epoch5.pth"
    _torch(root, name, {"weight": weights, "config": {"d_inp": D, "d_hide": F, "topK": 4}})
    return root / name


FAMILIES: dict[str, Callable[[Path], Path]] = {
    build.__name__: build
    for build in (
        saelens, sparsify, dictionary_learning, gemma_scope, gemma_scope_2, openai, llama_scope, llamascopium,
        goodfire, qwen_scope, deepseek_r1, circuit_tracer, kissane, scar, selfreg,
        gemma_scope_2_layers, circuit_tracer_clt,
    )
}  # fmt: skip
