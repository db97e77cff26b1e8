"""T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683) and its version 1.1 with gated networks."""

from collections.abc import Mapping
from typing import Any

from model.ffns.dense import Activation
from model.interop.families.common import OURS
from model.interop.families.seq2seq import ENCODER, ENCODER_DECODER, both, twice
from model.interop.tables import Family, Setting, Weight

T5_FIXED = {
    **ENCODER_DECODER,
    "head.bias": False,
    **both({"layout": "pre", "norm.kind": "rms", "position.kind": "relative", "frontend.norm": False}),
    **both({"frontend.scale_by_sqrt_width": False, "mixer.qkv_bias": False, "mixer.out_bias": False}),
    **both({"mixer.scaled": False}),
}

T5_SETTINGS = (
    Setting("vocab_size", ("vocab_size",), 32128),
    Setting("d_model", twice("d_model"), 512),
    Setting("d_kv", twice("mixer.head_dim"), 64, written="head_dim"),
    Setting("d_ff", twice("ffn.d_ff"), 2048),
    Setting("num_layers", ("encoder.n_layers",), 6),
    Setting("num_decoder_layers", ("n_layers",)),
    Setting("num_heads", twice("mixer.n_heads"), 8),
    Setting("relative_attention_num_buckets", twice("position.buckets"), 32),
    Setting("relative_attention_max_distance", twice("position.max_distance"), 128),
    Setting("n_positions", twice("max_seq_len"), 512),
    Setting("layer_norm_epsilon", twice("norm.eps"), 1e-6),
    Setting("dropout_rate", twice("dropout"), 0.1),
)

T5_COPIES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}
T5_IGNORED = (r"EncDecAttention\.relative_attention_bias\.weight$",)
T5_IDS: dict[str, int | None] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def _attention(theirs: str, ours: str) -> tuple[Weight, ...]:
    names = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
    return tuple(Weight(f"{theirs}.{their}.weight", (f"{ours}.{our}.weight",)) for their, our in names)


def _stack(theirs: str, ours: str, ffn_place: int, ffn: Mapping[str, str]) -> tuple[Weight, ...]:
    """One stack; `ffn_place` counts the parts of its blocks, and `ffn` has the names within that one."""
    block, layer = f"{theirs}.block.{{layer}}.layer", ours + OURS
    return (
        Weight(f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{ours}distances.weight",)),
        *_attention(f"{block}.0.SelfAttention", f"{layer}.mixer"),
        Weight(f"{block}.0.layer_norm.weight", (f"{layer}.mixer_norm.weight",)),
        *(Weight(f"{block}.{ffn_place}.{their}", (f"{layer}.ffn.{our}",)) for their, our in ffn.items()),
        Weight(f"{block}.{ffn_place}.layer_norm.weight", (f"{layer}.ffn_norm.weight",)),
        Weight(f"{theirs}.final_layer_norm.weight", (f"{ours}stack.final_norm.weight",)),
    )


def t5_weights(ffn: Mapping[str, str]) -> tuple[Weight, ...]:
    """Both stacks and the tables, with these names in the feed-forward networks."""
    return (
        Weight("shared.weight", ("frontend.tokens.weight",)),
        *_stack("encoder", ENCODER, 1, ffn),
        *_stack("decoder", "", 2, ffn),
        *_attention("decoder.block.{layer}.layer.1.EncDecAttention", f"{OURS}.cross"),
        Weight("decoder.block.{layer}.layer.1.layer_norm.weight", (f"{OURS}.cross_norm.weight",)),
        Weight("lm_head.weight", ("head.weight",)),
    )


def _modernised(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """As many layers in the decoder, and the output scaled where the head is tied, unless said otherwise."""
    derived = {"scale_decoder_outputs": theirs.get("tie_word_embeddings", True) is not False}
    given = {key: value for key, value in theirs.items() if value is not None}
    return {"num_decoder_layers": given.get("num_layers", 6), **derived, **given}


def _t5(their_word: str, activation: Activation, *, gated: bool) -> Family:
    names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
    return Family(
        model_type="t5",
        architecture="T5ForConditionalGeneration",
        peft_task="SEQ_2_SEQ_LM",
        base_prefix="",
        weights=t5_weights({f"DenseReluDense.{their}.weight": f"{our}.weight" for their, our in names.items()}),
        settings=(
            *T5_SETTINGS,
            Setting("tie_word_embeddings", ("tie_embeddings",), True),
            Setting("scale_decoder_outputs", ("head.scale_input",)),
        ),
        fixed={
            **T5_FIXED,
            **both({"ffn.bias": False, "ffn.gated": gated, "ffn.activation": activation}),
        },
        constants={"feed_forward_proj": their_word},
        only_written={"is_encoder_decoder": True},
        ignored=T5_IGNORED,
        copies=T5_COPIES,
        token_ids=T5_IDS,
        modernised=_modernised,
    )


T5_KIN = (
    _t5("relu", "relu", gated=False),
    _t5("gated-gelu", "gelu_tanh", gated=True),
    _t5("gated-silu", "silu", gated=True),
)
