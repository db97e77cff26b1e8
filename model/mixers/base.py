"""What a block asks of its token mixer, whatever the mixer is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from conf.refusal import NO_VALUE, Refusal
from conf.refusal import field as key
from conf.registry import Registry
from model.init import Declared
from model.masks import Mask
from model.positions.base import Rotation
from model.positions.grid import Grid
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.kernels.attention import AttentionKernel
    from model.norms.norm import NormConfig


class PositionedHeads(NamedTuple):
    """Heads that positions act on, by rotation or by a bias on their scores: how many, and the channels of each that can
    be rotated."""

    heads: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """What mixes tokens; each kind has a `kind` of its own and overrides what it does.

    drops_bias: it attends, and adds no bias by distance. crosses: a decoder's cross-attention takes its shape.
    """

    kinds: ClassVar[Registry] = Registry(
        "mixers",
        {
            "attention": "model.mixers.attention:AttentionConfig",
            "latent": "model.mixers.latent:LatentAttentionConfig",
            "longformer": "model.mixers.longformer:LongformerConfig",
            "bigbird": "model.mixers.bigbird:BigBirdConfig",
            "grid": "model.mixers.grid:GridAttentionConfig",
            "linear_attention": "model.mixers.linear_attention:LinearAttentionConfig",
            "mamba": "model.mixers.mamba:MambaConfig",
        },
    )

    kind: str
    """Which part this is."""
    drops_bias: ClassVar[bool] = False
    crosses: ClassVar[bool] = False

    @abstractmethod
    def check(self, model: ModelConfig) -> None:
        """Raises Refusal where it cannot stand in a layer of that model."""

    @abstractmethod
    def costs(self, d_model: int, norm: NormConfig) -> SlotCosts:
        """Closed forms of one layer's."""

    @abstractmethod
    def build(self, d_model: int, norm: NormConfig, attend: AttentionKernel) -> Mixer:
        """The mixer of a stack of width `d_model`; `attend` is the kernel of those that attend."""

    def cross_costs(self, d_model: int, d_memory: int, norm: NormConfig) -> SlotCosts:
        """Of the same between a decoder and its encoder's output of width `d_memory`, where it `crosses`."""
        raise NotImplementedError(self.kind)

    def build_cross(self, d_model: int, d_memory: int, norm: NormConfig, attend: AttentionKernel) -> Mixer:
        """That cross-attention, where it `crosses`."""
        raise NotImplementedError(self.kind)

    def kernel_line(self) -> str | None:
        """What a log says of the kernels that it chose for itself."""
        return None

    def positioned_heads(self, d_model: int) -> PositionedHeads | None:
        """Heads that rotary positions and biases act on; null where there are none."""
        return None

    def reach(self) -> int | None:
        """How many tokens back it sees, itself included; null where no window bounds it."""
        return None

    def image(self) -> Grid | None:
        """The grid that it sees its row as, if it does."""
        return None


def refuse_encoder_only(kind: str, model: ModelConfig) -> None:
    """Raises Refusal in a causal model, for mixers with global tokens."""
    if model.causal:
        raise Refusal(
            "causal",
            True,
            (
                f"with {key('mixer.kind')}={kind}, whose global tokens see what is ahead: set "
                f"{key('causal')}=false, or take {key('mixer.kind')}=attention with a window"
            ),
        )


def refuse_decoder_only(kind: str, model: ModelConfig) -> None:
    """Raises Refusal in a model that is not causal, for mixers that cannot look ahead."""
    if not model.causal:
        raise Refusal(
            "causal",
            False,
            (
                f"with {key('mixer.kind')}={kind}, which looks back only: set {key('causal')}=true, or"
                " take attention or linear attention"
            ),
        )


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

    def begin(self, k_KSC: torch.Tensor, v_KSC: torch.Tensor) -> None:
        """Remember the same keys and values before the first token of every row (a learned prefix)."""
        raise Refusal(
            "model",
            NO_VALUE,
            "a prefix is keys and values, which a layer without attention does not have",
            "leave it out",
        )

    @abstractmethod
    def reorder(self, rows_B: torch.Tensor) -> None:
        """Row i becomes what row `rows_B[i]` was (beam search, dropping finished rows)."""


class Mixer(Declared):
    """Moves information between the tokens of a row: x_BTD -> y_BTD.

    number: how many mixers of the same class stand before it in the stack, for those that draw at random.
    """

    number = 0

    @abstractmethod
    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        """Mix; with a state, continue from it and leave it updated."""

    @abstractmethod
    def new_state(self, rows: int, max_tokens: int) -> MixerState:
        """An empty state for `rows` rows of at most `max_tokens` tokens each."""
