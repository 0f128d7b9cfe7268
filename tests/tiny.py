"""Tiny random base models of every decoder family, and SAEs for them. No network, no files."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from sae_transformers import SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig

# transformers up to 5.19 loads Gemma 2 with an attention that drops its soft cap, which this library does not: bases
# to compare with are loaded as later releases do.
GEMMA2_TAKES_SDPA = Gemma2PreTrainedModel._supports_sdpa
Gemma2PreTrainedModel._supports_sdpa = False

WIDTH, VOCAB, LAYERS = 32, 99, 3

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
FEED_FORWARD = {"intermediate_size": 48}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES = {
    "llama": {**FEED_FORWARD, **GROUPED},
    "mistral": {**FEED_FORWARD, **GROUPED},
    "qwen2": {**FEED_FORWARD, "num_key_value_heads": 2},
    "qwen3": {**FEED_FORWARD, **GROUPED},
    "gemma2": {**FEED_FORWARD, **GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {**FEED_FORWARD, **GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
    "gpt_neox": FEED_FORWARD,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "phi": FEED_FORWARD,
    "phi3": {**FEED_FORWARD, "num_key_value_heads": 2},
    "olmo2": {**FEED_FORWARD, "num_key_value_heads": 2},
    "mixtral": {**FEED_FORWARD, **GROUPED, **MOE},
    "qwen2_moe": {**FEED_FORWARD, "num_key_value_heads": 2, **MOE, "shared_expert_intermediate_size": 24},
    "gpt_oss": {**FEED_FORWARD, **GROUPED, **MOE, "sliding_window": 16},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "stablelm": {**FEED_FORWARD, "num_key_value_heads": 2},
    "cohere": {**FEED_FORWARD, "num_key_value_heads": 2},
    "falcon": {"ffn_hidden_size": 48, "alibi": False},
}


def tiny_base(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random causal LM of `WIDTH` x `LAYERS`, in eval mode, with weights large enough that layers matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**COMMON, **ARCHITECTURES[architecture], **overrides})
    base = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(std=0.15)
    return base


def tiny_sae(seed: int = 1, dtype: torch.dtype = torch.float32, **settings) -> SparseAutoencoder:
    """A random SAE whose every parameter is non-zero, so that a forgotten one shows."""
    config = SparseAutoencoderConfig(**{"d_in": WIDTH, "d_sae": 64, "activation": "topk", **settings, **_k(settings)})
    sae = SparseAutoencoder(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name == "threshold":
                noise = noise.abs() * 0.3
            elif name in ("feature_max", "selection_scale"):
                noise = noise.abs() + 0.5
            else:
                noise = noise * (0.3 if tensor.ndim > 1 else 0.1)
            tensor.copy_(noise)
    return sae


def _k(settings: dict) -> dict:
    kind = settings.get("activation", "topk")
    topk = kind.startswith("topk") or kind in ("abs_topk", "groupmax")
    return {"k": settings.get("k", 8)} if topk else {}


def tiny_model(architecture: str = "llama", saes=None, dtype: torch.dtype = torch.float32, **settings):
    """A base with one SAE after its second block, or with the given ones."""
    base = tiny_base(architecture, dtype=dtype)
    if saes is None:
        saes = [tiny_sae(dtype=dtype, **{"layer": 1, "site": "resid_post", **settings})]
    return SaeForCausalLM.from_base(base, saes=saes)


def prompt(rows: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    """Random token ids without special ones, (rows, length)."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
