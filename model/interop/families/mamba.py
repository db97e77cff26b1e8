"""Mamba (Gu & Dao 2023, https://arxiv.org/abs/2312.00752)."""

from model.config import ModelConfig
from model.interop.families.common import OURS
from model.interop.tables import Family, Setting, Weight
from model.mixers.mamba import MambaConfig
from model.positions.none import NoPositionConfig

_MAMBA = "backbone.layers.{layer}"


def _rank(config: ModelConfig) -> int:
    assert isinstance(config.mixer, MambaConfig)
    return config.mixer.rank(config.d_model)


MAMBA = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    peft_task="CAUSAL_LM",
    peft_refuses=("out_proj",),
    base_prefix="backbone.",
    weights=(
        Weight("backbone.embeddings.weight", ("frontend.tokens.weight",)),
        Weight(f"{_MAMBA}.norm.weight", (f"{OURS}.mixer_norm.weight",)),
        Weight(f"{_MAMBA}.mixer.A_log", (f"{OURS}.mixer.a_log",)),
        Weight(f"{_MAMBA}.mixer.D", (f"{OURS}.mixer.skip",)),
        *(
            Weight(f"{_MAMBA}.mixer.{theirs}.{part}", (f"{OURS}.mixer.{ours}.{part}",))
            for theirs, ours in (
                ("conv1d", "conv"),
                ("in_proj", "in_proj"),
                ("x_proj", "x_proj"),
                ("dt_proj", "dt_proj"),
                ("out_proj", "out_proj"),
            )
            for part in ("weight", "bias")
        ),
        Weight("backbone.norm_f.weight", ("stack.final_norm.weight",)),
        Weight("lm_head.weight", ("head.weight",)),
    ),
    settings=(
        Setting("vocab_size", ("vocab_size",), 50280),
        Setting("hidden_size", ("d_model",), 768),
        Setting("num_hidden_layers", ("n_layers",), 32),
        # A key of our own: their class knows no limit, and 2,048 is what the published models were trained on.
        Setting("max_position_embeddings", ("max_seq_len",), 2048),
        Setting("tie_word_embeddings", ("tie_embeddings",), True),
        Setting("expand", ("mixer.expand",), 2),
        Setting("state_size", ("mixer.d_state",), 16),
        Setting("conv_kernel", ("mixer.d_conv",), 4),
        Setting("use_bias", ("mixer.bias",), False),
        Setting("use_conv_bias", ("mixer.conv_bias",), True),
        Setting("time_step_rank", ("mixer.dt_rank",), "auto", {None: "auto"}, written=_rank),
        Setting("layer_norm_epsilon", ("norm.eps",), 1e-5),
    ),
    fixed={
        "layout": "pre",
        "pattern": (),
        "norm.kind": "rms",
        "position.kind": "none",
        "mixer.kind": "mamba",
        "ffn.kind": "none",
        "logit_soft_cap": None,
    },
    constants={"hidden_act": "silu"},
    only_written={"residual_in_fp32": True},
    write_position=lambda _: {},
    read_position=lambda _: NoPositionConfig(),
)
