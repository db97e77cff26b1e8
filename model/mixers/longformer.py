"""Longformer's attention: a window, and global tokens that look through projections of their own (Beltagy et al. 2020,
https://arxiv.org/abs/2004.05150)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from conf.refusal import Refusal
from model.init import Linear
from model.kernels.attention import AttentionKernel
from model.masks import Mask
from model.mixers.attention import Attention, AttentionConfig
from model.mixers.base import MixerConfig, MixerInput, MixerState, refuse_encoder_only
from model.norms.norm import NormConfig
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LongformerConfig(MixerConfig):
    """A window, and global tokens with projections of their own, which are said with each batch (`globals_BT`).

    The papers' windows are even, of `2 * (window - 1)` neighbours.
    """

    drops_bias: ClassVar[bool] = True

    kind: Literal["longformer"] = "longformer"
    """Which part this is."""
    n_heads: int = 8
    """Heads."""
    window: int = 257
    """Tokens to each side that a token sees, itself included in both."""

    def __post_init__(self) -> None:
        if self.window < 2:
            raise Refusal("window", self.window, "below 2 a token has no neighbours to see", "use 257")
        self.attention  # noqa: B018 - refuses what no attention can be

    @property
    def attention(self) -> AttentionConfig:
        """The same as ordinary attention within the window."""
        return AttentionConfig(n_heads=self.n_heads, qkv_bias=True, out_bias=True, window=self.window)

    @property
    def neighbours(self) -> int:
        """How many other tokens the window holds."""
        return 2 * (self.window - 1)

    def check(self, model: ModelConfig) -> None:
        self.attention.check(model)
        refuse_encoder_only(self.kind, model)

    def reach(self) -> int:
        return self.window

    def build(self, d_model: int, norm: NormConfig, attend: AttentionKernel) -> LongformerAttention:
        return LongformerAttention(self, d_model, norm, attend)

    def costs(self, d_model: int, norm: NormConfig) -> SlotCosts:
        """Those of attention, and every token's global key and value; the few global queries are not counted."""
        own = self.attention.costs(d_model, norm)
        return replace(
            own,
            parameters=own.parameters + 3 * (d_model * d_model + d_model),
            matrices=own.matrices + 2 * d_model * d_model,
            kept_elements=own.kept_elements + 2 * d_model,
        )


class LongformerAttention(Attention):
    """Everyone sees the window and the global tokens; these see everyone, by projections of their own.

    Nothing about the parameters depends on the data: a row without global tokens computes one and does not use it.
    """

    def __init__(self, config: LongformerConfig, d_model: int, norm: NormConfig, kernel: AttentionKernel) -> None:
        super().__init__(config.attention, d_model, norm, kernel)
        self.global_q = Linear(d_model, self.heads * self.head_dim, bias=True)
        self.global_k = Linear(d_model, self.heads * self.head_dim, bias=True)
        self.global_v = Linear(d_model, self.heads * self.head_dim, bias=True)

    def attended(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None) -> torch.Tensor:
        """What global tokens gather replaces what the window gives them."""
        local_BTHC = super().attended(x_BTD, shared, state)
        mask, shape = shared.mask, local_BTHC.shape
        places_BA, which_BT, global_BT = mask.lowered("global tokens", lambda: _global_tokens(mask, shape, x_BTD))
        rows_B1 = torch.arange(shape[0], device=x_BTD.device)[:, None]
        q_BAHC = self.global_q(x_BTD[rows_B1, places_BA]).unflatten(-1, shape[2:])
        k_BTHC, v_BTHC = (project(x_BTD).view(shape) for project in (self.global_k, self.global_v))
        all_BT = torch.ones(shape[:2], dtype=torch.int32, device=x_BTD.device)
        documents_BT = all_BT if mask.documents_BT is None else mask.documents_BT
        of_global_BA = documents_BT[rows_B1, places_BA].masked_fill(~global_BT[rows_B1, places_BA], 0)
        seen = Mask(causal=False, documents_BT=of_global_BA, key_documents_BS=documents_BT)
        out_BAHC = self.kernel(q_BAHC, k_BTHC, v_BTHC, seen, self.scale)
        return torch.where(global_BT[..., None, None], out_BAHC[rows_B1, which_BT], local_BTHC)


def _global_tokens(
    mask: Mask, shape: torch.Size, x_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places of the global tokens of each row (filled up with others), which of them each token is, and whether."""
    nowhere_BT = torch.zeros(shape[:2], dtype=torch.bool, device=x_BTD.device)
    global_BT = nowhere_BT if mask.globals_BT is None else mask.globals_BT
    most = max(1, int(global_BT.sum(1).max()))
    places_BA = global_BT.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return places_BA, (global_BT.cumsum(1) - 1).clamp(0, most - 1), global_BT
