"""GPT-2 (Radford et al. 2019)."""

from model.interop.families.common import ACTIVATION_NAMES, DECODER, OURS
from model.interop.tables import Family, Setting, Weight
from model.positions.learned import LearnedPositionConfig

_GPT2 = "transformer.h.{layer}"

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    peft_task="CAUSAL_LM",
    base_prefix="transformer.",
    weights=(
        Weight("transformer.wte.weight", ("frontend.tokens.weight",)),
        Weight("transformer.wpe.weight", ("frontend.positions.weight",)),
        *(
            weight
            for part in ("weight", "bias")
            for weight in (
                Weight(f"{_GPT2}.ln_1.{part}", (f"{OURS}.mixer_norm.{part}",)),
                Weight(
                    f"{_GPT2}.attn.c_attn.{part}",
                    tuple(f"{OURS}.mixer.{name}.{part}" for name in ("q", "k", "v")),
                    transposed=part == "weight",
                ),
                Weight(f"{_GPT2}.attn.c_proj.{part}", (f"{OURS}.mixer.out.{part}",), transposed=part == "weight"),
                Weight(f"{_GPT2}.ln_2.{part}", (f"{OURS}.ffn_norm.{part}",)),
                Weight(f"{_GPT2}.mlp.c_fc.{part}", (f"{OURS}.ffn.up.{part}",), transposed=part == "weight"),
                Weight(f"{_GPT2}.mlp.c_proj.{part}", (f"{OURS}.ffn.down.{part}",), transposed=part == "weight"),
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
        **DECODER,
        "layout": "pre",
        "pattern": (),
        "norm.kind": "layer",
        "norm.bias": True,
        "position.kind": "learned",
        "position.offset": 0,
        "mixer.kind": "attention",
        "mixer.qkv_bias": True,
        "mixer.out_bias": True,
        "mixer.n_kv_heads": None,
        "mixer.head_dim": None,
        "mixer.qk_norm": False,
        "mixer.window": None,
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
