"""Encoder-decoders: the original Transformer (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) as Marian has it,
and BART (Lewis et al. 2019, https://arxiv.org/abs/1910.13461)."""

from collections.abc import Mapping
from typing import Any

from model.interop.families.common import ACTIVATION_NAMES, OURS, pairs
from model.interop.tables import Family, Setting, Weight

ENCODER = "encoder."


def both(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the decoder and for its encoder."""
    return {f"{stack}{path}": value for stack in ("", ENCODER) for path, value in fixed.items()}


def twice(*paths: str) -> tuple[str, ...]:
    """These fields of the decoder and of its encoder."""
    return tuple(both(dict.fromkeys(paths)))


ENCODER_DECODER = {
    "causal": True,
    "head.kind": "language",
    "head.transform": None,
    "encoder.causal": False,
    "encoder.head.kind": "none",
    "encoder.encoder": None,
    "encoder.vocab_size": None,
    "encoder.tie_embeddings": True,
    "logit_soft_cap": None,
    **both({"pattern": (), "frontend.kind": "tokens", "frontend.token_types": 0, "mixer.kind": "attention"}),
    **both({"mixer.n_kv_heads": None, "mixer.qk_norm": False, "mixer.window": None, "ffn.kind": "dense"}),
}
"""What `fixed` says of every encoder-decoder over tokens with one table of embeddings."""

_POST_NORM = {
    **ENCODER_DECODER,
    "tie_embeddings": True,
    "head.bias": True,
    "head.scale_input": False,
    **both({"layout": "post", "norm.kind": "layer", "norm.bias": True, "norm.eps": 1e-5}),
    **both({"mixer.qkv_bias": True, "mixer.out_bias": True, "mixer.head_dim": None, "mixer.scaled": True}),
    **both({"ffn.gated": False, "ffn.bias": True}),
}


def _block(theirs: str, ours: str) -> dict[str, str]:
    attention = {
        f"{theirs}.self_attn.{their}_proj": f"{ours}.mixer.{our}"
        for their, our in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out"))
    }
    return attention | {
        f"{theirs}.self_attn_layer_norm": f"{ours}.mixer_norm",
        f"{theirs}.fc1": f"{ours}.ffn.up",
        f"{theirs}.fc2": f"{ours}.ffn.down",
        f"{theirs}.final_layer_norm": f"{ours}.ffn_norm",
    }


_WEIGHTS = (
    Weight("model.shared.weight", ("frontend.tokens.weight",)),
    *pairs(_block("model.encoder.layers.{layer}", ENCODER + OURS)),
    *pairs(_block("model.decoder.layers.{layer}", OURS)),
    *pairs(
        {
            **{
                f"model.decoder.layers.{{layer}}.encoder_attn.{theirs}_proj": f"{OURS}.cross.{ours}"
                for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out"))
            },
            "model.decoder.layers.{layer}.encoder_attn_layer_norm": f"{OURS}.cross_norm",
        }
    ),
    Weight("lm_head.weight", ("head.weight",)),
    Weight("final_logits_bias", ("head.bias",), lead=1, zero_if_missing=True),
)


def _settings(vocab_size: int, positions: int) -> tuple[Setting, ...]:
    return (
        Setting("vocab_size", ("vocab_size",), vocab_size),
        Setting("d_model", twice("d_model"), 1024),
        Setting("encoder_layers", ("encoder.n_layers",), 12),
        Setting("decoder_layers", ("n_layers",), 12),
        Setting("encoder_attention_heads", ("encoder.mixer.n_heads",), 16),
        Setting("decoder_attention_heads", ("mixer.n_heads",), 16),
        Setting("encoder_ffn_dim", ("encoder.ffn.d_ff",), 4096),
        Setting("decoder_ffn_dim", ("ffn.d_ff",), 4096),
        Setting("activation_function", twice("ffn.activation"), "gelu", ACTIVATION_NAMES),
        Setting("max_position_embeddings", twice("max_seq_len"), positions),
        Setting("scale_embedding", twice("frontend.scale_by_sqrt_width"), False),
        Setting("dropout", twice("dropout"), 0.1),
    )


_COPIES = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
}
_CONSTANTS = {"tie_word_embeddings": True, "normalize_before": False}
_WRITTEN = {
    "is_encoder_decoder": True,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "forced_eos_token_id": None,
}

MARIAN = Family(
    model_type="marian",
    architecture="MarianMTModel",
    peft_task="SEQ_2_SEQ_LM",
    base_prefix="model.",
    weights=_WEIGHTS,
    settings=_settings(58101, 1024),
    fixed={**_POST_NORM, **both({"frontend.norm": False, "position.kind": "sinusoidal"})},
    constants={**_CONSTANTS, "share_encoder_decoder_embeddings": True, "normalize_embedding": False},
    only_written=_WRITTEN,
    heads_divide_width=True,
    ignored=(r"\.embed_positions\.weight$",),
    copies=_COPIES,
    token_ids={"eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1},
)

BART = Family(
    model_type="bart",
    architecture="BartForConditionalGeneration",
    peft_task="SEQ_2_SEQ_LM",
    base_prefix="model.",
    weights=(
        *_WEIGHTS,
        *(
            weight
            for theirs, ours in (("model.encoder", ENCODER), ("model.decoder", ""))
            for weight in (
                Weight(f"{theirs}.embed_positions.weight", (f"{ours}frontend.positions.weight",)),
                *pairs({f"{theirs}.layernorm_embedding": f"{ours}frontend.norm"}),
            )
        ),
    ),
    settings=_settings(50265, 1024),
    fixed={**_POST_NORM, **both({"frontend.norm": True, "position.kind": "learned", "position.offset": 2})},
    constants={**_CONSTANTS, "normalize_embedding": True, "add_final_layer_norm": False},
    only_written=_WRITTEN,
    heads_divide_width=True,
    ignored=(r"^(en|de)coder\.version$",),
    copies=_COPIES,
    token_ids={"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
)
