"""Multi-head attention with shared key/value heads (Vaswani et al. 2017; Shazeer 2019; Ainslie et al. 2023)."""

from dataclasses import dataclass
from typing import Literal

import torch

from model.errors import ModelError
from model.init import Linear
from model.kernels.attention import AttentionKernel
from model.mixers.base import Mixer, MixerInput, MixerState
from model.norm import NormConfig, build_norm


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """n_kv_heads: null gives every query head its own; 1 is multi-query. head_dim: null is d_model / n_heads.

    qkv_bias and out_bias add offsets; qk_norm normalises queries and keys per head before rotation (Qwen3).
    """

    kind: Literal["attention"] = "attention"
    n_heads: int = 8
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.n_heads < 1:
            raise ModelError(f"mixer.n_heads is {self.n_heads}: attention needs at least one head.")
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ModelError(
                f"mixer.n_kv_heads is {self.n_kv_heads} with n_heads {self.n_heads}: query heads share key/value heads "
                "in equal groups, so n_kv_heads must divide n_heads."
            )
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ModelError(f"mixer.head_dim is {self.head_dim}: rotary halves need an even number of channels.")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def channels(self, d_model: int) -> int:
        """Channels of one head."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim


class KeyValueState(MixerState):
    """Keys and values of every token so far, in slots allocated once."""

    def __init__(self, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor) -> None:
        self.k_BSKC = k_BSKC
        self.v_BSKC = v_BSKC

    def append(self, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, slots_BT: torch.Tensor) -> None:
        rows_B1 = torch.arange(slots_BT.shape[0], device=slots_BT.device)[:, None]
        self.k_BSKC[rows_B1, slots_BT] = k_BTKC
        self.v_BSKC[rows_B1, slots_BT] = v_BTKC

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.k_BSKC = self.k_BSKC[rows_B]
        self.v_BSKC = self.v_BSKC[rows_B]


class Attention(Mixer):
    """softmax(q kᵀ / sqrt(C)) v over what the mask lets each token see."""

    def __init__(self, config: AttentionConfig, d_model: int, norm: NormConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.heads = config.n_heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.channels(d_model)
        self.scale = self.head_dim**-0.5
        self.kernel = kernel
        self.q = Linear(d_model, self.heads * self.head_dim, bias=config.qkv_bias)
        self.k = Linear(d_model, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v = Linear(d_model, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.out = Linear(self.heads * self.head_dim, d_model, bias=config.out_bias, residual=True)
        self.q_norm = build_norm(norm, self.head_dim) if config.qk_norm else None
        self.k_norm = build_norm(norm, self.head_dim) if config.qk_norm else None

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        rows, tokens, _ = x_BTD.shape
        q_BTHC = self.q(x_BTD).view(rows, tokens, self.heads, self.head_dim)
        k_BTKC = self.k(x_BTD).view(rows, tokens, self.kv_heads, self.head_dim)
        v_BTKC = self.v(x_BTD).view(rows, tokens, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        if shared.rotation is not None:
            q_BTHC, k_BTKC = shared.rotation(q_BTHC), shared.rotation(k_BTKC)
        if state is not None:
            assert isinstance(state, KeyValueState)
            assert shared.slots_BT is not None
            state.append(k_BTKC, v_BTKC, shared.slots_BT)
            if shared.slots_in_use > tokens:  # else nothing came before, and what was just computed is all there is
                k_BTKC, v_BTKC = state.k_BSKC[:, : shared.slots_in_use], state.v_BSKC[:, : shared.slots_in_use]
        out_BTHC = self.kernel(q_BTHC, k_BTKC, v_BTKC, shared.mask, self.scale)
        return self.out(out_BTHC.reshape(rows, tokens, self.heads * self.head_dim))

    def new_state(self, rows: int, max_tokens: int) -> KeyValueState:
        shape = (rows, max_tokens, self.kv_heads, self.head_dim)
        return KeyValueState(self.k.weight.new_zeros(shape), self.k.weight.new_zeros(shape))
