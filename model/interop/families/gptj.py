"""GPT-J (Wang & Komatsuzaki 2021): the first large model whose attention and feed-forward network run side by side."""

from collections.abc import Mapping
from typing import Any

from model.interop.families.common import ACTIVATION_NAMES, DECODER, OURS
from model.interop.tables import Family, Setting, Weight
from model.positions.base import PositionConfig
from model.positions.rope import RopeConfig

_GPTJ = "transformer.h.{layer}"


def _read_position(theirs: Mapping[str, Any]) -> PositionConfig:
    return RopeConfig(channels=int(theirs.get("rotary_dim", 64)), interleaved=True)


GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    peft_task="CAUSAL_LM",
    base_prefix="transformer.",
    weights=(
        Weight("transformer.wte.weight", ("frontend.tokens.weight",)),
        *(Weight(f"{_GPTJ}.ln_1.{part}", (f"{OURS}.mixer_norm.{part}",)) for part in ("weight", "bias")),
        *(
            Weight(f"{_GPTJ}.attn.{theirs}_proj.weight", (f"{OURS}.mixer.{ours}.weight",))
            for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out"))
        ),
        *(
            Weight(f"{_GPTJ}.mlp.{theirs}.{part}", (f"{OURS}.ffn.{ours}.{part}",))
            for theirs, ours in (("fc_in", "up"), ("fc_out", "down"))
            for part in ("weight", "bias")
        ),
        *(Weight(f"transformer.ln_f.{part}", (f"stack.final_norm.{part}",)) for part in ("weight", "bias")),
        *(Weight(f"lm_head.{part}", (f"head.{part}",)) for part in ("weight", "bias")),
    ),
    settings=(
        Setting("vocab_size", ("vocab_size",), 50400),
        Setting("n_embd", ("d_model",), 4096),
        Setting("n_layer", ("n_layers",), 28),
        Setting("n_positions", ("max_seq_len",), 2048),
        Setting("tie_word_embeddings", ("tie_embeddings",), False),
        Setting("n_head", ("mixer.n_heads",), 16),
        Setting("rotary_dim", ("position.channels",), 64, written="rotated_channels"),
        Setting("n_inner", ("ffn.d_ff",)),
        Setting("activation_function", ("ffn.activation",), "gelu_new", ACTIVATION_NAMES),
        Setting("layer_norm_epsilon", ("norm.eps",), 1e-5),
        Setting("embd_pdrop", ("dropout",), 0.0),
        Setting("resid_pdrop", ("dropout",), 0.0),
    ),
    fixed={
        **DECODER,
        "head.bias": True,
        "layout": "parallel",
        "pattern": (),
        "norm.kind": "layer",
        "norm.bias": True,
        "position.kind": "rope",
        "position.theta": 10000.0,
        "position.scaling": None,
        "position.interleaved": True,
        "mixer.kind": "attention",
        "mixer.qkv_bias": False,
        "mixer.out_bias": False,
        "mixer.n_kv_heads": None,
        "mixer.head_dim": None,
        "mixer.qk_norm": False,
        "ffn.kind": "dense",
        "ffn.gated": False,
        "ffn.bias": True,
        "logit_soft_cap": None,
    },
    only_written={"attn_pdrop": 0.0},
    ignored=(r"\.attn\.(masked_)?bias$", r"embed_positions$"),
    write_position=lambda _: {},
    read_position=_read_position,
)
