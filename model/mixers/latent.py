"""Multi-head latent attention: keys and values of all heads from one narrow vector, which is all a cache remembers
(DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from conf.refusal import Refusal
from model.init import Linear
from model.kernels.attention import AttentionKernel
from model.limits import check_counts
from model.mixers.base import Mixer, MixerConfig, MixerInput, MixerState, PositionedHeads
from model.norms.norm import NormConfig, build_norm
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(MixerConfig):
    """Attention whose keys and values are made of one narrow vector (DeepSeek-V2)."""

    kind: Literal["latent"] = "latent"
    """Which part this is."""
    n_heads: int = 8
    """Heads."""
    q_rank: int | None = None
    """Width of the latent vector of queries; null: made of x itself."""
    kv_rank: int = 128
    """Width of the latent vector of keys and values."""
    plain_dim: int = 32
    """Channels of a head's queries and keys without a position."""
    rope_dim: int = 16
    """Channels that rotary positions turn; such keys are one vector for all heads."""
    v_dim: int = 32
    """Channels of a head's values."""
    bias: bool = False
    """Maps from x to the latents, and the output, have offsets."""
    eps: float = 1e-6
    """Of the latents' norms, whatever the model's norms have."""

    def __post_init__(self) -> None:
        check_counts(self, "n_heads", "q_rank", "kv_rank", "plain_dim", "rope_dim", "v_dim")
        if self.rope_dim % 2:
            raise Refusal("rope_dim", self.rope_dim, "pairs of channels are turned", "make it even")

    @property
    def key_dim(self) -> int:
        """Channels of a head's queries and keys."""
        return self.plain_dim + self.rope_dim

    def positioned_heads(self, d_model: int) -> PositionedHeads:
        return PositionedHeads(self.n_heads, self.rope_dim)

    def check(self, model: ModelConfig) -> None:
        """Every width will do."""

    def build(self, d_model: int, norm: NormConfig, attend: AttentionKernel) -> LatentAttention:
        return LatentAttention(self, d_model, norm, attend)

    def costs(self, d_model: int, norm: NormConfig) -> SlotCosts:
        """The maps to the latents and from them, the output; two products for each query-key pair and head."""
        heads = self.n_heads
        queries, keys_values = heads * self.key_dim, heads * (self.plain_dim + self.v_dim)
        read = d_model if self.q_rank is None else self.q_rank
        down = d_model * (self.kv_rank + self.rope_dim) + (0 if self.q_rank is None else d_model * self.q_rank)
        matrices = down + read * queries + self.kv_rank * keys_values + heads * self.v_dim * d_model
        biases = (self.q_rank or 0) + self.kv_rank + self.rope_dim + d_model if self.bias else 0
        norms = norm.parameters(self.kv_rank) + (0 if self.q_rank is None else norm.parameters(self.q_rank))
        # The latents before and after their norms; queries, keys and values; keys and queries once more, put together.
        kept = 2 * self.kv_rank + 2 * (self.q_rank or 0) + self.rope_dim
        kept += 2 * queries + keys_values + heads * self.v_dim
        return SlotCosts(
            parameters=matrices + biases + norms,
            matrices=matrices,
            pair_flops=2 * heads * (self.key_dim + self.v_dim),
            kept_elements=kept,
            kept_bytes=4 * heads,
            state_per_token=self.kv_rank + self.rope_dim,
        )


class LatentState(MixerState):
    """The latent vector of every token so far, and behind it the key that has its position."""

    def __init__(self, latent_BSR: torch.Tensor) -> None:
        self.latent_BSR = latent_BSR

    def append(self, new_BTR: torch.Tensor, shared: MixerInput) -> None:
        """Write the latents of new tokens into the slots that `shared` names."""
        assert shared.slots_BT is not None
        if shared.common_slot is not None:
            self.latent_BSR[:, shared.common_slot : shared.common_slot + new_BTR.shape[1]] = new_BTR
        else:
            rows_B1 = torch.arange(new_BTR.shape[0], device=new_BTR.device)[:, None]
            self.latent_BSR[rows_B1, shared.slots_BT] = new_BTR.to(self.latent_BSR.dtype)

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.latent_BSR = self.latent_BSR[rows_B]


class LatentAttention(Mixer):
    """softmax(q kᵀ / sqrt(C)) v, where k and v are maps of a latent vector."""

    def __init__(self, config: LatentAttentionConfig, d_model: int, norm: NormConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        norm = replace(norm, eps=config.eps)
        self.config = config
        self.heads = self.kv_heads = config.n_heads
        self.head_dim = max(config.key_dim, config.v_dim)
        self.scale = config.key_dim**-0.5
        self.window: int | None = None
        self.kernel = kernel
        queries, rank = self.heads * config.key_dim, config.q_rank
        self.q = Linear(d_model, queries) if rank is None else None
        self.q_down = None if rank is None else Linear(d_model, rank, bias=config.bias)
        self.q_norm = None if rank is None else build_norm(norm, rank)
        self.q_up = None if rank is None else Linear(rank, queries)
        self.kv_down = Linear(d_model, config.kv_rank + config.rope_dim, bias=config.bias)
        self.kv_norm = build_norm(norm, config.kv_rank)
        self.kv = Linear(config.kv_rank, self.heads * (config.plain_dim + config.v_dim))
        self.out = Linear(self.heads * config.v_dim, d_model, bias=config.bias, residual=True)

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        """Behind remembered tokens by their latents (`_remembered`), else by the keys and values of every head."""
        q_BTHC, latent_BTR = self._queries(x_BTD, shared), self._latents(x_BTD, shared)
        if state is not None:
            assert isinstance(state, LatentState)
            state.append(latent_BTR, shared)
            if shared.mask.slots_BT is not None:  # else nothing came before
                latent_BSR = state.latent_BSR[:, : shared.mask.keys]
                return self.out(self._remembered(q_BTHC, latent_BSR, shared).flatten(2))
        return self.out(self._attended(q_BTHC, latent_BTR, shared).flatten(2))

    def _queries(self, x_BTD: torch.Tensor, shared: MixerInput) -> torch.Tensor:
        """q_BTHC of every head, its last channels turned."""
        if self.q_down is not None and self.q_norm is not None and self.q_up is not None:
            q_BTHC = self.q_up(self.q_norm(self.q_down(x_BTD))).unflatten(-1, (self.heads, -1))
        else:
            assert self.q is not None
            q_BTHC = self.q(x_BTD).unflatten(-1, (self.heads, -1))
        if shared.rotation is None:
            return q_BTHC
        plain = self.config.plain_dim
        return torch.cat((q_BTHC[..., :plain], shared.rotation(q_BTHC[..., plain:])), dim=-1)

    def _latents(self, x_BTD: torch.Tensor, shared: MixerInput) -> torch.Tensor:
        """latent_BTR: what keys and values are made of, and behind it the key of all heads, turned."""
        sizes = (self.config.kv_rank, self.config.rope_dim)
        low_BTR, key_BTC = self.kv_down(x_BTD).split(sizes, dim=-1)
        if shared.rotation is not None:
            key_BTC = shared.rotation(key_BTC[:, :, None])[:, :, 0]
        return torch.cat((self.kv_norm(low_BTR), key_BTC), dim=-1)

    def _attended(self, q_BTHC: torch.Tensor, latent_BSR: torch.Tensor, shared: MixerInput) -> torch.Tensor:
        """out_BTHC by keys and values of every head."""
        config = self.config
        low_BSR, key_BSC = latent_BSR.split((config.kv_rank, config.rope_dim), dim=-1)
        both_BSHC = self.kv(low_BSR).unflatten(-1, (self.heads, -1))
        plain_BSHC, v_BSHC = both_BSHC.split((config.plain_dim, config.v_dim), dim=-1)
        turned_BSHC = key_BSC[:, :, None].expand(-1, -1, self.heads, -1)
        k_BSHC = torch.cat((plain_BSHC, turned_BSHC), dim=-1)
        return self.kernel(q_BTHC, k_BSHC, v_BSHC, shared.mask, self._scale(shared))

    def _remembered(self, q_BTHC: torch.Tensor, latent_BSR: torch.Tensor, shared: MixerInput) -> torch.Tensor:
        """The same while decoding, where making keys and values of all that is remembered would cost most: q (W c) is
        (Wᵀ q) c, so queries and outputs go through the maps instead, and the latents are one key and value for all."""
        if torch.is_grad_enabled() or type(self.kv) is not Linear:  # a map with an adapter is more than its weight
            return self._attended(q_BTHC, latent_BSR, shared)
        config = self.config
        maps_HCR = self.kv.weight.unflatten(0, (self.heads, -1))
        to_key_HCR, to_value_HCR = maps_HCR.split((config.plain_dim, config.v_dim), dim=1)
        plain_BTHC, turned_BTHC = q_BTHC.split((config.plain_dim, config.rope_dim), dim=-1)
        q_BTHR = torch.cat((torch.einsum("bthc,hcr->bthr", plain_BTHC, to_key_HCR), turned_BTHC), dim=-1)
        key_BS1R, value_BS1R = latent_BSR[:, :, None], latent_BSR[:, :, None, : config.kv_rank]
        out_BTHR = self.kernel(q_BTHR, key_BS1R, value_BS1R, shared.mask, self._scale(shared))
        return torch.einsum("bthr,hcr->bthc", out_BTHR, to_value_HCR)

    def _scale(self, shared: MixerInput) -> float:
        return self.scale if shared.rotation is None else self.scale * shared.rotation.sharpness

    def new_state(self, rows: int, max_tokens: int) -> LatentState:
        width = self.config.kv_rank + self.config.rope_dim
        return LatentState(self.kv_down.like.new_zeros(rows, max_tokens, width))
