"""Falcon (Almazrouei et al. 2023, https://arxiv.org/abs/2311.16867): parallel blocks, few key/value heads, one fused
projection that holds each key/value head after the queries that use it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.interop.families.common import ACTIVATION_NAMES, DECODER, OURS, read_rope, write_rope
from model.interop.tables import Family, Setting, Weight

_FALCON = "transformer.h.{layer}"


def _modernised(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Falcon 7B's way to say what the 40B's settings can say too; the same tensors under the same names."""
    heads = theirs.get("num_attention_heads", 71)
    modern = {"num_kv_heads": heads, **{key: value for key, value in theirs.items() if value is not None}}
    if modern.get("new_decoder_architecture", False):
        return {"num_ln_in_parallel_attn": 2, **modern, "parallel_attn": True}
    changed = {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}
    return {**modern, **changed, "num_kv_heads": 1 if modern.get("multi_query", True) else heads}


def _norm(theirs: str, ours: str) -> tuple[Weight, ...]:
    return tuple(Weight(f"{_FALCON}.{theirs}.{part}", (f"{OURS}.{ours}.{part}",)) for part in ("weight", "bias"))


_WEIGHTS = (
    Weight("transformer.word_embeddings.weight", ("frontend.tokens.weight",)),
    *(
        weight
        for part in ("weight", "bias")
        for weight in (
            Weight(
                f"{_FALCON}.self_attention.query_key_value.{part}",
                tuple(f"{OURS}.mixer.{name}.{part}" for name in ("q", "k", "v")),
                groups="mixer.kv_heads",
            ),
            Weight(f"{_FALCON}.self_attention.dense.{part}", (f"{OURS}.mixer.out.{part}",)),
            Weight(f"{_FALCON}.mlp.dense_h_to_4h.{part}", (f"{OURS}.ffn.up.{part}",)),
            Weight(f"{_FALCON}.mlp.dense_4h_to_h.{part}", (f"{OURS}.ffn.down.{part}",)),
            Weight(f"transformer.ln_f.{part}", (f"stack.final_norm.{part}",)),
        )
    ),
    Weight("lm_head.weight", ("head.weight",)),
)

FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    peft_task="CAUSAL_LM",
    caches_every_head=True,
    base_prefix="transformer.",
    weights=(*_WEIGHTS, *_norm("input_layernorm", "mixer_norm")),
    settings=(
        Setting("vocab_size", ("vocab_size",), 65024),
        Setting("hidden_size", ("d_model",), 4544),
        Setting("num_hidden_layers", ("n_layers",), 32),
        Setting("max_position_embeddings", ("max_seq_len",), 2048),
        Setting("tie_word_embeddings", ("tie_embeddings",), True),
        Setting("num_attention_heads", ("mixer.n_heads",), 71),
        Setting("num_kv_heads", ("mixer.n_kv_heads",), written="mixer.kv_heads"),
        Setting("bias", ("mixer.qkv_bias", "mixer.out_bias", "ffn.bias"), False),
        Setting("ffn_hidden_size", ("ffn.d_ff",)),
        Setting("activation", ("ffn.activation",), "gelu", ACTIVATION_NAMES),
        Setting("layer_norm_epsilon", ("norm.eps",), 1e-5),
        Setting("hidden_dropout", ("dropout",), 0.0),
    ),
    fixed={
        **DECODER,
        "layout": "parallel",
        "pattern": (),
        "norm.kind": "layer",
        "norm.bias": True,
        "position.kind": "rope",
        "position.channels": None,
        "position.interleaved": False,
        "mixer.kind": "attention",
        "mixer.head_dim": None,
        "mixer.qk_norm": False,
        "ffn.kind": "dense",
        "ffn.gated": False,
        "logit_soft_cap": None,
    },
    constants={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "parallel_attn": True, "alibi": False},
    only_written={"attention_dropout": 0.0},
    ignored=(r"rotary_emb\.inv_freq$",),
    write_position=write_rope,
    read_position=read_rope,
    modernised=_modernised,
)
"""One norm before both branches: Falcon 7B, Falcon 2 11B."""

FALCON_TWO_NORMS = dataclasses.replace(
    FALCON,
    weights=(*_WEIGHTS, *_norm("ln_attn", "mixer_norm"), *_norm("ln_mlp", "ffn_norm")),
    fixed={**FALCON.fixed, "layout": "parallel_two_norms"},
    constants={**FALCON.constants, "num_ln_in_parallel_attn": 2},
)
"""Falcon 40B and 180B."""
