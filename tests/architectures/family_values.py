"""What the names of fields alone do not tell: values for single families, by the path to the configuration.

`START_VALUES` are needed for the default configuration to exist at all; `FAMILY_VALUES` win over the general sizes.
"""

from __future__ import annotations

from typing import Any

LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
ALTERNATING = ["sliding_attention", "full_attention"] * 2
CONVOLUTIONS = ["conv", "full_attention"] * 2

_NO_PER_LAYER_INPUT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 4,
    "num_hidden_layers": 4,
}

START_VALUES: dict[str, dict[str, Any]] = {
    "granite4_vision": {"text_config": {"model_type": "granite"}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_NO_PER_LAYER_INPUT}},
    "gemma4_assistant.text_config": _NO_PER_LAYER_INPUT,
}

_MIXED_GEMMA3N = {
    "layer_types": ALTERNATING,
    "num_kv_shared_layers": 1,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "intermediate_size": [48] * 4,
}
_MIXED_GEMMA4 = {"layer_types": ALTERNATING, "num_kv_shared_layers": 1}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [2],
}
_COMPASS = {
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "full_attention": None,
    },
}
_GRANITE = {"residual_multiplier": 0.5}
# The sliding layers have sizes of their own; qk_rope_head_dim + qk_nope_head_dim = head_dim in them.
_DOTS3 = {
    **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
    **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "head_dim": 16,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "indexed_attention"],
}

FAMILY_VALUES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4], "num_hidden_layers": 4},
    "blt.encoder_config": {"hidden_size_global": 32},
    "blt.decoder_config": {"hidden_size_global": 32, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 4},
    "blt.global_config": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": _DOTS3,
    "dots3_note.text_config": _DOTS3,
    "cohere_compass_text": _COMPASS,
    "cohere_compass.text_config": _COMPASS,
    "dbrx.attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "dbrx.ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_top_k": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "falcon": {"ffn_hidden_size": 48},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma3n_text": _MIXED_GEMMA3N,
    "gemma3n.text_config": _MIXED_GEMMA3N,
    "gemma4_text": _MIXED_GEMMA4,
    "gemma4.text_config": _MIXED_GEMMA4,
    "gemma4_unified_text": _MIXED_GEMMA4,
    "gemma4_unified.text_config": _MIXED_GEMMA4,
    "gemma4_assistant.text_config": _NO_PER_LAYER_INPUT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": {**_GRANITE, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 24},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None, "H_cycles": 1, "L_cycles": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "laguna": {"layer_types": ALTERNATING, "num_attention_heads_per_layer": [4] * 4},
    "lfm2": {"layer_types": CONVOLUTIONS},
    "lfm2_moe": {"layer_types": CONVOLUTIONS},
    "longcat_flash": {"num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mellum": {"layer_types": ALTERNATING},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp.text_config": _QWEN4,
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "rembert": {"output_embedding_size": 16, "input_embedding_size": 16},
    "roc_bert": {"shape_vocab_size": 99, "pronunciation_vocab_size": 99},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    # the cache's sizes are rounded up to a multiple of 64, the layers' are not
    "xlstm": {"chunk_size": 16, "qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
