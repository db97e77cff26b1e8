"""What a block asks of its token mixer, whatever the mixer is."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from model.init import Declared
from model.masks import Mask
from model.positions.position import Rotation


@dataclass(frozen=True)
class MixerInput:
    """What every layer of one forward pass shares.

    mask: who sees whom; windowed: the same within each window that some layer has.
    rotation: the angles of rotary positions, where the model has them.
    slots_BT: in cached decoding, where each token is remembered. common_slot: the first, if all rows have the same.
    memory_BSD: an encoder's output, which cross-attention looks at; null once a cache remembers its keys and values.
    memory_mask: which of it each token sees.
    row_keys_B: int64 hash of each row in training, for layers whose noise is a function of the row.
    lengths_B: in cached decoding of rows of unequal length, how many tokens of each are real. What stands behind them
        is padding, which a state that cannot give it back must not take in.
    """

    mask: Mask
    rotation: Rotation | None = None
    slots_BT: torch.Tensor | None = None
    common_slot: int | None = None
    memory_BSD: torch.Tensor | None = None
    memory_mask: Mask | None = None
    windowed: Mapping[int, Mask] = field(default_factory=dict)
    row_keys_B: torch.Tensor | None = None
    lengths_B: torch.Tensor | None = None

    def mask_within(self, window: int | None) -> Mask:
        """The mask of a layer with this window."""
        return self.mask if window is None else self.windowed[window]

    def padding(self, tokens: int) -> torch.Tensor | None:
        """bool [B, T, 1], true behind the end of a row that is shorter than others; none if all are as long."""
        if self.lengths_B is None:
            return None
        return (torch.arange(tokens, device=self.lengths_B.device) >= self.lengths_B[:, None])[..., None]


class MixerState:
    """What one mixer remembers of one batch between decoding steps; its kind decides what that is.

    rewindable: it can forget its last tokens again, because each token has a place of its own.
    """

    rewindable = True

    @abstractmethod
    def reorder(self, rows_B: torch.Tensor) -> None:
        """Row i becomes what row `rows_B[i]` was (beam search, dropping finished rows)."""


class Mixer(Declared):
    """Moves information between the tokens of a row: x_BTD -> y_BTD."""

    @abstractmethod
    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        """Mix; with a state, continue from it and leave it updated."""

    @abstractmethod
    def new_state(self, rows: int, max_tokens: int) -> MixerState:
        """An empty state for `rows` rows of at most `max_tokens` tokens each."""
