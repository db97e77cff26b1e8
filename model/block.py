"""One layer of any transformer: slots for norms, a token mixer and a feed-forward network, in one of three layouts."""

from typing import Literal

import torch
from torch import nn

from model.mixers.base import Mixer, MixerInput, MixerState
from model.slots import Record

Layout = Literal["pre", "post", "parallel"]


class Block(nn.Module):
    """pre:      x + mixer(norm x), then x + ffn(norm x)      (GPT-2, LLaMA)
    post:     norm(x + mixer x), then norm(x + ffn x)      (Vaswani et al. 2017, BERT)
    parallel: x + mixer(norm x) + ffn(norm x)              (GPT-J, PaLM; one norm, so `ffn_norm` is None)

    Returns x_BTD and what the ffn slot records of the pass.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        mixer_norm: nn.Module,
        mixer: Mixer,
        ffn_norm: nn.Module | None,
        ffn: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.ffn_norm = ffn_norm
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None
    ) -> tuple[torch.Tensor, Record]:
        if self.layout == "parallel":
            normed_BTD = self.mixer_norm(x_BTD)
            y_BTD, record = self.ffn(normed_BTD, shared)
            return x_BTD + self.dropout(self.mixer(normed_BTD, shared, state) + y_BTD), record
        assert self.ffn_norm is not None
        if self.layout == "pre":
            x_BTD = x_BTD + self.dropout(self.mixer(self.mixer_norm(x_BTD), shared, state))
            y_BTD, record = self.ffn(self.ffn_norm(x_BTD), shared)
            return x_BTD + self.dropout(y_BTD), record
        x_BTD = self.mixer_norm(x_BTD + self.dropout(self.mixer(x_BTD, shared, state)))
        y_BTD, record = self.ffn(x_BTD, shared)
        return self.ffn_norm(x_BTD + self.dropout(y_BTD)), record
