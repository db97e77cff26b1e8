"""A text, then an image's tokens row by row as a grid: who sees whom, and where each stands (DALL-E, Ramesh et al. 2021,
https://arxiv.org/abs/2102.12092, appendix B.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.init import Declared, Parameter, declare
from model.limits import check_counts
from model.positions.base import PositionConfig

if TYPE_CHECKING:
    from model.config import ModelConfig

GridPattern = Literal["row", "column", "convolution", "transposed"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which earlier tokens a token sees: all of the text's, and of the image's those that the pattern reaches.

    text: tokens of a row before its image. width: tokens of a row of the image.
    row: the last `width` tokens before it, so back to the one above. column: those above it. convolution: those that a
    square of `kernel` tokens around it covers. Rows follow each other without an edge, as in the paper: a neighbour to the
    left of the first column is the end of the row above.
    transposed: the image's tokens stand column by column and `width` is the length of one; what a kernel makes of `column`.
    """

    text: int
    width: int
    pattern: GridPattern
    kernel: int = 11

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """bool: may a token at place `query` see the one at `key`, which is not behind it; shapes that broadcast."""
        distance = query - key
        if self.pattern == "row":
            near = distance <= self.width
        elif self.pattern == "column":
            near = distance % self.width == 0
        elif self.pattern == "transposed":
            near = (query - self.text) // self.width == (key - self.text) // self.width
        else:
            half = self.kernel // 2
            rows_up = ((distance + half) // self.width).clamp(max=half)
            near = distance <= rows_up * self.width + half
        return near | (key < self.text)

    def meeting(self, block: int, query_Q1: torch.Tensor, key_J: torch.Tensor) -> torch.Tensor:
        """bool [Q, J]: may some token of a block of queries see some token of a block of keys; numbers of blocks."""
        first_key_J = key_J * block
        nearest_QJ = (query_Q1 * block - first_key_J - block + 1).clamp(min=0)
        farthest_QJ = query_Q1 * block - first_key_J + block - 1
        if self.pattern == "row":
            near_QJ = nearest_QJ <= self.width
        elif self.pattern == "column":
            near_QJ = farthest_QJ // self.width * self.width >= nearest_QJ
        elif self.pattern == "transposed":
            first, last = (
                (at * block + step - self.text) // self.width for at, step in ((query_Q1, 0), (key_J, block - 1))
            )
            near_QJ = first <= last
        else:
            half = self.kernel // 2
            rows_up_QJ = ((farthest_QJ + half) // self.width).clamp(max=half)
            near_QJ = nearest_QJ <= rows_up_QJ * self.width + half
        return near_QJ | (first_key_J < self.text)

    def pairs(self, tokens: int) -> int:
        """How many pairs of a query and a key a row of so many tokens has."""
        text = min(self.text, tokens)
        image = tokens - text
        distance_L = torch.arange(image)
        near_L = self.sees(self.text + distance_L, torch.full_like(distance_L, self.text))
        return text * (text + 1) // 2 + image * text + int(((image - distance_L) * near_L).sum())


@dataclass(frozen=True, kw_only=True)
class GridPositionConfig(PositionConfig):
    """A learned vector for each place in the text, and for the image one for each row and one for each column, added."""

    kind: Literal["grid"] = "grid"
    """Which part this is."""
    text: int = 256
    """Tokens of the text before the image."""
    height: int = 32
    """Rows of the image, in tokens."""
    width: int = 32
    """Columns of the image, in tokens."""

    def __post_init__(self) -> None:
        check_counts(self, "text", "height", "width")

    @property
    def tokens(self) -> int:
        """Tokens of a whole row."""
        return self.text + self.height * self.width

    @property
    def vectors(self) -> int:
        """How many are learned."""
        return self.text + self.height + self.width

    def check(self, model: ModelConfig) -> None:
        for grid in model.grids:
            if (grid.text, grid.width) != (self.text, self.width):
                raise Refusal(
                    "mixer",
                    NO_VALUE,
                    (
                        f"has text={grid.text} width={grid.width}, model.position has text={self.text} width={self.width}:"
                        " both are of the same image"
                    ),
                    "make them equal",
                )
        if model.max_seq_len > self.tokens:
            raise Refusal(
                "max_seq_len",
                model.max_seq_len,
                f"model.position has places for {self.tokens}, text and image together",
                "lower it, or make those larger",
            )

    def parameters(self, max_seq_len: int, d_model: int, heads: int) -> int:
        return self.vectors * d_model

    def longest_row(self, max_seq_len: int) -> int:
        return max_seq_len

    def build(self, max_seq_len: int, d_model: int) -> GridPositions:
        return GridPositions(self, d_model)


class GridPositions(Declared):
    """positions_BT -> x_BTD, from tables of [text, D], [height, D] and [width, D]."""

    declared = declare(
        text=Parameter("embedding", "embedding"),
        rows=Parameter("embedding", "embedding"),
        columns=Parameter("embedding", "embedding"),
    )

    def __init__(self, config: GridPositionConfig, d_model: int) -> None:
        super().__init__()
        self.text = nn.Parameter(torch.empty(config.text, d_model))
        self.rows = nn.Parameter(torch.empty(config.height, d_model))
        self.columns = nn.Parameter(torch.empty(config.width, d_model))

    def forward(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """int64 positions from 0, the text's first; of the image in the order of its rows. [B or 1, T, D]."""
        texts, width = len(self.text), len(self.columns)
        place_BT = (positions_BT - texts).clamp(min=0)
        of_text_BTD = nn.functional.embedding(positions_BT.clamp(max=texts - 1), self.text)
        of_image_BTD = nn.functional.embedding(place_BT // width, self.rows)
        of_image_BTD = of_image_BTD + nn.functional.embedding(place_BT % width, self.columns)
        return torch.where((positions_BT < texts)[..., None], of_text_BTD, of_image_BTD)
