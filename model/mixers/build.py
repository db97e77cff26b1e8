"""Every mixer there is: the union a configuration chooses from, and what builds the chosen one."""

from model.kernels.attention import AttentionKernel
from model.mixers.attention import Attention, AttentionConfig
from model.mixers.base import Mixer
from model.mixers.bigbird import BigBirdAttention, BigBirdConfig
from model.mixers.grid import GridAttention, GridAttentionConfig
from model.mixers.latent import LatentAttention, LatentAttentionConfig
from model.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from model.mixers.longformer import LongformerAttention, LongformerConfig
from model.mixers.mamba import Mamba, MambaConfig
from model.norms.norm import NormConfig

MixerConfig = (
    AttentionConfig
    | LatentAttentionConfig
    | LongformerConfig
    | BigBirdConfig
    | GridAttentionConfig
    | LinearAttentionConfig
    | MambaConfig
)
"""Told apart by `kind`; each arm has a `kind` of its own, `check(d_model)` and `costs(d_model, norm)`."""


def build_mixer(config: MixerConfig, d_model: int, norm: NormConfig, attend: AttentionKernel) -> Mixer:
    """The mixer of `config` for a stack of width `d_model`; `attend` is the kernel of those that attend."""
    if isinstance(config, MambaConfig):
        return Mamba(config, d_model)
    if isinstance(config, LinearAttentionConfig):
        return LinearAttention(config, d_model)
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention(config, d_model, norm, attend)
    if isinstance(config, LongformerConfig):
        return LongformerAttention(config, d_model, norm, attend)
    if isinstance(config, BigBirdConfig):
        return BigBirdAttention(config, d_model, norm, attend)
    if isinstance(config, GridAttentionConfig):
        return GridAttention(config, d_model, norm, attend)
    return Attention(config, d_model, norm, attend)
