"""Every kind of mixer there is."""

from model.mixers.attention import AttentionConfig
from model.mixers.bigbird import BigBirdConfig
from model.mixers.grid import GridAttentionConfig
from model.mixers.latent import LatentAttentionConfig
from model.mixers.linear_attention import LinearAttentionConfig
from model.mixers.longformer import LongformerConfig
from model.mixers.mamba import MambaConfig

AnyMixerConfig = (
    AttentionConfig
    | LatentAttentionConfig
    | LongformerConfig
    | BigBirdConfig
    | GridAttentionConfig
    | LinearAttentionConfig
    | MambaConfig
)
"""What a configuration chooses from, told apart by `kind`; each is a `MixerConfig`."""
