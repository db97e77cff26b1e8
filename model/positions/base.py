"""What a model asks of its positions, whatever they are: vectors for the frontend, angles for queries and keys, or a bias
on the scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from conf.registry import Registry
from model.init import Declared

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """How a token's place is known; each kind overrides what it does.

    bias: of scores by distance (`build_distances`), learned or a function of the distance; null for none.
    """

    bias: ClassVar[Literal["learned", "fixed"] | None] = None
    kinds: ClassVar[Registry] = Registry(
        "positions",
        {
            "rope": "model.positions.rope:RopeConfig",
            "learned": "model.positions.learned:LearnedPositionConfig",
            "sinusoidal": "model.positions.sinusoidal:SinusoidalPositionConfig",
            "none": "model.positions.none:NoPositionConfig",
            "alibi": "model.positions.alibi:AlibiConfig",
            "relative": "model.positions.relative:RelativePositionConfig",
            "grid": "model.positions.grid:GridPositionConfig",
        },
    )

    kind: str
    """Which part this is."""

    def check(self, model: ModelConfig) -> None:
        """Raises Refusal where this does not suit the rest of the model."""

    def parameters(self, max_seq_len: int, d_model: int, heads: int) -> int:
        """How many are learned."""
        return 0

    def longest_row(self, max_seq_len: int) -> int | None:
        """Tokens of the longest row that it knows places for; null where any length will do."""
        return None

    def rows_before_first(self) -> int:
        """Rows of a table of positions before that of the first token."""
        return 0

    def build(self, max_seq_len: int, d_model: int) -> Positions | None:
        """What the frontend adds: positions_BT -> x_BTD; null for nothing."""
        return None

    def build_distances(self, heads: int, *, causal: bool) -> Distances | None:
        """What is added to the scores; null for nothing."""
        return None

    def rotation(self, positions_BT: torch.Tensor, channels: int) -> Rotation | None:
        """The angles of int64 positions for heads of so many channels; null where nothing is rotated."""
        return None

    def rotated_channels(self, channels: int) -> int:
        """How many channels of a head are rotated where queries and keys are laid out for it."""
        return channels


Positions = nn.Module
"""Module that a frontend adds: int64 positions_BT -> [B or 1, T, D]."""


class Distances(Declared):
    """forward(keys, device) -> fp32 bias_HL for `Mask`, for distances of less than `keys` either way."""


@dataclass(frozen=True)
class Rotation:
    """The angles of every token, shared by all layers: fp32 [B or 1, T, 1, C] for the channels that are rotated, the
    sine of the first channel of each pair negated. sharpness: see `rope.YarnScaling`."""

    cos_BT1C: torch.Tensor
    sin_BT1C: torch.Tensor
    interleaved: bool = False
    sharpness: float = 1.0

    def __call__(self, x_BTHC: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys; computed in fp32, returned in the precision of the input."""
        channels = self.cos_BT1C.shape[-1]
        if channels < x_BTHC.shape[-1]:
            return torch.cat((self(x_BTHC[..., :channels]), x_BTHC[..., channels:]), dim=-1)
        if self.interleaved:
            swapped_BTHC = x_BTHC.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            swapped_BTHC = x_BTHC.roll(channels // 2, -1)  # the halves in the other order
        return torch.addcmul(x_BTHC * self.cos_BT1C, swapped_BTHC, self.sin_BT1C).to(x_BTHC.dtype)

    def between(self, first: int, end: int) -> Rotation:
        """Of angles of positions 0, 1, 2 …, those of some, without a copy."""
        return replace(self, cos_BT1C=self.cos_BT1C[:, first:end], sin_BT1C=self.sin_BT1C[:, first:end])

    def at(self, positions_BT: torch.Tensor) -> Rotation:
        """Of angles of positions 0, 1, 2 …, those of these."""
        return replace(self, cos_BT1C=self.cos_BT1C[0][positions_BT], sin_BT1C=self.sin_BT1C[0][positions_BT])
