"""Every kind of feed-forward network there is."""

from model.ffns.dense import FfnConfig, NoFfnConfig
from model.ffns.experts.config import MoeConfig

AnyFfnConfig = FfnConfig | MoeConfig | NoFfnConfig
"""What a configuration chooses from, told apart by `kind`; each is an `AbstractFfnConfig`."""
