"""A tower of blocks and the norm that ends it."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.mixers.base import MixerInput, MixerState
from model.slots import Record


class Stack(nn.Module):
    """x_BTD -> x_BTD through every layer, and what each layer records; `final_norm` is the identity in post-norm
    layouts.

    recompute: set from outside to trade a second forward pass for the activations inside each block, of passes without
    states.
    """

    def __init__(self, layers: list[Block], final_norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_norm = final_norm
        self.recompute = False

    def forward(
        self, x_BTD: torch.Tensor, shared: MixerInput, states: list[MixerState] | None = None
    ) -> tuple[torch.Tensor, list[Record]]:
        """x_BTD after the last norm, and a record for each layer, {} where it has nothing to tell.

        states: one for each layer, continued and updated; such a pass holds its activations, for a layer computed again
        would append to its state again.
        """
        records = []
        for index, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled() and states is None:
                x_BTD, record = checkpoint(layer, x_BTD, shared, use_reentrant=False)
            else:
                x_BTD, record = layer(x_BTD, shared, None if states is None else states[index])
            records.append(record)
        return self.final_norm(x_BTD), records

    def new_states(self, rows: int, max_tokens: int) -> list[MixerState]:
        """An empty decoding state for every layer."""
        return [block.new_state(rows, max_tokens) for block in self.layers if isinstance(block, Block)]
