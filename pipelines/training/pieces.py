"""A stretch of one parameter: what ranks keep, and what checkpoints are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter, counted over its flattened elements, that this rank keeps and updates.

    weight: the fp32 master weights of the stretch, [numel]. owner: the tensor the optimizer knows, and under which its
    state is kept; the stretch starts at element `offset` of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: torch.Tensor
    owner: torch.Tensor
    offset: int
