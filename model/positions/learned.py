"""A learned vector for every position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from conf.refusal import Refusal
from model.init import Declared, Parameter, declare
from model.positions.base import PositionConfig


@dataclass(frozen=True, kw_only=True)
class LearnedPositionConfig(PositionConfig):
    """One learned vector per position, added to the token embedding (GPT-2)."""

    kind: Literal["learned"] = "learned"
    """Which part this is."""
    offset: int = 0
    """Rows of the table before that of position 0, which nothing looks up (BART and RoBERTa have 2)."""

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise Refusal("offset", self.offset, "it counts unused rows", "use 0 for none")

    def parameters(self, max_seq_len: int, d_model: int, heads: int) -> int:
        return (max_seq_len + self.offset) * d_model

    def longest_row(self, max_seq_len: int) -> int:
        return max_seq_len

    def rows_before_first(self) -> int:
        return self.offset

    def build(self, max_seq_len: int, d_model: int) -> LearnedPositions:
        return LearnedPositions(max_seq_len, d_model, self.offset)


class LearnedPositions(Declared):
    """A table of [max_seq_len, D]; positions beyond it are a user's error, caught where lengths are known."""

    declared = declare(weight=Parameter("embedding", "embedding"))

    def __init__(self, max_seq_len: int, d_model: int, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(max_seq_len + offset, d_model))

    def forward(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """int64 positions from 0 to max_seq_len - 1: [B or 1, T, D]."""
        return nn.functional.embedding(positions_BT + self.offset, self.weight)
