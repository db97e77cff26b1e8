"""Small models of every kind of part, strategies that draw many more, and the presets of conf/model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from conf.typed import from_plain
from model.config import LayerChange, ModelConfig
from model.ffns.dense import FfnConfig, NoFfnConfig
from model.ffns.experts.config import BalanceConfig, MoeConfig, RouterConfig
from model.frontends.text import TokenFrontendConfig
from model.heads.language import LanguageHeadConfig, NoHeadConfig, TargetWeight
from model.init import InitConfig
from model.mixers.attention import AttentionConfig
from model.mixers.grid import GridAttentionConfig
from model.mixers.latent import LatentAttentionConfig
from model.mixers.linear_attention import FavorConfig, LinearAttentionConfig
from model.mixers.mamba import MambaConfig
from model.norms.norm import NormConfig
from model.positions.alibi import AlibiConfig
from model.positions.grid import GridPositionConfig
from model.positions.learned import LearnedPositionConfig
from model.positions.none import NoPositionConfig
from model.positions.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from model.positions.sinusoidal import SinusoidalPositionConfig

PRESETS = Path(__file__).parents[2] / "conf" / "model"

# Wide enough a start that attention is far from uniform and a wrong mask or position shows in the logits.
LIVELY = InitConfig(std=0.2)

LLAMA = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    mixer=AttentionConfig(n_heads=4, n_kv_heads=2),
    ffn=FfnConfig(d_ff=48),
    init=LIVELY,
)
GPT2 = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    norm=NormConfig(kind="layer", bias=True),
    position=LearnedPositionConfig(),
    mixer=AttentionConfig(n_heads=4, qkv_bias=True, out_bias=True),
    ffn=FfnConfig(d_ff=48, activation="gelu_tanh", gated=False, bias=True),
    init=LIVELY,
)
BERT = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    causal=False,
    layout="post",
    norm=NormConfig(kind="layer", bias=True, eps=1e-12),
    frontend=TokenFrontendConfig(token_types=2, norm=True),
    position=LearnedPositionConfig(offset=2),
    mixer=AttentionConfig(n_heads=4, qkv_bias=True, out_bias=True),
    ffn=FfnConfig(d_ff=48, activation="gelu", gated=False, bias=True),
    head=LanguageHeadConfig(bias=True, transform="gelu"),
    init=LIVELY,
)
VASWANI = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    layout="post",
    norm=NormConfig(kind="layer", bias=True),
    frontend=TokenFrontendConfig(scale_by_sqrt_width=True),
    position=SinusoidalPositionConfig(),
    mixer=AttentionConfig(n_heads=4, qkv_bias=True, out_bias=True),
    ffn=FfnConfig(d_ff=48, activation="relu", gated=False, bias=True),
    encoder=ModelConfig(
        d_model=32,
        n_layers=1,
        max_seq_len=64,
        causal=False,
        layout="post",
        norm=NormConfig(kind="layer", bias=True),
        frontend=TokenFrontendConfig(scale_by_sqrt_width=True),
        position=SinusoidalPositionConfig(),
        mixer=AttentionConfig(n_heads=4, qkv_bias=True, out_bias=True),
        ffn=FfnConfig(d_ff=48, activation="relu", gated=False, bias=True),
        head=NoHeadConfig(),
        init=LIVELY,
    ),
    init=LIVELY,
)
WIDER_ENCODER = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    mixer=AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=True),
    ffn=FfnConfig(d_ff=48),
    encoder=ModelConfig(
        vocab_size=50,
        d_model=40,
        mixer=AttentionConfig(n_heads=5),
        n_layers=1,
        max_seq_len=64,
        tie_embeddings=False,
        causal=False,
        ffn=FfnConfig(d_ff=48),
        head=NoHeadConfig(),
        init=LIVELY,
    ),
    init=LIVELY,
)

# A window in the first layer only, and distances that count.
WINDOWED = replace(
    LLAMA,
    mixer=AttentionConfig(n_heads=4, n_kv_heads=2, window=5),
    pattern=(LayerChange(first=1, mixer=AttentionConfig(n_heads=4)),),
)
MISTRAL = replace(LLAMA, mixer=AttentionConfig(n_heads=4, n_kv_heads=2, window=5))
ALIBI = replace(LLAMA, position=AlibiConfig(), mixer=AttentionConfig(n_heads=4, n_kv_heads=2, window=9))

GPTJ = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    layout="parallel",
    head=LanguageHeadConfig(bias=True),
    tie_embeddings=False,
    norm=NormConfig(kind="layer", bias=True),
    position=RopeConfig(channels=4, interleaved=True),
    mixer=AttentionConfig(n_heads=4),
    ffn=FfnConfig(d_ff=48, activation="gelu_tanh", gated=False, bias=True),
    init=LIVELY,
)
FALCON = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    layout="parallel_two_norms",
    norm=NormConfig(kind="layer", bias=True),
    mixer=AttentionConfig(n_heads=4, n_kv_heads=2),
    ffn=FfnConfig(d_ff=48, activation="gelu", gated=False),
    init=LIVELY,
)

# Without its auxiliary loss, which has tests of its own: `loss_sum` is the cross-entropy and nothing else.
MIXTRAL = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    mixer=AttentionConfig(n_heads=4, n_kv_heads=2),
    ffn=MoeConfig(n_experts=4, top_k=2, d_ff=24, balance=BalanceConfig(loss=0.0)),
    init=LIVELY,
)
QWEN2 = replace(LLAMA, mixer=AttentionConfig(n_heads=4, n_kv_heads=2, qkv_bias=True))
QWEN3 = replace(LLAMA, mixer=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, qk_norm=True))
QWEN3_MOE = replace(MIXTRAL, mixer=QWEN3.mixer)
LATENT = replace(
    LLAMA,
    position=RopeConfig(interleaved=True),
    mixer=LatentAttentionConfig(n_heads=3, q_rank=10, kv_rank=12, plain_dim=6, rope_dim=4, v_dim=7),
)
MAMBA = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=2,
    max_seq_len=64,
    position=NoPositionConfig(),
    mixer=MambaConfig(d_state=8),
    ffn=NoFfnConfig(),
    init=LIVELY,
)
LINEAR = replace(GPT2, mixer=LinearAttentionConfig(n_heads=4, qkv_bias=True, out_bias=True))
PERFORMER = replace(GPT2, mixer=LinearAttentionConfig(n_heads=4, features=FavorConfig(n_features=40)))
HYBRID = replace(
    MAMBA,
    n_layers=3,
    position=RopeConfig(),
    pattern=(LayerChange(every=2, first=1, mixer=LLAMA.mixer, ffn=LLAMA.ffn),),
)
# A text of 6 tokens and an image of 5 rows and 4 columns; 20 entries for text, 6 for padding, 12 codes.
ROW, COLUMN, CONVOLUTION = (
    GridAttentionConfig(n_heads=2, text=6, width=4, kernel=3, pattern=pattern)
    for pattern in ("row", "column", "convolution")
)
DALLE = ModelConfig(
    vocab_size=38,
    d_model=16,
    n_layers=4,
    max_seq_len=26,
    tie_embeddings=False,
    norm=NormConfig(kind="layer", bias=True),
    position=GridPositionConfig(text=6, height=5, width=4),
    mixer=ROW,
    ffn=FfnConfig(d_ff=32, activation="gelu", gated=False, bias=True),
    pattern=(LayerChange(every=4, first=1, mixer=COLUMN), LayerChange(every=4, first=3, mixer=CONVOLUTION)),
    head=LanguageHeadConfig(weights=(TargetWeight(weight=0.5), TargetWeight(first=26, weight=3.5))),
    init=LIVELY,
)
RECURRENT = {"mamba": MAMBA, "linear": LINEAR, "performer": PERFORMER, "hybrid": HYBRID}


YARN = YarnScaling(factor=4.0, beta_fast=3.0, beta_slow=0.2, original_max_seq_len=16)


@st.composite
def llama_configs(draw: st.DrawFn) -> ModelConfig:
    """LLaMA, Mistral, Qwen2 and Qwen3 models of any shape that is small."""
    n_kv_heads, groups, head_dim = (draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2, 3), (4, 8, 10)))
    n_heads = n_kv_heads * groups
    qk_norm, qkv_bias = draw(st.booleans()), draw(st.booleans())
    out_bias = qkv_bias and (qk_norm or draw(st.booleans()))
    window = None if qk_norm or qkv_bias else draw(st.none() | st.integers(1, 30))
    scaling = draw(
        st.sampled_from([None, LinearScaling(factor=2.5), Llama3Scaling(factor=4.0, original_max_seq_len=8), YARN])
    )
    return ModelConfig(
        vocab_size=draw(st.integers(17, 70)),
        d_model=n_heads * draw(st.sampled_from([3, 6, 8])),
        n_layers=draw(st.integers(1, 2)),
        max_seq_len=32,
        tie_embeddings=draw(st.booleans()),
        norm=NormConfig(eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3]))),
        position=RopeConfig(theta=draw(st.sampled_from([100.0, 10000.0])), scaling=scaling),
        mixer=AttentionConfig(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            window=window,
        ),
        ffn=FfnConfig(
            d_ff=draw(st.integers(3, 40)),
            activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
            bias=window is None and not qk_norm and qkv_bias == out_bias and draw(st.booleans()),
        ),
        init=LIVELY,
    )


@st.composite
def gpt2_configs(draw: st.DrawFn) -> ModelConfig:
    """GPT-2 models of any shape that is small."""
    n_heads = draw(st.integers(1, 4))
    return ModelConfig(
        vocab_size=draw(st.integers(17, 70)),
        d_model=n_heads * draw(st.sampled_from([3, 4, 8])),
        n_layers=draw(st.integers(1, 2)),
        max_seq_len=32,
        tie_embeddings=draw(st.booleans()),
        norm=NormConfig(kind="layer", bias=True, eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3]))),
        position=LearnedPositionConfig(),
        mixer=AttentionConfig(n_heads=n_heads, qkv_bias=True, out_bias=True),
        ffn=FfnConfig(
            d_ff=draw(st.integers(3, 40)),
            activation=draw(st.sampled_from(["gelu_tanh", "gelu", "relu"])),
            gated=False,
            bias=True,
        ),
        init=LIVELY,
    )


@st.composite
def parallel_configs(draw: st.DrawFn) -> ModelConfig:
    """GPT-J and Falcon models of any shape that is small."""
    gptj = draw(st.booleans())
    n_kv_heads, groups, head_dim = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 3), (1, 2), (4, 8, 10)))
    n_heads, bias = n_kv_heads * groups, draw(st.booleans())
    rotated = draw(st.sampled_from([None, 2, 4]))
    return ModelConfig(
        vocab_size=draw(st.integers(17, 70)),
        d_model=n_heads * head_dim,
        n_layers=draw(st.integers(1, 2)),
        max_seq_len=32,
        tie_embeddings=draw(st.booleans()),
        head=LanguageHeadConfig(bias=gptj),
        layout="parallel" if gptj else draw(st.sampled_from(["parallel", "parallel_two_norms"])),
        norm=NormConfig(kind="layer", bias=True, eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3]))),
        position=RopeConfig(channels=rotated, interleaved=True) if gptj else RopeConfig(theta=100.0),
        mixer=AttentionConfig(
            n_heads=n_heads,
            n_kv_heads=None if gptj else n_kv_heads,
            qkv_bias=bias and not gptj,
            out_bias=bias and not gptj,
        ),
        ffn=FfnConfig(
            d_ff=draw(st.integers(3, 40)),
            activation=draw(st.sampled_from(["gelu_tanh", "gelu", "relu"])),
            gated=False,
            bias=bias or gptj,
        ),
        init=LIVELY,
    )


@st.composite
def mamba_configs(draw: st.DrawFn) -> ModelConfig:
    """Mamba models of any shape that is small."""
    return ModelConfig(
        vocab_size=draw(st.integers(17, 70)),
        d_model=draw(st.integers(3, 20)),
        n_layers=draw(st.integers(1, 2)),
        max_seq_len=32,
        tie_embeddings=draw(st.booleans()),
        norm=NormConfig(eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3]))),
        position=NoPositionConfig(),
        mixer=MambaConfig(
            expand=draw(st.integers(1, 3)),
            d_state=draw(st.integers(1, 9)),
            d_conv=draw(st.integers(2, 5)),
            dt_rank=draw(st.sampled_from([None, 1, 3])),
            bias=draw(st.booleans()),
            conv_bias=draw(st.booleans()),
        ),
        ffn=NoFfnConfig(),
        init=LIVELY,
    )


@st.composite
def moe_configs(draw: st.DrawFn) -> ModelConfig:
    """Mixtral and Qwen3-MoE models of any shape that is small, the latter with dense layers among the others."""
    n_kv_heads, groups, head_dim = (draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2), (4, 8)))
    n_experts, activation = draw(st.integers(2, 5)), draw(st.sampled_from(["silu", "gelu"]))
    top_k, n_layers, qwen = draw(st.integers(1, n_experts)), draw(st.integers(1, 3)), draw(st.booleans())
    if not qwen:
        top_k = max(top_k, 2)
    experts = MoeConfig(
        n_experts=n_experts,
        top_k=top_k,
        d_ff=draw(st.integers(3, 20)),
        activation=activation,
        router=RouterConfig(renormalize=top_k > 1 and (not qwen or draw(st.booleans()))),
        balance=BalanceConfig(loss=draw(st.sampled_from([0.0, 0.01]))),
    )
    dense = FfnConfig(d_ff=draw(st.integers(3, 40)), activation=activation)
    every_second = qwen and n_layers > 1 and draw(st.booleans())
    return ModelConfig(
        vocab_size=draw(st.integers(17, 70)),
        d_model=n_kv_heads * groups * draw(st.sampled_from([3, 8])),
        n_layers=n_layers,
        max_seq_len=32,
        tie_embeddings=draw(st.booleans()),
        norm=NormConfig(eps=draw(st.sampled_from([1e-6, 1e-5]))),
        position=RopeConfig(theta=draw(st.sampled_from([100.0, 10000.0]))),
        mixer=AttentionConfig(n_heads=n_kv_heads * groups, n_kv_heads=n_kv_heads, head_dim=head_dim, qk_norm=qwen),
        ffn=dense if every_second else experts,
        pattern=(LayerChange(every=2, first=1, ffn=experts),) if every_second else (),
        init=LIVELY,
    )


def recurrent_config() -> st.SearchStrategy[ModelConfig]:
    """Models with a state of constant size, alone or among attention layers."""
    return st.one_of(mamba_configs(), st.sampled_from([LINEAR, PERFORMER, HYBRID]))


def any_config() -> st.SearchStrategy[ModelConfig]:
    """Decoders of every built kin that attends."""
    return st.one_of(llama_configs(), gpt2_configs(), parallel_configs(), moe_configs())


def preset_values(name: str) -> dict[str, Any]:
    """What conf/model/NAME.yaml says."""
    values: dict[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def preset(name: str, **others: Any) -> ModelConfig:
    """The model of conf/model/NAME.yaml, with other values for these of its fields."""
    return from_plain(ModelConfig, {**preset_values(name), **others}, "model")
