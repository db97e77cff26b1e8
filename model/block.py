"""One layer of any transformer: slots for norms, a token mixer, attention to an encoder's output and a feed-forward
network, in one of four layouts."""

from typing import Literal

import torch
from torch import nn

from model.mixers.base import Mixer, MixerInput, MixerState
from model.slots import Record

Layout = Literal["pre", "post", "parallel", "parallel_two_norms"]


class Block(nn.Module):
    """pre:      x + mixer(norm x), then x + ffn(norm x)      (GPT-2, LLaMA)
    post:     norm(x + mixer x), then norm(x + ffn x)      (Vaswani et al. 2017, BERT)
    parallel: x + mixer(norm x) + ffn(norm x)              (GPT-J, PaLM; one norm, so `ffn_norm` is None)
    parallel_two_norms: the same, the ffn with a norm of its own (GPT-NeoX, Falcon 40B)

    cross: in a decoder that has an encoder, a step of the same form between the two (not in the parallel layouts).
    Returns x_BTD and what the ffn slot records of the pass.
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
        cross_norm: nn.Module | None = None,
        cross: Mixer | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.cross_norm = cross_norm
        self.cross = cross
        self.ffn_norm = ffn_norm
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None
    ) -> tuple[torch.Tensor, Record]:
        """x_BTD after this layer, and what its ffn slot records of the pass. `state` is continued and updated."""
        state, cross_state = (state.mixer, state.cross) if isinstance(state, BlockState) else (state, None)
        if self.layout == "parallel" or self.layout == "parallel_two_norms":
            normed_BTD = self.mixer_norm(x_BTD)
            mixed_BTD = self.mixer(normed_BTD, shared, state)
            if self.ffn is None:
                return x_BTD + self.dropout(mixed_BTD), {}
            y_BTD, record = self.ffn(normed_BTD if self.ffn_norm is None else self.ffn_norm(x_BTD), shared)
            return x_BTD + self.dropout(mixed_BTD + y_BTD), record
        if self.layout == "pre":
            x_BTD = x_BTD + self.dropout(self.mixer(self.mixer_norm(x_BTD), shared, state))
            if self.cross is not None and self.cross_norm is not None:
                x_BTD = x_BTD + self.dropout(self.cross(self.cross_norm(x_BTD), shared, cross_state))
            if self.ffn is None or self.ffn_norm is None:
                return x_BTD, {}
            y_BTD, record = self.ffn(self.ffn_norm(x_BTD), shared)
            return x_BTD + self.dropout(y_BTD), record
        x_BTD = self.mixer_norm(x_BTD + self.dropout(self.mixer(x_BTD, shared, state)))
        if self.cross is not None and self.cross_norm is not None:
            x_BTD = self.cross_norm(x_BTD + self.dropout(self.cross(x_BTD, shared, cross_state)))
        if self.ffn is None or self.ffn_norm is None:
            return x_BTD, {}
        y_BTD, record = self.ffn(x_BTD, shared)
        return self.ffn_norm(x_BTD + self.dropout(y_BTD)), record

    def new_state(self, rows: int, max_tokens: int) -> MixerState:
        """An empty decoding state for `rows` rows of at most `max_tokens` tokens each."""
        state = self.mixer.new_state(rows, max_tokens)
        return state if self.cross is None else BlockState(state, self.cross.new_state(rows, max_tokens))


class BlockState(MixerState):
    """The states of a block with two mixers."""

    def __init__(self, mixer: MixerState, cross: MixerState) -> None:
        self.mixer = mixer
        self.cross = cross

    def begin(self, k_KSC: torch.Tensor, v_KSC: torch.Tensor) -> None:
        self.mixer.begin(k_KSC, v_KSC)

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.mixer.reorder(rows_B)
        self.cross.reorder(rows_B)
