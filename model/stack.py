"""A tower of blocks and the norm that ends it."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.mixers.base import MixerInput, MixerState


class Stack(nn.Module):
    """x_BTD -> x_BTD through every layer; `final_norm` is the identity in post-norm layouts.

    recompute: set from outside to trade a second forward pass for the activations inside each block.
    """

    def __init__(self, layers: list[Block], final_norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_norm = final_norm
        self.recompute = False

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, states: list[MixerState] | None = None) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(layer, x_BTD, shared, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, shared, None if states is None else states[index])
        return self.final_norm(x_BTD)

    def new_states(self, rows: int, max_tokens: int) -> list[MixerState]:
        """An empty decoding state for every layer."""
        return [block.new_state(rows, max_tokens) for block in self.layers if isinstance(block, Block)]
