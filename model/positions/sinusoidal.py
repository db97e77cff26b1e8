"""Fixed sines and cosines of the position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from conf.refusal import Refusal
from model.positions.base import PositionConfig


@dataclass(frozen=True, kw_only=True)
class SinusoidalPositionConfig(PositionConfig):
    """Fixed sines and cosines added to the token embedding (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762,
    section 3.5): the first half of the channels are all sines, the second all cosines, from 1 to 1/10000 radians.
    """

    kind: Literal["sinusoidal"] = "sinusoidal"
    """Which part this is."""
    inclusive: bool = False
    """The last channel of each half has 1/10000 radians itself, not the one that would follow (Whisper)."""

    def build(self, max_seq_len: int, d_model: int) -> SinusoidalPositions:
        if self.inclusive and (d_model < 4 or d_model % 2):
            raise Refusal("model.d_model", d_model, "with position.inclusive: two equal halves need an even 4 or more")
        return SinusoidalPositions(d_model, self.inclusive)


class SinusoidalPositions(nn.Module):
    """The sines and cosines of any position; nothing is tabulated, so no buffer can be cast to bf16."""

    def __init__(self, d_model: int, inclusive: bool = False) -> None:
        super().__init__()
        self.d_model = d_model
        self.inclusive = inclusive

    def forward(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """fp32 [B or 1, T, D]; angles are taken in fp64, where a large position keeps its fraction of a turn, but in
        fp32 where Whisper's weights were trained with those."""
        if self.inclusive:
            step = math.log(10000.0) / (self.d_model // 2 - 1)
            inverse_C = torch.exp(-step * torch.arange(self.d_model // 2, device=positions_BT.device))
            angles_BTC = positions_BT[..., None] * inverse_C
            return torch.cat((angles_BTC.sin(), angles_BTC.cos()), dim=-1)
        exponent_C = torch.arange(0, self.d_model, 2, dtype=torch.float64, device=positions_BT.device) / self.d_model
        angles_BTC = positions_BT.double()[..., None] * 10000.0**-exponent_C
        x_BTD = torch.cat((angles_BTC.sin(), angles_BTC[..., : self.d_model // 2].cos()), dim=-1)
        return x_BTD.float()
