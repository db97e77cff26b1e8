"""Multi-head attention with shared key/value heads (Vaswani et al. 2017; Shazeer 2019; Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from conf.refusal import Refusal
from model.decoding.joined import Joins
from model.init import Linear, Parameter, declare
from model.kernels.attention import AttentionKernel
from model.limits import check_counts
from model.masks import Mask
from model.mixers.base import Mixer, MixerConfig, MixerInput, MixerState, PositionedHeads
from model.norms.norm import NormConfig, build_norm
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Multi-head attention, with shared key and value heads or without."""

    crosses: ClassVar[bool] = True

    kind: Literal["attention"] = "attention"
    """Which part this is."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads; null: one for every query head; 1: multi-query."""
    head_dim: int | None = None
    """Channels of a head; null: d_model / n_heads."""
    qkv_bias: bool = False
    """Queries, keys and values have offsets."""
    k_bias: bool | None = None
    """Keys have offsets; null: as qkv_bias says (Whisper's have none)."""
    out_bias: bool = False
    """The output has an offset."""
    qk_norm: bool = False
    """Queries and keys are normalised per head before rotation (Qwen3)."""
    window: int | None = None
    """Tokens back that a query sees, itself included, and as many ahead where all see all; null: all (Mistral,
    https://arxiv.org/abs/2310.06825)."""
    scaled: bool = True
    """Scores are divided by the square root of a head's channels; T5 leaves that to the start of its weights."""

    def __post_init__(self) -> None:
        check_counts(self, "n_heads")
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise Refusal(
                "n_kv_heads",
                self.n_kv_heads,
                (
                    f"with n_heads {self.n_heads}: query heads share key/value heads in equal groups, so "
                    "n_kv_heads must divide n_heads"
                ),
            )
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise Refusal("head_dim", self.head_dim, "rotary halves need an even number of channels")
        if self.window is not None and self.window < 1:
            raise Refusal("window", self.window, "it counts the token itself, so the smallest is 1", "null sees all")

    @property
    def kv_heads(self) -> int:
        """How many key/value heads there are."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def biased_keys(self) -> bool:
        """Whether keys have an offset."""
        return self.qkv_bias if self.k_bias is None else self.k_bias

    def channels(self, d_model: int) -> int:
        """Channels of one head."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim

    def check(self, model: ModelConfig) -> None:
        if self.head_dim is None and model.d_model % self.n_heads:
            raise Refusal(
                "d_model",
                model.d_model,
                f"with mixer.n_heads {self.n_heads}: heads share the width equally, so n_heads must divide d_model",
                "change one of them or set mixer.head_dim",
            )

    def positioned_heads(self, d_model: int) -> PositionedHeads:
        return PositionedHeads(self.n_heads, self.channels(d_model))

    def reach(self) -> int | None:
        return self.window

    def build(self, d_model: int, norm: NormConfig, attend: AttentionKernel) -> Attention:
        return Attention(self, d_model, norm, attend)

    def build_cross(self, d_model: int, d_memory: int, norm: NormConfig, attend: AttentionKernel) -> CrossAttention:
        return CrossAttention(self, d_model, norm, attend, d_memory)

    def cross_costs(self, d_model: int, d_memory: int, norm: NormConfig) -> SlotCosts:
        """The same between a decoder and its encoder's output, whose tokens are multiplied with k and v."""
        channels = self.channels(d_model)
        heads, kv_heads = self.n_heads * channels, self.kv_heads * channels
        own = self.costs(d_model, norm)
        return SlotCosts(
            parameters=own.parameters + (d_memory - d_model) * 2 * kv_heads,
            matrices=2 * d_model * heads,
            memory_matrices=2 * d_memory * kv_heads,
            memory_pair_flops=own.pair_flops,
            kept_elements=(3 if self.qk_norm else 2) * heads,
            kept_bytes=own.kept_bytes,
            memory_kept_elements=own.kept_elements - (3 if self.qk_norm else 2) * heads,
            state_per_memory_token=own.state_per_token,
        )

    def costs(self, d_model: int, norm: NormConfig) -> SlotCosts:
        """q, k, v and the output; two products of C channels for each query-key pair and head."""
        channels = self.channels(d_model)
        heads, kv_heads = self.n_heads * channels, self.kv_heads * channels
        matrices = d_model * (2 * heads + 2 * kv_heads)
        biases = (heads + kv_heads if self.qkv_bias else 0) + (d_model if self.out_bias else 0)
        biases += kv_heads if self.biased_keys else 0
        copies = 3 if self.qk_norm else 2
        return SlotCosts(
            parameters=matrices + biases + (2 * norm.parameters(channels) if self.qk_norm else 0),
            matrices=matrices,
            pair_flops=4 * heads,
            window=self.window,
            kept_elements=copies * (heads + kv_heads),
            kept_bytes=4 * self.n_heads,
            state_per_token=2 * kv_heads,
        )


class KeyValueState(MixerState):
    """Keys and values of every token so far, in slots allocated once; stored head by head, as products read them."""

    def __init__(self, k_BKSC: torch.Tensor, v_BKSC: torch.Tensor) -> None:
        self.k_BKSC = k_BKSC
        self.v_BKSC = v_BKSC

    def append(self, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, shared: MixerInput) -> None:
        """Write the keys and values of new tokens into the slots that `shared` names."""
        assert shared.slots_BT is not None
        for state_BKSC, new_BTKC in ((self.k_BKSC, k_BTKC), (self.v_BKSC, v_BTKC)):
            if shared.common_slot is not None:  # a plain copy takes a quarter of the time of an indexed one
                end = shared.common_slot + new_BTKC.shape[1]
                state_BKSC[:, :, shared.common_slot : end] = new_BTKC.transpose(1, 2)
            else:
                rows_B1 = torch.arange(new_BTKC.shape[0], device=new_BTKC.device)[:, None]
                state_BKSC[rows_B1, :, shared.slots_BT] = new_BTKC.to(state_BKSC.dtype)

    def begin(self, k_KSC: torch.Tensor, v_KSC: torch.Tensor) -> None:
        """Fill the first slots of every row with the same keys and values."""
        self.k_BKSC[:, :, : k_KSC.shape[1]] = k_KSC
        self.v_BKSC[:, :, : v_KSC.shape[1]] = v_KSC

    def first(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_BSKC and v_BSKC of the first slots."""
        return self.k_BKSC[:, :, :slots].transpose(1, 2), self.v_BKSC[:, :, :slots].transpose(1, 2)

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.k_BKSC = self.k_BKSC[rows_B]
        self.v_BKSC = self.v_BKSC[rows_B]


class Attention(Mixer, Joins):
    """softmax(q kᵀ / sqrt(C)) v over what the mask lets each token see."""

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        norm: NormConfig,
        kernel: AttentionKernel,
        d_memory: int | None = None,
    ) -> None:
        """d_memory: the width of what keys and values are made of, where it is not d_model."""
        super().__init__()
        d_memory = d_model if d_memory is None else d_memory
        self.heads = config.n_heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.channels(d_model)
        self.scale = self.head_dim**-0.5 if config.scaled else 1.0
        self.window = config.window
        self.kernel = kernel
        self.q = Linear(d_model, self.heads * self.head_dim, bias=config.qkv_bias)
        if not config.scaled:  # then the queries start as small as scaling would make them
            weight = Parameter("matrix", "weight", gain=self.head_dim**-0.5)
            self.q.declared = {**self.q.declared, **declare(weight=weight)}
        self.k = Linear(d_memory, self.kv_heads * self.head_dim, bias=config.biased_keys)
        self.v = Linear(d_memory, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.out = Linear(self.heads * self.head_dim, d_model, bias=config.out_bias, residual=True)
        self.q_norm = build_norm(norm, self.head_dim) if config.qk_norm else None
        self.k_norm = build_norm(norm, self.head_dim) if config.qk_norm else None

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        return self.out(self.attended(x_BTD, shared, state).flatten(2))

    def attended(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None) -> torch.Tensor:
        """out_BTHC: what every head gathers, before the output projection."""
        q_BTHC, k_BTKC, v_BTKC = self._project(x_BTD, shared)
        if state is not None:
            assert isinstance(state, KeyValueState)
            state.append(k_BTKC, v_BTKC, shared)
            if shared.mask.slots_BT is not None:  # else nothing came before, and what was just computed is all there is
                k_BTKC, v_BTKC = state.first(shared.mask.keys)
        return self.kernel(q_BTHC, k_BTKC, v_BTKC, self.mask(shared, x_BTD.shape[1]), self.scale)

    def mask(self, shared: MixerInput, tokens: int) -> Mask:
        """Who sees whom in this layer, in rows of so many tokens."""
        return shared.mask_within(self.window)

    def _project(self, x_BTD: torch.Tensor, shared: MixerInput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q_BTHC, k_BTKC and v_BTKC, normalised and rotated where the model does that."""
        rows, tokens, _ = x_BTD.shape
        if self.joined is not None:
            all_BTHC = self.joined(x_BTD).view(rows, tokens, -1, self.head_dim)
            if self.q_norm is None and shared.rotation is not None:
                turned = self.heads + self.kv_heads
                turned_BTHC = shared.rotation(all_BTHC[:, :, :turned])
                return turned_BTHC[:, :, : self.heads], turned_BTHC[:, :, self.heads :], all_BTHC[:, :, turned:]
            q_BTHC, k_BTKC, v_BTKC = all_BTHC.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        else:
            q_BTHC = self.q(x_BTD).view(rows, tokens, self.heads, self.head_dim)
            k_BTKC = self.k(x_BTD).view(rows, tokens, self.kv_heads, self.head_dim)
            v_BTKC = self.v(x_BTD).view(rows, tokens, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        if shared.rotation is not None:
            q_BTHC, k_BTKC = shared.rotation(q_BTHC), shared.rotation(k_BTKC)
        return q_BTHC, k_BTKC, v_BTKC

    def joinable(self) -> Sequence[nn.Module]:
        """Queries, keys and values read the same input."""
        return self.q, self.k, self.v

    def new_state(self, rows: int, max_tokens: int) -> MixerState:
        shape = (rows, self.kv_heads, max_tokens, self.head_dim)
        return KeyValueState(self.k.like.new_zeros(shape), self.k.like.new_zeros(shape))


class MemoryState(MixerState):
    """Keys and values of an encoder's output: made in the first pass, read in all later ones."""

    def __init__(self) -> None:
        self.k_BSKC: torch.Tensor | None = None
        self.v_BSKC: torch.Tensor | None = None

    def reorder(self, rows_B: torch.Tensor) -> None:
        if self.k_BSKC is not None and self.v_BSKC is not None:
            self.k_BSKC, self.v_BSKC = self.k_BSKC[rows_B], self.v_BSKC[rows_B]


class CrossAttention(Attention):
    """Queries of the decoder, keys and values of its encoder's output (Vaswani et al. 2017, section 3.2.3)."""

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        """Attend to `shared.memory_BSD`, whose keys and values the state then holds; to those where it is null."""
        rows, tokens, _ = x_BTD.shape
        q_BTHC = self.q(x_BTD).view(rows, tokens, self.heads, self.head_dim)
        if self.q_norm is not None:
            q_BTHC = self.q_norm(q_BTHC)
        k_BSKC, v_BSKC = self._remembered(shared, state)
        assert shared.memory_mask is not None
        out_BTHC = self.kernel(q_BTHC, k_BSKC, v_BSKC, shared.memory_mask, self.scale)
        return self.out(out_BTHC.reshape(rows, tokens, self.heads * self.head_dim))

    def joinable(self) -> Sequence[nn.Module]:
        return ()  # the queries read another input than keys and values

    def _remembered(self, shared: MixerInput, state: MixerState | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the encoder's output, or those that the state holds of it."""
        memory_BSD = shared.memory_BSD
        if memory_BSD is None:
            assert isinstance(state, MemoryState) and state.k_BSKC is not None and state.v_BSKC is not None
            return state.k_BSKC, state.v_BSKC
        shape = (memory_BSD.shape[0], memory_BSD.shape[1], self.kv_heads, self.head_dim)
        k_BSKC, v_BSKC = self.k(memory_BSD).view(shape), self.v(memory_BSD).view(shape)
        if self.k_norm is not None:
            k_BSKC = self.k_norm(k_BSKC)
        if isinstance(state, MemoryState):
            state.k_BSKC, state.v_BSKC = k_BSKC, v_BSKC
        return k_BSKC, v_BSKC

    def new_state(self, rows: int, max_tokens: int) -> MixerState:
        return MemoryState()
