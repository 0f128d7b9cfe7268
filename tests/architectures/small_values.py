"""Small values for the fields of a configuration, by the field's name.

A field that is not named here keeps its default. `TEXT` is for a language model, which is `WIDTH` wide, `TOWER` for
what stands beside it (an image or audio encoder, a connector), which is `TOWER_WIDTH` wide so that the two differ.
"""

from __future__ import annotations

WIDTH, VOCAB, LAYERS, HEADS, HEAD_DIM = 32, 99, 4, 4, 8
TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 16, 2, 2
PATCH, IMAGE = 4, 16  # pixels a side

_WIDTHS = "hidden_size d_model n_embd embed_dim embedding_dim embedding_size emb_dim lru_width word_embed_proj_dim"
_LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers layers decoder_layers encoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks num_layers_per_stack"
)
_HEADS = (
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_sliding_attention_heads "
    "mamba_num_heads"
)
_HEAD_DIMS = (
    "head_dim kv_channels attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim swa_head_dim "
    "swa_v_head_dim global_head_dim d_kv d_head dim_head linear_head_dim linear_key_head_dim linear_value_head_dim "
    "mamba_d_head mamba_head_dim mamba_headdim index_head_dim rotary_dim swa_qk_nope_head_dim swa_qk_rope_head_dim "
    "query_pre_attn_scalar"
)
_KEY_VALUE_HEADS = "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads"
_FEED_FORWARDS = (
    "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff d_inner "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size prompt_mid_dim"
)
_EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts"
_CHOSEN = "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k"
_EXPERT_WIDTHS = (
    "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "shared_experts_intermediate_size shared_intermediate_size expert_ffn_hidden_size share_expert_dim"
)
_RANKS = "q_lora_rank kv_lora_rank o_lora_rank"
_POSITIONS = (
    "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "original_max_position_embeddings model_max_length max_2d_position_embeddings"
)
_WINDOWS = "sliding_window attention_window_size local_attention attention_chunk_size sliding_window_size window_size"


def _each(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


TEXT = {
    **_each(_WIDTHS, WIDTH),
    **_each(_LAYERS, LAYERS),
    **_each(_HEADS, HEADS),
    **_each(_HEAD_DIMS, HEAD_DIM),
    **_each(_FEED_FORWARDS, 48),
    **_each(_EXPERTS, 4),
    **_each(_CHOSEN, 2),
    **_each(_EXPERT_WIDTHS, 24),
    **_each(_RANKS, 16),
    **_each(_POSITIONS, 128),
    **_each(_WINDOWS, 6),
    "vocab_size": VOCAB,
    "decoder_vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "unpadded_vocab_size": VOCAB,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "zero_expert_num": 2,
    "num_nextn_predict_layers": 0,
    # state-space layers: heads x head_dim = expand x width
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "mamba_d_ssm": WIDTH,
    "mamba_n_heads": 8,
    "n_mamba_heads": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_chunk_size": 4,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "n_groups": 1,
    "chunk_size": 4,
    "conv_dim": WIDTH,
    "attention_hidden_size": WIDTH,
    # smaller parts
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "adapter_rank": 4,
    "index_n_heads": 2,
    "index_topk": 64,
    "router_hidden_size": 16,
    "pronunciation_embed_dim": 8,
    "shape_embed_dim": 8,
    "type_vocab_size": 2,
    # connectors between an image encoder and the text, which the whole configuration names
    "alignment_intermediate_size": 48,
    "projector_hidden_size": 32,
    "merged_hidden_size": 48,
    "out_hidden_size": WIDTH,
    "resampler_depth": 1,
    "hc_lowrank": 8,
    "gated_norm_rank": 4,
    "d_rel": 4,
    "rel_extent": 64,
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8,
}

TOWER = {
    **_each(_WIDTHS, TOWER_WIDTH),
    **_each(_LAYERS, TOWER_LAYERS),
    **_each(_HEADS, TOWER_HEADS),
    **_each(_HEAD_DIMS, TOWER_WIDTH // TOWER_HEADS),
    **_each(_KEY_VALUE_HEADS, TOWER_HEADS),
    **_each(_FEED_FORWARDS, 24),
    **_each(_EXPERT_WIDTHS, 24),
    **_each(_EXPERTS, 4),
    **_each(_CHOSEN, 2),
    **_each(_POSITIONS, 128),
    "depth": TOWER_LAYERS,
    "mlp_dim": 24,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "vocab_size": VOCAB,
    "encoder_hidden_size": TOWER_WIDTH,
    "out_hidden_size": WIDTH,
    "text_hidden_size": WIDTH,
    "output_dim": WIDTH,
    "num_position_embeddings": 16,
    "max_source_positions": 32,
    "patch_embed_hidden_size": TOWER_WIDTH,
    "num_global_layers": 1,
    "position_embedding_size": 64,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "posemb_grid_size": 4,
    "pooler_output_size": TOWER_WIDTH,
    "resampler_depth": 1,
    "resampler_head_dim": 8,
    "resampler_n_heads": 2,
    "resampler_n_latents": 4,
    "projection_intermediate_size": 24,
    "mel_vocab_size": 8,
    "n_mel_bins": 8,
    "num_mel_bins": 16,
    "num_embeddings": 32,
    "codebook_size": 32,
    "num_res_blocks": 1,
    "downsample_hidden_size": 8,
    "resolution": IMAGE,
    "output_channels": TOWER_WIDTH,
    "base_channels": 32,
    "ext_pw_out_channel": TOWER_WIDTH,
    "depthwise_separable_out_channel": TOWER_WIDTH,
    "nemo_conv_channels": TOWER_WIDTH,
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2,
    "projection_dim": TOWER_WIDTH,
    "adapter_in_dim": TOWER_WIDTH,
    "crop_size": IMAGE,
}

KEY_VALUE_HEADS = tuple(_KEY_VALUE_HEADS.split())
