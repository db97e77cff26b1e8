"""Small models of both built families, and a strategy that draws many more."""

from dataclasses import replace

from hypothesis import strategies as st

from model.config import LayerChange, ModelConfig
from model.ffn import FfnConfig, NoFfnConfig
from model.init import InitConfig
from model.mixers.attention import AttentionConfig
from model.mixers.linear_attention import FavorConfig, LinearAttentionConfig
from model.mixers.mamba import MambaConfig
from model.norm import NormConfig
from model.position import LearnedPositionConfig, LinearScaling, Llama3Scaling, NoPositionConfig, RopeConfig

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
RECURRENT = {"mamba": MAMBA, "linear": LINEAR, "performer": PERFORMER, "hybrid": HYBRID}


@st.composite
def llama_configs(draw: st.DrawFn) -> ModelConfig:
    """LLaMA and Qwen3 models of any shape that is small."""
    n_kv_heads, groups, head_dim = (draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2, 3), (4, 8, 10)))
    n_heads = n_kv_heads * groups
    bias, qk_norm = draw(st.booleans()), draw(st.booleans())
    scaling = draw(
        st.sampled_from([None, LinearScaling(factor=2.5), Llama3Scaling(factor=4.0, original_max_seq_len=8)])
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
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=qk_norm,
        ),
        ffn=FfnConfig(
            d_ff=draw(st.integers(3, 40)),
            activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
            bias=not qk_norm and draw(st.booleans()),
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


def recurrent_config() -> st.SearchStrategy[ModelConfig]:
    """Models with a state of constant size, alone or among attention layers."""
    return st.one_of(mamba_configs(), st.sampled_from([LINEAR, PERFORMER, HYBRID]))


def any_config() -> st.SearchStrategy[ModelConfig]:
    return st.one_of(llama_configs(), gpt2_configs())
