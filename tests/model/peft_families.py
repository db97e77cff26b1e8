"""A small model of every Hugging Face class that a family's table names, with inputs for it."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers as tf

TEXT = {"vocab_size": 53, "num_hidden_layers": 2, "eos_token_id": 7, "bos_token_id": 1, "pad_token_id": 0}
DECODER = {**TEXT, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 64}
GQA = {**DECODER, "num_key_value_heads": 2}
GPT = {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {**TEXT, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 40}
ENCODER = {**DECODER, "pad_token_id": 1, "max_position_embeddings": 80}
DISTIL = {"vocab_size": 53, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
T5 = {
    "vocab_size": 53,
    "eos_token_id": 7,
    "pad_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 24,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
SWITCH = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64}
SEQ2SEQ = {
    "vocab_size": 53,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 7,
    "bos_token_id": 1,
    "decoder_start_token_id": 2,
}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IMAGES |= {"image_size": 16, "patch_size": 4, "num_labels": 3}
SOUND = {
    "vocab_size": 20,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "pad_token_id": 0,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "num_codevectors_per_group": 8,
}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 10, "max_source_positions": 12, "max_target_positions": 30}
del WHISPER["max_position_embeddings"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "tie_word_embeddings": False,
}


def _heads(name: str, config: type[Any], values: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for head in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        labels = 2 if head == "QuestionAnswering" else 3
        yield getattr(tf, f"{name}For{head}"), config(**values, num_labels=labels)


CLASSES: tuple[tuple[Any, Any], ...] = (
    (tf.LlamaForCausalLM, tf.LlamaConfig(**GQA)),
    (tf.MistralForCausalLM, tf.MistralConfig(**GQA, sliding_window=6)),
    (tf.Qwen2ForCausalLM, tf.Qwen2Config(**GQA)),
    (tf.Qwen3ForCausalLM, tf.Qwen3Config(**GQA, head_dim=8)),
    (tf.MixtralForCausalLM, tf.MixtralConfig(**GQA, num_local_experts=4)),
    (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**GQA, **EXPERTS, head_dim=8)),
    (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**GQA, **EXPERTS, head_dim=8, mlp_only_layers=[0])),
    (tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config(**DECODER, **LATENT)),
    (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT)),
    (tf.GPTJForCausalLM, tf.GPTJConfig(**GPT, rotary_dim=4, tie_word_embeddings=False)),
    (tf.FalconForCausalLM, tf.FalconConfig(**FALCON, multi_query=True, parallel_attn=True)),
    (tf.FalconForCausalLM, tf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    (tf.MambaForCausalLM, tf.MambaConfig(**TEXT, hidden_size=16, state_size=4)),
    *_heads("Bert", tf.BertConfig, {**ENCODER, "pad_token_id": 0}),
    *_heads("Roberta", tf.RobertaConfig, ENCODER),
    *_heads("DistilBert", tf.DistilBertConfig, DISTIL),
    (tf.LongformerForMaskedLM, tf.LongformerConfig(**ENCODER, attention_window=[4, 4])),
    (tf.BigBirdForMaskedLM, tf.BigBirdConfig(**ENCODER, block_size=2, num_random_blocks=1)),
    (tf.T5ForConditionalGeneration, tf.T5Config(**T5)),
    (tf.SwitchTransformersForConditionalGeneration, tf.SwitchTransformersConfig(**T5, **SWITCH)),
    (tf.BartForConditionalGeneration, tf.BartConfig(**SEQ2SEQ, forced_eos_token_id=None)),
    (tf.MarianMTModel, tf.MarianConfig(**SEQ2SEQ, activation_function="relu", forced_eos_token_id=None)),
    (tf.ViTForImageClassification, tf.ViTConfig(**IMAGES)),
    (tf.ViTModel, tf.ViTConfig(**IMAGES)),
    (tf.Wav2Vec2ForCTC, tf.Wav2Vec2Config(**SOUND)),
    (
        tf.Wav2Vec2ForCTC,
        tf.Wav2Vec2Config(**SOUND, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True),
    ),
    (tf.Wav2Vec2ForPreTraining, tf.Wav2Vec2Config(**SOUND)),
    (tf.WhisperForConditionalGeneration, tf.WhisperConfig(**WHISPER)),
    (
        tf.CLIPModel,
        tf.CLIPConfig(
            text_config={**ENCODER, "eos_token_id": 52, "pad_token_id": 0},
            vision_config=IMAGES,
            projection_dim=12,
        ),
    ),
)


def inputs(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the class takes, and the same for ours."""
    config, name = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(0)
    if name.startswith("Wav2Vec2"):
        samples = torch.randn(2, 600, generator=generator)
        return {"input_values": samples}, {"samples_BW": samples}
    if name.startswith("ViT"):
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels}, {"pixels_BAYX": pixels}
    tokens = torch.randint(8, 52, (2, 12), generator=generator)
    if name == "CLIPModel":
        tokens[:, -1] = 52
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return {"input_ids": tokens, "pixel_values": pixels}, {"tokens_BT": tokens, "tower_pixels_BAYX": pixels}
    if name.startswith("Whisper"):
        mels = torch.randn(2, 10, 24, generator=generator)
        return {"input_features": mels, "decoder_input_ids": tokens}, {"tokens_BT": tokens, "encoder_mels_BAW": mels}
    if config.is_encoder_decoder:
        source = torch.randint(8, 52, (2, 9), generator=generator)
        return {"input_ids": source, "decoder_input_ids": tokens}, {"tokens_BT": tokens, "encoder_tokens_BT": source}
    return {"input_ids": tokens}, {"tokens_BT": tokens}


def answer(result: Any) -> torch.Tensor:
    """Of what either model returns the tensor to compare."""
    for name in (
        "logits",
        "logits_per_text",
        "starts",
        "start_logits",
        "features",
        "projected_states",
        "last_hidden_state",
    ):
        if name in result and result[name] is not None:
            return torch.as_tensor(result[name])
    raise KeyError(list(result))
