"""Small teachers of many makes, with random weights, from transformers' own classes."""

from pathlib import Path

import torch
import transformers as hf

VOCAB_SIZE, LAYERS, POSITIONS = 97, 4, 64
_BASIC = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": LAYERS}
SHAPE = _BASIC | {
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SHAPE),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE),
    # Scales that depend on the number of layers; states counted from the first layer on, no positions.
    "minicpm3": lambda: hf.MiniCPM3Config(**SHAPE | {"num_key_value_heads": 4} | _LATENT),
    "mamba": lambda: hf.MambaConfig(**_BASIC, state_size=8),
    # Without SDPA.
    "gemma2": lambda: hf.Gemma2Config(**SHAPE, sliding_window=8),
    "gpt_oss": lambda: hf.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=LAYERS, num_heads=4, intermediate_size=48, window_size=8,
        attention_types=[[["global", "local"], 2]], max_position_embeddings=POSITIONS,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=LAYERS, n_head=4),
    "mpt": lambda: hf.MptConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layers=LAYERS, n_heads=4, max_seq_len=POSITIONS),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=VOCAB_SIZE, d_model=32, num_layers=LAYERS, attention_heads=4, ffn_dim=48, max_position_embeddings=POSITIONS
    ),
    "rwkv": lambda: hf.RwkvConfig(
        **_BASIC, attention_hidden_size=32, intermediate_size=48, context_length=POSITIONS, rescale_every=2
    ),
    # Final norms of other names, or behind a projection.
    "opt": lambda: hf.OPTConfig(
        **_BASIC, ffn_dim=48, num_attention_heads=4, max_position_embeddings=POSITIONS, word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(
        **SHAPE, hybrid_override_pattern="M-*M", mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=16
    ),
    "lfm2": lambda: hf.Lfm2Config(
        **{name: SHAPE[name] for name in SHAPE if name != "head_dim"}, layer_types=["conv", "full_attention"] * 2
    ),
    "modernbert_decoder": lambda: hf.ModernBertDecoderConfig(
        **_BASIC, intermediate_size=48, num_attention_heads=4, max_position_embeddings=POSITIONS, local_attention=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    ),
    # Of text and pictures.
    "gemma3": lambda: hf.Gemma3Config(
        text_config=dict(SHAPE, sliding_window=8), vision_config=_VISION, mm_tokens_per_image=4, image_token_index=96,
        boi_token_index=95, eoi_token_index=94,
    ),
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        text_config=dict(SHAPE, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}),
        vision_config={"embed_dim": 16, "hidden_size": 32, "depth": 1, "num_heads": 2}, image_token_id=96, video_token_id=95,
        vision_start_token_id=94, vision_end_token_id=93,
    ),
    # Not causal, or no language models.
    "bert": lambda: hf.BertConfig(**_BASIC, intermediate_size=48, num_attention_heads=4),
    "paligemma": lambda: hf.PaliGemmaConfig(
        text_config=dict(SHAPE, model_type="gemma"), image_token_index=96,
        vision_config=dict(_VISION, model_type="siglip_vision_model", projection_dim=32),
    ),
    "t5": lambda: hf.T5Config(vocab_size=VOCAB_SIZE, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8),
    "clip": lambda: hf.CLIPConfig(
        text_config=dict(_BASIC, intermediate_size=48, num_attention_heads=4, max_position_embeddings=POSITIONS),
        vision_config=_VISION, projection_dim=16,
    ),
    "vit": lambda: hf.ViTConfig(**_VISION),
}  # fmt: skip


def save_small(make: str, folder: Path) -> str:
    """Write a teacher of that make without a tokenizer; returns the folder."""
    torch.manual_seed(0)
    hf.AutoModel.from_config(CONFIGS[make]()).save_pretrained(folder)
    return str(folder)


def whole_features(path: str, layer: int, tokens_T: torch.Tensor, window_lengths: list[int]) -> torch.Tensor:
    """Each window alone through the whole model [T, F]."""
    model = hf.AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        states = [
            model(input_ids=window[None], use_cache=False, output_hidden_states=True).hidden_states[layer][0]
            for window in tokens_T.split(window_lengths)
        ]
    return torch.cat(states)
