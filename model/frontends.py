"""What turns input into x_BTD, the sequence of vectors every stack works on."""

import torch
from torch import nn

from model.init import Declared, Parameter, declare
from model.position import LearnedPositions


class Embedding(Declared):
    """A table of [V, D]."""

    declared = declare(weight=Parameter("embedding", "embedding"))

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(tokens_BT, self.weight)


class TokenFrontend(nn.Module):
    """Token embeddings, plus learned positions where the family has them."""

    def __init__(self, tokens: Embedding, positions: LearnedPositions | None, dropout: float) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.tokens(tokens_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_BT)
        return self.dropout(x_BTD)
