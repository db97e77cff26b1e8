"""DALL-E's attention: all of the text, and of the image a row, a column or a neighbourhood (Ramesh et al. 2021,
https://arxiv.org/abs/2102.12092, appendix B.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from conf.refusal import NO_VALUE, Refusal, field
from model.kernels.attention import AttentionKernel
from model.masks import Mask
from model.mixers.attention import Attention, AttentionConfig
from model.mixers.base import MixerConfig, MixerInput, refuse_decoder_only
from model.norms.norm import NormConfig
from model.positions.grid import Grid
from model.slots import SlotCosts
from model.uncompiled import uncompiled

if TYPE_CHECKING:
    from model.config import ModelConfig

BLOCK = 32
"""Tokens of a block where a kernel goes by blocks."""


@dataclass(frozen=True, kw_only=True)
class GridAttentionConfig(MixerConfig):
    """Attention along the rows, the columns or the squares of an image behind its text.

    The paper has columns in every fourth layer from the second on, a convolution in the last, rows elsewhere. A row is
    one text and its image: it is not packed with others, and padding stands behind it.
    """

    kind: Literal["grid"] = "grid"
    """Which part this is."""
    n_heads: int = 8
    """Heads."""
    pattern: Literal["row", "column", "convolution"] = "row"
    """What of the image a token sees (see `Grid`)."""
    text: int = 256
    """Tokens before the image."""
    width: int = 32
    """Tokens of a row of the image."""
    kernel: int = 11
    """Tokens of a square's side, for convolution."""
    qkv_bias: bool = False
    """Queries, keys and values have offsets."""
    out_bias: bool = False
    """The output has an offset."""

    def __post_init__(self) -> None:
        if self.text < 1 or self.width < 1:
            raise Refusal(
                "text",
                self.text,
                f"and mixer.width {self.width}: a text and a row of an image have tokens",
                "DALL-E's are 256 and 32",
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise Refusal("kernel", self.kernel, "a square around a token has an odd side", "DALL-E's is 11")
        self.attention  # noqa: B018 - refuses what no attention can be

    @property
    def attention(self) -> AttentionConfig:
        """The same as ordinary attention."""
        return AttentionConfig(n_heads=self.n_heads, qkv_bias=self.qkv_bias, out_bias=self.out_bias)

    @property
    def grid(self) -> Grid:
        """The part of the mask that it adds."""
        return Grid(text=self.text, width=self.width, pattern=self.pattern, kernel=self.kernel)

    def image(self) -> Grid:
        return self.grid

    def check(self, model: ModelConfig) -> None:
        self.attention.check(model)
        refuse_decoder_only(self.kind, model)
        if model.position.kind not in ("grid", "learned", "sinusoidal", "none"):
            raise Refusal(
                "position.kind",
                model.position.kind,
                f"with {field('mixer.kind')}=grid, where a distance says little: choose grid, or learned",
            )

    def build(self, d_model: int, norm: NormConfig, attend: AttentionKernel) -> GridAttention:
        return GridAttention(self, d_model, norm, attend)

    def costs(self, d_model: int, norm: NormConfig) -> SlotCosts:
        """Those of attention, over fewer pairs."""
        return replace(self.attention.costs(d_model, norm), pattern=self.grid)


class GridAttention(Attention):
    """Attention under a grid. Raises Refusal for a row with several documents or padding before its end."""

    def __init__(self, config: GridAttentionConfig, d_model: int, norm: NormConfig, kernel: AttentionKernel) -> None:
        super().__init__(config.attention, d_model, norm, kernel)
        self.grid = config.grid

    def mask(self, shared: MixerInput, tokens: int) -> Mask:
        """The grid besides what the model says; made once for all layers of one pattern.

        Raises Refusal for prefixes, global tokens, and rows of several documents.
        """
        mask = shared.mask

        def lower() -> Mask:
            if mask.prefix_B is not None or mask.globals_BT is not None:
                raise Refusal(
                    "model",
                    NO_VALUE,
                    "prefix_B or globals_BT was given, and mixer.kind is grid, which says what is seen",
                    "leave them out",
                )
            if mask.documents_BT is not None:
                _refuse_packed(mask.documents_BT)
            return replace(mask, grid=self.grid, block=BLOCK)

        of_layers_alike: Mask = mask.lowered(self.grid, lower)
        return of_layers_alike


@uncompiled
def _refuse_packed(documents_BT: torch.Tensor) -> None:
    before_BT, after_BT = documents_BT[:, :-1], documents_BT[:, 1:]
    if ((before_BT != after_BT) & (after_BT != 0)).any():
        raise Refusal(
            "model",
            NO_VALUE,
            (
                "documents_BT has rows of several documents, or padding before the end, and mixer.kind is"
                " grid: a row is one text and its image"
            ),
            "give each a row, and pad behind it",
        )
