"""Every feed-forward network there is: the union a configuration chooses from, and what builds the chosen one."""

from torch import nn

from model.ffns.dense import FeedForward, FfnConfig, NoFfnConfig
from model.ffns.experts.config import MoeConfig
from model.ffns.experts.layer import MixtureOfExperts

AnyFfnConfig = FfnConfig | MoeConfig | NoFfnConfig
"""Each arm has a `kind` of its own and `costs(d_model)`."""


def build_ffn(config: AnyFfnConfig, d_model: int, layer: int) -> nn.Module | None:
    """What fills the ffn slot of layer number `layer`, (x_BTD, shared) -> (y_BTD, Record); none where it stays empty."""
    if isinstance(config, NoFfnConfig):
        return None
    if isinstance(config, MoeConfig):
        return MixtureOfExperts(config, d_model, layer)
    return FeedForward(config, d_model)
