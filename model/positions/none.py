"""No positions."""

from dataclasses import dataclass
from typing import Literal

from model.positions.base import PositionConfig


@dataclass(frozen=True, kw_only=True)
class NoPositionConfig(PositionConfig):
    """No positional signal but the causal mask (NoPE)."""

    kind: Literal["none"] = "none"
    """Which part this is."""
