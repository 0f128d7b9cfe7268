"""Values for the parts beside the text of families that read images, by the path to the configuration.

They win over the general sizes. Images are `IMAGE` pixels a side and patches `PATCH`, so an image has 16 patches.
"""

from __future__ import annotations

from typing import Any

_SAM = {"global_attn_indexes": [1], "window_size": 2, "output_channels": 16, "mlp_dim": 24}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
_VQ = {"channel_multiplier": [1, 1], "num_res_blocks": 1, "base_channels": 32, "embed_dim": 8, "latent_channels": 8}
_MUSE_VISION = {"layer_types": ["window_attention", "full_attention"], "num_attention_heads": 2, "hidden_size": 16}
_PINPOINTS = {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_MIXED = ["sliding_attention", "full_attention"] * 2
_CHAMELEON_WORDS = {"<image>": 98, **{f"IMGIMG{letter}Z": 40 + i for i, letter in enumerate("ABCDEFGHIJ")}}
_EMU_WORDS = {"<image>": 98, **{f"<|visual token {i:06d}|>": 40 + i for i in range(8)}}
_NO_TOKEN_DROPPED = {"pooling_kernel_size": 2}

IMAGE_TEXT_VALUES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    "apertus1p5": {"image_token_offset": 40, "audio_token_offset": 48},
    "apertus1p5.audio_config": {"num_filters": 2, "codebook_dim": 16, "hidden_size": 16, "decoder_hidden_size": 32},
    "apertus1p5.vision_config": {**_VQ, "codebook_size": 8, "attn_resolutions": [], "spatial_scale_factor": 2},
    "blip-2": {"image_token_index": 98, "num_query_tokens": 4},
    "chameleon": {
        "image_token_id": 98,
        "vocabulary_map": _CHAMELEON_WORDS,
    },
    "chameleon.vq_config": {**_VQ, "num_embeddings": 8},
    "cohere_compass.vision_config": _DEEPSTACK,
    "cosmos3_edge.text_config": {"rope_parameters": _SECTIONS},
    "cosmos3_edge.vision_config": {"num_patches": 16},
    "cosmos3_omni.vision_config": _DEEPSTACK,
    "deepseek_ocr2.text_config": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_ocr2.vision_config.encoder_config": {"hidden_size": 16},
    "deepseek_ocr2.vision_config.sam_config": {**_SAM, "downsample_channels": [16, 16]},
    "deepseek_vl_hybrid.high_res_vision_config": _SAM,
    "diffusion_gemma.text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "diffusion_gemma.vision_config": _NO_TOKEN_DROPPED,
    "dots3_note.audio_config": {"adapter_input_size": 16, "adapter_out_dim": 32, "conv_output_size": 128},
    "dots3_note.vision_config": {"adapter_in_dim": 16, "adapter_out_dim": 32},
    "ernie4_5_vl_moe.text_config": {
        "moe_intermediate_size": [24, 24],
        "moe_layer_start_index": 1,
        "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2]},
    },
    "ernie4_5_vl_moe.vision_config": {"out_hidden_size": 32},
    "emu3": {
        "image_token_id": 98,
        "vocabulary_map": _EMU_WORDS,
    },
    "emu3.vq_config": {**_VQ, "codebook_size": 8, "attn_resolutions": [], "hidden_size": 32},
    "florence2.vision_config": {
        "depths": [1, 1],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 16],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 2,
        "projection_dim": 32,
        "max_temporal_embeddings": 4,
        "max_position_embeddings": 8,
    },
    "fuyu": {"patch_size": 4, "image_size": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "gemma4_unified.vision_config": {
        **_NO_TOKEN_DROPPED,
        "mm_embed_dim": 16,
        "mm_posemb_size": 16,
        "output_proj_dims": 16,
    },
    "gemma4.vision_config": _NO_TOKEN_DROPPED,
    "got_ocr2.vision_config": _SAM,
    "granite4_vision": {
        **_PINPOINTS,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
    },
    # heads of the connector are its width // 64
    "granite4_vision.qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64, "num_attention_heads": 1},
    "granite4_vision.vision_config": {"hidden_size": 64},
    "hy_v4_vl.vision_config": {"max_image_size": 16},
    "hunyuan_vl.vision_config": {"max_image_size": 16, "min_image_size": 16, "img_max_token_num": 16},
    "instructblip": {"image_token_index": 98, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 98, "num_query_tokens": 4},
    "internvl.vision_config": {"image_size": [16, 16], "patch_size": [4, 4]},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "kosmos-2.5.vision_config": {"patch_embed_hidden_size": 48},
    "kimi_k25": {"projection_hidden_size": 16},
    "minicpm_ocr": {"image_token_id": 98},
    "minicpmv4_6": {"image_token_id": 98},
    "minicpmv4_7": {"image_token_id": 98},
    "muse_glimmer": {"out_hidden_size": 64},
    "muse_spark": {"out_hidden_size": 64},
    "qianfan_ocr.vision_config": {"image_size": [16, 16], "patch_size": [4, 4]},
    "qwen2_vl.vision_config": {"hidden_size": 32},
    "vipllava": {"vision_feature_layer": [-1, -2], "vision_feature_layers": [-1, -2]},
    "janus.vision_config": {"projection_dim": 32, "num_image_tokens": 16},
    "janus.vq_config": {**_VQ, "num_patches": 4, "image_token_embed_dim": 32, "projection_dim": 32},
    "llama4.vision_config": {
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "vision_output_dim": 16,
        "intermediate_size": 64,
    },
    "llava_next": _PINPOINTS,
    "llava_next_video": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "mllama.text_config": {"cross_attention_layers": [1, 3]},
    "mllama.vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 48, "max_num_tiles": 4},
    "molmo2.adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 32, "hidden_size": 16},
    "molmo2.vision_config": {"image_size": [16, 16]},
    "muse_glimmer.vision_config": _MUSE_VISION,
    "muse_spark.text_config": {"moe_hidden_size": 32},
    "muse_spark.vision_config": _MUSE_VISION,
    "muse_spark.audio_config": {
        "patch_sizes": [4, 2],
        "hidden_sizes": [16, 16],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": 32,
    },
    "nemotron_h_omni": {"vision_hidden_size": 16, "projector_hidden_size": 32, "image_token_id": 98},
    "nemotron_h_omni.vision_config": {"video_temporal_patch_size": 2, "max_img_size": 16},
    "paddleocr_vl.text_config": {"rope_parameters": _SECTIONS},
    "pp_formulanet.vision_config": {
        **_SAM,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 16,
        "decoder_hidden_size": 32,
    },
    "qwen3_vl.vision_config": _DEEPSTACK,
    "qwen3_vl_moe.vision_config": _DEEPSTACK,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 97},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 97},
    "qwen3_omni_moe_thinker.vision_config": _DEEPSTACK,
    "step3p7.text_config": {"sliding_window": 6, "layer_types": _MIXED},
    "t5gemma2.encoder.text_config": {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8},
    "unlimited_ocr.vision_config.sam_config": {**_SAM, "downsample_channels": [16, 16]},
}
