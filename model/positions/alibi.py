"""A penalty on scores that grows with distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from model.positions.base import Distances, PositionConfig
from model.positions.relative import check_distances

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AlibiConfig(PositionConfig):
    """Scores fall with distance, at a slope of its own for each head (Press et al. 2022).

    https://arxiv.org/abs/2108.12409
    """

    bias: ClassVar[Literal["learned", "fixed"] | None] = "fixed"

    kind: Literal["alibi"] = "alibi"
    """Which part this is."""

    def check(self, model: ModelConfig) -> None:
        check_distances(model)

    def build_distances(self, heads: int, *, causal: bool) -> AlibiBias:
        return AlibiBias(heads)


class AlibiBias(Distances):
    """Minus slope times distance, for each head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, keys: int, device: torch.device) -> torch.Tensor:
        return alibi_bias(self.heads, keys, device)


def alibi_bias(heads: int, keys: int, device: torch.device) -> torch.Tensor:
    """fp32 bias_HL for `Mask`: minus slope times distance, for distances of less than `keys` either way."""
    slopes_H = torch.tensor(alibi_slopes(heads), device=device)
    distance_L = torch.arange(1 - keys, keys, device=device).abs()
    return -slopes_H[:, None] * distance_L


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n) … for n heads; if n is no power of two, those of the power below and every other of the
    next one's, as the authors' code has it."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]
