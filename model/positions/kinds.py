"""Every kind of positions a model can have."""

from model.positions.alibi import AlibiConfig
from model.positions.grid import GridPositionConfig
from model.positions.learned import LearnedPositionConfig
from model.positions.none import NoPositionConfig
from model.positions.relative import RelativePositionConfig
from model.positions.rope import RopeConfig
from model.positions.sinusoidal import SinusoidalPositionConfig

AnyPositionConfig = (
    RopeConfig
    | LearnedPositionConfig
    | SinusoidalPositionConfig
    | NoPositionConfig
    | AlibiConfig
    | RelativePositionConfig
    | GridPositionConfig
)
"""What a configuration chooses from, told apart by `kind`; each is a `PositionConfig`."""
