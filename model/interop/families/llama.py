"""LLaMA (Touvron et al. 2023, https://arxiv.org/abs/2302.13971) and the classes that name their tensors as it does."""

from model.interop.families.common import ACTIVATION_NAMES, DECODER, OURS, read_rope, write_rope
from model.interop.tables import Family, Setting, Weight

_LLAMA = "model.layers.{layer}"

LLAMA_WEIGHTS = (
    Weight("model.embed_tokens.weight", ("frontend.tokens.weight",)),
    Weight(f"{_LLAMA}.input_layernorm.weight", (f"{OURS}.mixer_norm.weight",)),
    *(
        Weight(f"{_LLAMA}.self_attn.{theirs}_proj.{part}", (f"{OURS}.mixer.{ours}.{part}",))
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
        for part in ("weight", "bias")
    ),
    Weight(f"{_LLAMA}.post_attention_layernorm.weight", (f"{OURS}.ffn_norm.weight",)),
    *(
        Weight(f"{_LLAMA}.mlp.{name}_proj.{part}", (f"{OURS}.ffn.{name}.{part}",))
        for name in ("gate", "up", "down")
        for part in ("weight", "bias")
    ),
    Weight("model.norm.weight", ("stack.final_norm.weight",)),
    Weight("lm_head.weight", ("head.weight",)),
)

LLAMA_SETTINGS = (
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
    peft_task="CAUSAL_LM",
    base_prefix="model.",
    weights=LLAMA_WEIGHTS,
    settings=(*LLAMA_SETTINGS, Setting("mlp_bias", ("ffn.bias",), False)),
    fixed={
        **DECODER,
        "layout": "pre",
        "pattern": (),
        "norm.kind": "rms",
        "position.kind": "rope",
        "position.channels": None,
        "position.interleaved": False,
        "mixer.kind": "attention",
        "mixer.qk_norm": False,
        "mixer.window": None,
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

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    peft_task="CAUSAL_LM",
    base_prefix="model.",
    weights=LLAMA_WEIGHTS,
    settings=tuple(setting for setting in LLAMA_SETTINGS if setting.theirs != "attention_bias"),
    fixed={**LLAMA.fixed, "mixer.qkv_bias": True, "mixer.out_bias": False, "ffn.bias": False},
    constants={"use_sliding_window": False},
    write_position=write_rope,
    read_position=read_rope,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    peft_task="CAUSAL_LM",
    base_prefix="model.",
    weights=(
        *LLAMA_WEIGHTS,
        *(
            Weight(f"{_LLAMA}.self_attn.{name}_norm.weight", (f"{OURS}.mixer.{name}_norm.weight",))
            for name in ("q", "k")
        ),
    ),
    settings=LLAMA_SETTINGS,
    fixed={**LLAMA.fixed, "mixer.qk_norm": True, "ffn.bias": False},
    constants={"use_sliding_window": False},
    write_position=write_rope,
    read_position=read_rope,
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    peft_task="CAUSAL_LM",
    base_prefix="model.",
    weights=LLAMA_WEIGHTS,
    settings=(
        *(setting for setting in LLAMA_SETTINGS if setting.theirs != "attention_bias"),
        Setting("sliding_window", ("mixer.window",), 4096),
    ),
    fixed={
        **{path: value for path, value in LLAMA.fixed.items() if path != "mixer.window"},
        "mixer.qkv_bias": False,
        "mixer.out_bias": False,
        "ffn.bias": False,
    },
    write_position=write_rope,
    read_position=read_rope,
)
"""Mistral 7B (Jiang et al. 2023, https://arxiv.org/abs/2310.06825)."""
