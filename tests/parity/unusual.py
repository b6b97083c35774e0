"""What the names of a configuration's fields don't tell of how to shrink it, by model type."""

from __future__ import annotations

from typing import Any

_BACKBONE = {"model_type": "resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "embedding_size": 8,
             "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
_PLAIN_BACKBONE = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False,
                   "backbone_config": {**_BACKBONE, "out_features": ["stage4"]}}  # fmt: skip
_SEGMENTING_BACKBONE = {
    **_PLAIN_BACKBONE, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
    "backbone_config": {**_BACKBONE, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
}  # fmt: skip
_SMALL_EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.25}
_IMAGE_TOKENS = {"<image>": 4, "IMGIMGAZ": 5, "IMGIMGBZ": 6}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_IN_THREE = {**_ROPE, "mrope_section": [2, 1, 1]}
_ROPE_BY_ALPHA = {**_ROPE, "rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}
_BY_LAYER_TYPE = {"sliding_attention": _ROPE, "full_attention": _ROPE}
_INKLING_VISION = {"text_hidden_size": 32, "patch_size": 8, "n_layers": 5}
_OCR_DETECTION = {
    "neck_out_channels": 32, "kernel_list": [3, 2, 2], "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0],
        **{f"{way}_{length}ratio": [kernel, [1, 1], [size // 2 for size in kernel]]
           for length, long in (("long", 7), ("mid", 5), ("short", 3))
           for way, kernel in (("vertical_long_to_small_conv", [long, 1]), ("symmetric_conv_long", [long, long]),
                               ("horizontal_small_to_long_conv", [1, long]))},
    },
}  # fmt: skip
_TIMM_VIT = {"architecture": "test_vit", "model_args": {"embed_dim": 64}}


def _of(part: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for name, value in fields.items()}


# A name with a dot is of a sub-configuration.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align": _of("vision_config", _SMALL_EFFICIENTNET),
    "align_vision_model": _SMALL_EFFICIENTNET,
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "bridgetower": {"contrastive_hidden_size": 16, "hidden_size": 64, "logit_scale_init_value": 2.6},
    "chameleon": {"vocabulary_map": _IMAGE_TOKENS, "vq_config.base_channels": 32},
    "chameleon_vqgan": {"base_channels": 32},
    "cohere_compass": {"text_config.rope_parameters": _BY_LAYER_TYPE},
    "cohere_compass_text": {"rope_parameters": _BY_LAYER_TYPE},
    "cosmos3_edge": {"projector_hidden_size": 32, "text_config.rope_parameters": _ROPE_IN_THREE},
    "cosmos3_edge_text": {"rope_parameters": _ROPE_IN_THREE},
    "csm": {"depth_decoder_config.backbone_hidden_size": 32, "codec_config.upsample_groups": 32},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.model_type": "", "attn_config.kv_n_heads": 2},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {"text_config.num_experts": 4, "text_config.top_k_experts": 2,
                        "text_config.moe_intermediate_size": 16},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config.num_key_value_heads": 4, "vision_config.intermediate_size": 48,
                   "vision_config.adapter_in_dim": 32, "vision_config.adapter_out_dim": 32,
                   "audio_config.adapter_input_size": 32, "audio_config.adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "hidden_size": 32},
    "efficientnet": _SMALL_EFFICIENTNET,
    "emu3": {"vocabulary_map": _IMAGE_TOKENS, "vq_config.base_channels": 32},
    "emu3_vqgan": {"base_channels": 32},
    "ernie4_5_vl_moe": {"text_config.hidden_size": 512, "text_config.intermediate_size": 48},
    "ernie4_5_vl_moe_text": {"hidden_size": 512, "intermediate_size": 48},
    "fast_vlm": {"vision_config.architecture": "fastvit_t8"},
    "gemma3n": {"vision_config.architecture": "test_resnet"},
    "gradium_phonon_tts": {"num_key_value_heads": 4},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    "hiera": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "hunyuan_vl": {"text_config.rope_parameters": _ROPE_BY_ALPHA, "text_config.head_dim": 8},
    "hunyuan_vl_text": {"rope_parameters": _ROPE_BY_ALPHA, "head_dim": 8},
    "inkling_mm_model": _of("vision_config", _INKLING_VISION),
    "inkling_vision": _INKLING_VISION,
    "janus": {"vq_config.base_channels": 32},
    "janus_vqgan": {"base_channels": 32},
    "kyutai_speech_to_text": {"ffn_dim": 64, "codec_config.upsample_groups": 32},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mimi": {"upsample_groups": 32},
    "mimi_encoder": {"upsample_groups": 32},
    "moonshine_streaming": {"num_key_value_heads": 2},
    "nemo_speechlm": {"audio_config.asr_config.num_key_value_heads": 4, "word_timestamp_config.num_key_value_heads": 4,
                      "audio_config.diarization_config.audio_config.num_key_value_heads": 4},
    "neomme": {"hidden_size": 64, "intermediate_size": 48, "embedding_rank": 16},
    "perceiver": {"num_cross_attention_heads": 1, "num_self_attention_heads": 1, "d_latents": 32,
                  "num_self_attends_per_block": 2},
    "omdet-turbo": {**_PLAIN_BACKBONE, "backbone_config": _BACKBONE},
    "pe_audio_video": _of("audio_video_config.video_config.vision_config", _TIMM_VIT),
    "pe_audio_video_encoder": _of("video_config.vision_config", _TIMM_VIT),
    "pe_video": _of("video_config.vision_config", _TIMM_VIT),
    "pe_video_encoder": _of("vision_config", _TIMM_VIT),
    "perception_lm": _of("vision_config", _TIMM_VIT),
    "pix2struct_text_model": {"initializer_range": 0.02},
    "pp_ocrv5_server_det": _OCR_DETECTION,
    "pp_ocrv6_medium_det": _OCR_DETECTION,
    "qwen2_5_omni": {"token2wav_config.bigvgan_config.upsample_initial_channel": 64},
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "qwen2_5_omni_token2wav": {"bigvgan_config.upsample_initial_channel": 64},
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": 2,
                       "talker_config.text_config.shared_expert_intermediate_size": 32},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "timm_backbone": {"backbone": "test_resnet"},
    "timm_wrapper": {"architecture": "test_resnet"},
    "vilt": {"num_images": 2, "modality_type_vocab_size": 3},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
    "esm": {"vocab_size": 64, "pad_token_id": 1},
    "detr": _SEGMENTING_BACKBONE,
    "conditional_detr": _SEGMENTING_BACKBONE,
    "deformable_detr": {**_PLAIN_BACKBONE, "backbone_config": _BACKBONE},
    "dab-detr": _PLAIN_BACKBONE,
    "table-transformer": _PLAIN_BACKBONE,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
}
