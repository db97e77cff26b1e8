"""Whisper (Radford et al. 2022, https://arxiv.org/abs/2212.04356): an encoder of log-mel frames, a decoder of text."""

import torch

from model.config import ModelConfig
from model.frontends.text import TokenFrontendConfig
from model.heads.language import LanguageHeadConfig
from model.interop.families.common import ACTIVATION_NAMES, OURS, pairs
from model.interop.tables import Family, Setting, Weight
from model.positions.sinusoidal import SinusoidalPositionConfig, SinusoidalPositions

_ENCODER, _DECODER = "model.encoder.layers.{layer}", "model.decoder.layers.{layer}"


def _sinusoids(config: ModelConfig) -> torch.Tensor:
    assert config.encoder is not None
    assert isinstance(config.encoder.position, SinusoidalPositionConfig)
    positions_BT = torch.arange(config.encoder.max_seq_len)[None]
    return SinusoidalPositions(config.encoder.d_model, config.encoder.position.inclusive)(positions_BT)[0]


def _attention(theirs: str, ours: str) -> tuple[Weight, ...]:
    biased = pairs({f"{theirs}.{name}_proj": f"{ours}.{name}" for name in ("q", "v", "out")})
    return (*biased, Weight(f"{theirs}.k_proj.weight", (f"{ours}.k.weight",)))


def _both(**fixed: object) -> dict[str, object]:
    """What holds for the decoder and for its encoder."""
    named = {name.replace("__", "."): value for name, value in fixed.items()}
    return named | {f"encoder.{name}": value for name, value in named.items()}


WHISPER = Family(
    model_type="whisper",
    architecture="WhisperForConditionalGeneration",
    base_prefix="model.",
    weights=(
        Weight("model.decoder.embed_tokens.weight", ("frontend.tokens.weight",)),
        Weight("model.decoder.embed_positions.weight", ("frontend.positions.weight",)),
        *pairs(
            {
                "model.encoder.conv1": "encoder.frontend.first",
                "model.encoder.conv2": "encoder.frontend.second",
                f"{_ENCODER}.self_attn_layer_norm": f"encoder.{OURS}.mixer_norm",
                f"{_ENCODER}.final_layer_norm": f"encoder.{OURS}.ffn_norm",
                f"{_ENCODER}.fc1": f"encoder.{OURS}.ffn.up",
                f"{_ENCODER}.fc2": f"encoder.{OURS}.ffn.down",
                "model.encoder.layer_norm": "encoder.stack.final_norm",
                f"{_DECODER}.self_attn_layer_norm": f"{OURS}.mixer_norm",
                f"{_DECODER}.encoder_attn_layer_norm": f"{OURS}.cross_norm",
                f"{_DECODER}.final_layer_norm": f"{OURS}.ffn_norm",
                f"{_DECODER}.fc1": f"{OURS}.ffn.up",
                f"{_DECODER}.fc2": f"{OURS}.ffn.down",
                "model.decoder.layer_norm": "stack.final_norm",
            }
        ),
        *_attention(f"{_ENCODER}.self_attn", f"encoder.{OURS}.mixer"),
        *_attention(f"{_DECODER}.self_attn", f"{OURS}.mixer"),
        *_attention(f"{_DECODER}.encoder_attn", f"{OURS}.cross"),
        Weight("proj_out.weight", ("head.weight",)),
    ),
    computed={"model.encoder.embed_positions.weight": _sinusoids},
    settings=(
        Setting("vocab_size", ("vocab_size",), 51865),
        Setting("d_model", ("d_model", "encoder.d_model"), 384),
        Setting("encoder_layers", ("encoder.n_layers",), 4),
        Setting("decoder_layers", ("n_layers",), 4),
        Setting("encoder_attention_heads", ("encoder.mixer.n_heads",), 6),
        Setting("decoder_attention_heads", ("mixer.n_heads",), 6),
        Setting("encoder_ffn_dim", ("encoder.ffn.d_ff",), 1536),
        Setting("decoder_ffn_dim", ("ffn.d_ff",), 1536),
        Setting("activation_function", ("ffn.activation", "encoder.ffn.activation"), "gelu", ACTIVATION_NAMES),
        Setting("max_source_positions", ("encoder.max_seq_len",), 1500),
        Setting("max_target_positions", ("max_seq_len",), 448),
        Setting("num_mel_bins", ("encoder.frontend.bands",), 80),
        Setting("dropout", ("dropout", "encoder.dropout"), 0.0),
        Setting("tie_word_embeddings", ("tie_embeddings",), True),
    ),
    fixed={
        **_both(
            layout="pre",
            pattern=(),
            norm__kind="layer",
            norm__bias=True,
            norm__eps=1e-5,
            mixer__kind="attention",
            mixer__qkv_bias=True,
            mixer__k_bias=False,
            mixer__scaled=True,
            mixer__out_bias=True,
            mixer__n_kv_heads=None,
            mixer__head_dim=None,
            mixer__qk_norm=False,
            mixer__window=None,
            ffn__kind="dense",
            ffn__gated=False,
            ffn__bias=True,
            logit_soft_cap=None,
        ),
        "causal": True,
        "frontend": TokenFrontendConfig(),
        "head": LanguageHeadConfig(),
        "position.kind": "learned",
        "position.offset": 0,
        "encoder.causal": False,
        "encoder.frontend.kind": "mel",
        "encoder.frontend.norm": False,
        "encoder.head.kind": "none",
        "encoder.position.kind": "sinusoidal",
        "encoder.position.inclusive": True,
    },
    constants={"scale_embedding": False},
    only_written={
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "pad_token_id": None,
        "is_encoder_decoder": True,
    },
)
