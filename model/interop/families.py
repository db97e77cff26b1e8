"""The Hugging Face classes our configurations can become, one table each."""

from collections.abc import Mapping
from typing import Any

from model.errors import ModelError
from model.interop.tables import Family, Position, Setting, Weight
from model.position import LearnedPositionConfig, LinearScaling, Llama3Scaling, RopeConfig

ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "relu_squared": "relu2",
}


def write_rope(position: Position) -> dict[str, Any]:
    """Both spellings: `rope_parameters` of transformers 5 and the older `rope_theta` with `rope_scaling`."""
    assert isinstance(position, RopeConfig)
    scaling: dict[str, Any] | None = None
    if isinstance(position.scaling, LinearScaling):
        scaling = {"rope_type": "linear", "factor": position.scaling.factor}
    elif isinstance(position.scaling, Llama3Scaling):
        scaling = {
            "rope_type": "llama3",
            "factor": position.scaling.factor,
            "low_freq_factor": position.scaling.low_freq_factor,
            "high_freq_factor": position.scaling.high_freq_factor,
            "original_max_position_embeddings": position.scaling.original_max_seq_len,
        }
    parameters = {"rope_theta": position.theta, **(scaling or {"rope_type": "default"})}
    return {"rope_parameters": parameters, "rope_theta": position.theta, "rope_scaling": scaling}


def read_rope(theirs: Mapping[str, Any]) -> Position:
    parameters = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", theirs.get("rope_theta") or 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling=LinearScaling(factor=float(parameters["factor"])))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_seq_len=int(parameters["original_max_position_embeddings"]),
        )
        return RopeConfig(theta=theta, scaling=scaling)
    raise ModelError(
        f"config.json has rope_type {kind!r}: rotary positions can be imported plain or scaled by `linear` or "
        "`llama3`; convert the checkpoint to one of these first."
    )


_OURS, _LLAMA = "stack.layers.{layer}", "model.layers.{layer}"

_LLAMA_WEIGHTS = (
    Weight("model.embed_tokens.weight", ("frontend.tokens.weight",)),
    Weight(f"{_LLAMA}.input_layernorm.weight", (f"{_OURS}.mixer_norm.weight",)),
    *(
        Weight(f"{_LLAMA}.self_attn.{theirs}_proj.{part}", (f"{_OURS}.mixer.{ours}.{part}",))
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
        for part in ("weight", "bias")
    ),
    Weight(f"{_LLAMA}.post_attention_layernorm.weight", (f"{_OURS}.ffn_norm.weight",)),
    *(
        Weight(f"{_LLAMA}.mlp.{name}_proj.{part}", (f"{_OURS}.ffn.{name}.{part}",))
        for name in ("gate", "up", "down")
        for part in ("weight", "bias")
    ),
    Weight("model.norm.weight", ("stack.final_norm.weight",)),
    Weight("lm_head.weight", ("head.weight",)),
)

_LLAMA_SETTINGS = (
    Setting("vocab_size", ("vocab_size",), 32000),
    Setting("hidden_size", ("d_model",), 4096),
    Setting("num_hidden_layers", ("n_layers",), 32),
    Setting("max_position_embeddings", ("max_seq_len",), 2048),
    Setting("tie_word_embeddings", ("tie_embeddings",), False),
    Setting("num_attention_heads", ("mixer.n_heads",), 32),
    Setting("num_key_value_heads", ("mixer.n_kv_heads",), written="mixer.kv_heads"),
    Setting("head_dim", ("mixer.head_dim",), written="head_dim"),
    Setting("attention_bias", ("mixer.qkv_bias", "mixer.out_bias"), False),
    Setting("intermediate_size", ("ffn.d_ff",), 11008),
    Setting("hidden_act", ("ffn.activation",), "silu", ACTIVATION_NAMES),
    Setting("rms_norm_eps", ("norm.eps",), 1e-6),
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    base_prefix="model.",
    weights=_LLAMA_WEIGHTS,
    settings=(*_LLAMA_SETTINGS, Setting("mlp_bias", ("ffn.bias",), False)),
    fixed={
        "layout": "pre",
        "norm.kind": "rms",
        "position.kind": "rope",
        "mixer.kind": "attention",
        "mixer.qk_norm": False,
        "ffn.kind": "dense",
        "ffn.gated": True,
        "logit_soft_cap": None,
    },
    constants={"pretraining_tp": 1},
    heads_divide_width=True,
    ignored=(r"rotary_emb\.inv_freq$",),
    write_position=write_rope,
    read_position=read_rope,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    base_prefix="model.",
    weights=(
        *_LLAMA_WEIGHTS,
        *(
            Weight(f"{_LLAMA}.self_attn.{name}_norm.weight", (f"{_OURS}.mixer.{name}_norm.weight",))
            for name in ("q", "k")
        ),
    ),
    settings=_LLAMA_SETTINGS,
    fixed={**LLAMA.fixed, "mixer.qk_norm": True, "ffn.bias": False},
    constants={"use_sliding_window": False},
    write_position=write_rope,
    read_position=read_rope,
)

_GPT2 = "transformer.h.{layer}"

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    base_prefix="transformer.",
    weights=(
        Weight("transformer.wte.weight", ("frontend.tokens.weight",)),
        Weight("transformer.wpe.weight", ("frontend.positions.weight",)),
        *(
            weight
            for part in ("weight", "bias")
            for weight in (
                Weight(f"{_GPT2}.ln_1.{part}", (f"{_OURS}.mixer_norm.{part}",)),
                Weight(
                    f"{_GPT2}.attn.c_attn.{part}",
                    tuple(f"{_OURS}.mixer.{name}.{part}" for name in ("q", "k", "v")),
                    transposed=part == "weight",
                ),
                Weight(f"{_GPT2}.attn.c_proj.{part}", (f"{_OURS}.mixer.out.{part}",), transposed=part == "weight"),
                Weight(f"{_GPT2}.ln_2.{part}", (f"{_OURS}.ffn_norm.{part}",)),
                Weight(f"{_GPT2}.mlp.c_fc.{part}", (f"{_OURS}.ffn.up.{part}",), transposed=part == "weight"),
                Weight(f"{_GPT2}.mlp.c_proj.{part}", (f"{_OURS}.ffn.down.{part}",), transposed=part == "weight"),
                Weight(f"transformer.ln_f.{part}", (f"stack.final_norm.{part}",)),
            )
        ),
        Weight("lm_head.weight", ("head.weight",)),
    ),
    settings=(
        Setting("vocab_size", ("vocab_size",), 50257),
        Setting("n_embd", ("d_model",), 768),
        Setting("n_layer", ("n_layers",), 12),
        Setting("n_positions", ("max_seq_len",), 1024),
        Setting("tie_word_embeddings", ("tie_embeddings",), True),
        Setting("n_head", ("mixer.n_heads",), 12),
        Setting("n_inner", ("ffn.d_ff",)),
        Setting("activation_function", ("ffn.activation",), "gelu_new", ACTIVATION_NAMES),
        Setting("layer_norm_epsilon", ("norm.eps",), 1e-5),
        Setting("embd_pdrop", ("dropout",), 0.1),
        Setting("resid_pdrop", ("dropout",), 0.1),
    ),
    fixed={
        "layout": "pre",
        "norm.kind": "layer",
        "norm.bias": True,
        "position.kind": "learned",
        "mixer.kind": "attention",
        "mixer.qkv_bias": True,
        "mixer.out_bias": True,
        "mixer.n_kv_heads": None,
        "mixer.head_dim": None,
        "mixer.qk_norm": False,
        "ffn.kind": "dense",
        "ffn.gated": False,
        "ffn.bias": True,
        "logit_soft_cap": None,
    },
    constants={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    only_written={"attn_pdrop": 0.0},
    ignored=(r"\.attn\.(masked_)?bias$",),
    write_position=lambda _: {},
    read_position=lambda _: LearnedPositionConfig(),
)

FAMILIES = (LLAMA, QWEN3, GPT2)
