"""One layer of any transformer: slots for norms, a token mixer and a feed-forward network, in one of three layouts."""

from typing import Literal

import torch
from torch import nn

from model.mixers.base import Mixer, MixerInput, MixerState

Layout = Literal["pre", "post", "parallel"]


class Block(nn.Module):
    """pre:      x + mixer(norm x), then x + ffn(norm x)      (GPT-2, LLaMA)
    post:     norm(x + mixer x), then norm(x + ffn x)      (Vaswani et al. 2017, BERT)
    parallel: x + mixer(norm x) + ffn(norm x)              (GPT-J, PaLM; one norm, so `ffn_norm` is None)

    Without an ffn its branch and norm are left out of each (Mamba: x + mixer(norm x)).
    """

    def __init__(
        self,
        *,
        layout: Layout,
        mixer_norm: nn.Module,
        mixer: Mixer,
        ffn_norm: nn.Module | None,
        ffn: nn.Module | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.ffn_norm = ffn_norm
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        if self.layout == "parallel":
            normed_BTD = self.mixer_norm(x_BTD)
            mixed_BTD = self.mixer(normed_BTD, shared, state)
            return x_BTD + self.dropout(mixed_BTD if self.ffn is None else mixed_BTD + self.ffn(normed_BTD))
        if self.layout == "pre":
            x_BTD = x_BTD + self.dropout(self.mixer(self.mixer_norm(x_BTD), shared, state))
            if self.ffn is None or self.ffn_norm is None:
                return x_BTD
            return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        x_BTD = self.mixer_norm(x_BTD + self.dropout(self.mixer(x_BTD, shared, state)))
        if self.ffn is None or self.ffn_norm is None:
            return x_BTD
        return self.ffn_norm(x_BTD + self.dropout(self.ffn(x_BTD)))
