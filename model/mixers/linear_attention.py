"""Attention linear in the number of tokens: features of queries and keys take the place of the softmax.

elu + 1 (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236), or the positive orthogonal random features of
Performer, whose products are unbiased estimates of softmax attention's weights (Choromanski et al. 2020,
https://arxiv.org/abs/2009.14794). Features and sums are in fp32 whatever the model's precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal, Shown
from model.init import Declared, Linear, Parameter, declare
from model.kernels.linear_attention import (
    CHUNK,
    bidirectional_linear_attention,
    causal_linear_attention,
    recurrent_linear_attention,
)
from model.limits import check_counts
from model.mixers.base import Mixer, MixerConfig, MixerInput, MixerState
from model.norms.norm import NormConfig
from model.slots import SlotCosts

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.kernels.attention import AttentionKernel

LARGEST_FAVOR_HEAD = 128


@dataclass(frozen=True, kw_only=True)
class EluConfig:
    """elu(x) + 1: as many features as channels."""

    is_random: ClassVar[bool] = False

    kind: Literal["elu"] = "elu"
    """Which part this is."""

    def check(self, channels: int) -> None:
        """Every width of a head will do."""

    def count(self, channels: int) -> int:
        """Features of a head of so many channels."""
        return channels

    def build(self, channels: int) -> nn.Module:
        """(q_BTHC, k_BTHC) -> (q_BTHP, k_BTHP)."""
        return EluFeatures()


@dataclass(frozen=True, kw_only=True)
class FavorConfig:
    """FAVOR+: random features.

    They are drawn once from the model's seed, are not trained, and are stored with the weights: a model trained with
    them means nothing without them, and another version of the generator would draw others.
    """

    is_random: ClassVar[bool] = True

    kind: Literal["favor"] = "favor"
    """Which part this is."""
    n_features: int = 256
    """Random directions that queries and keys are compared along; more come closer to softmax."""

    def __post_init__(self) -> None:
        if self.n_features < 1:
            raise Refusal("n_features", self.n_features, "use at least 1, and better 4 * head_dim")

    def check(self, channels: int) -> None:
        """Raises Refusal for a head too wide."""
        if channels > LARGEST_FAVOR_HEAD:
            raise Refusal(
                "mixer.features.kind",
                Shown("favor"),
                f"with {channels} channels a head its exponentials stay within fp32 up to {LARGEST_FAVOR_HEAD}",
                "use more heads",
            )

    def count(self, channels: int) -> int:
        """Features of a head of so many channels."""
        return self.n_features

    def build(self, channels: int) -> nn.Module:
        """(q_BTHC, k_BTHC) -> (q_BTHP, k_BTHP)."""
        return FavorFeatures(self.n_features, channels)


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(MixerConfig):
    """Features in the place of the softmax: linear time.

    Rotary positions are not applied: features must stay positive. Order is known from learned positions, from other
    layers, or from causality alone.
    """

    kind: Literal["linear_attention"] = "linear_attention"
    """Which part this is."""
    n_heads: int = 8
    """Heads."""
    head_dim: int | None = None
    """Channels of a head; null: d_model / n_heads."""
    qkv_bias: bool = False
    """Queries, keys and values have offsets."""
    out_bias: bool = False
    """The output has an offset."""
    features: EluConfig | FavorConfig = field(default_factory=EluConfig)
    """What replaces the softmax."""

    def __post_init__(self) -> None:
        check_counts(self, "n_heads", "head_dim")

    def channels(self, d_model: int) -> int:
        """Channels of one head."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim

    def n_features(self, d_model: int) -> int:
        """Features of one head."""
        return self.features.count(self.channels(d_model))

    def check(self, model: ModelConfig) -> None:
        if self.head_dim is None and model.d_model % self.n_heads:
            raise Refusal(
                "d_model",
                model.d_model,
                f"with mixer.n_heads {self.n_heads}: heads share the width equally, so n_heads must divide d_model",
                "change one of them or set mixer.head_dim",
            )
        self.features.check(self.channels(model.d_model))

    def build(self, d_model: int, norm: NormConfig, attend: AttentionKernel) -> LinearAttention:
        return LinearAttention(self, d_model)

    def costs(self, d_model: int, norm: NormConfig) -> SlotCosts:
        """Four projections; in `token_flops` features and, as the recurrence defines it, the state's update and reading.

        The chunked form does 2 · CHUNK · (features + channels + 1) FLOPs more for each token and head.
        """
        channels, features = self.channels(d_model), self.n_features(d_model)
        heads = self.n_heads * channels
        matrices = 4 * d_model * heads
        biases = (3 * heads if self.qkv_bias else 0) + (d_model if self.out_bias else 0)
        random = features * channels if self.features.is_random else 0
        # Of each head in fp32: what features are made from, they and their layouts by chunk, values and sums with their
        # denominators, scores within the chunk, and its share of the state.
        kept = (channels + 4 * features) if random else (4 * channels + channels // 2 + 2 * features)
        kept += 2 * (channels + 1) + CHUNK + features * (channels + 1) // CHUNK + 1
        return SlotCosts(
            parameters=matrices + biases + random,
            matrices=matrices,
            kept_elements=heads,
            kept_bytes=4 * self.n_heads * kept,
            token_flops=self.n_heads * (4 * features * (channels + 1) + 4 * random),
            state_bytes=4 * self.n_heads * features * (channels + 1),
        )


class LinearState(MixerState):
    """Σ features ⊗ values of all tokens so far in fp32, and of ones beside the values: as large after a million tokens."""

    rewindable = False

    def __init__(self, sum_BHPC: torch.Tensor) -> None:
        self.sum_BHPC = sum_BHPC

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.sum_BHPC = self.sum_BHPC[rows_B]


class LinearAttention(Mixer):
    """Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s) over what token t may see."""

    def __init__(self, config: LinearAttentionConfig, d_model: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_heads, config.channels(d_model)
        self.n_features = config.n_features(d_model)
        self.q = Linear(d_model, self.heads * self.head_dim, bias=config.qkv_bias)
        self.k = Linear(d_model, self.heads * self.head_dim, bias=config.qkv_bias)
        self.v = Linear(d_model, self.heads * self.head_dim, bias=config.qkv_bias)
        self.features = config.features.build(self.head_dim)
        self.out = Linear(self.heads * self.head_dim, d_model, bias=config.out_bias, residual=True)

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput, state: MixerState | None = None) -> torch.Tensor:
        """Features and their sums are fp32 whatever the precision of x_BTD. Raises Refusal for a prefix."""
        rows, tokens, _ = x_BTD.shape
        heads = (rows, tokens, self.heads, self.head_dim)
        q_BTHC, k_BTHC, v_BTHC = (part(x_BTD).view(heads) for part in (self.q, self.k, self.v))
        with torch.autocast(x_BTD.device.type, enabled=False):
            q_BTHP, k_BTHP = self.features(q_BTHC.float(), k_BTHC.float())
            out_BTHC = self._mixed(q_BTHP, k_BTHP, nn.functional.pad(v_BTHC.float(), (0, 1), value=1.0), shared, state)
            # Features of a token whose own lie far from all others' may round to 0: it gets 0, and not 0 / 0.
            out_BTHC = out_BTHC[..., :-1] / out_BTHC[..., -1:].clamp_min(1e-30)
        return self.out(out_BTHC.to(x_BTD.dtype).flatten(2))

    def _mixed(
        self,
        q_BTHP: torch.Tensor,
        k_BTHP: torch.Tensor,
        v_BTHC: torch.Tensor,
        shared: MixerInput,
        state: MixerState | None,
    ) -> torch.Tensor:
        """Numerators, and the denominator as the last channel."""
        documents_BT = shared.mask.documents_BT
        if shared.mask.prefix_B is not None or shared.mask.globals_BT is not None:
            raise Refusal(
                "model",
                NO_VALUE,
                (
                    "prefix_B or globals_BT was given, and mixer.kind is linear_attention, which has no "
                    "prefixes and no global tokens"
                ),
                "leave them out",
            )
        if documents_BT is not None:  # padding is seen by nothing
            k_BTHP = k_BTHP * (documents_BT != 0)[..., None, None]
        if state is None:
            if not shared.mask.causal:
                return bidirectional_linear_attention(q_BTHP, k_BTHP, v_BTHC, documents_BT)
            return causal_linear_attention(q_BTHP, k_BTHP, v_BTHC, documents_BT)[0]
        assert isinstance(state, LinearState)
        padding_BT1 = shared.padding(q_BTHP.shape[1])
        if padding_BT1 is not None:
            k_BTHP = k_BTHP.masked_fill(padding_BT1[..., None], 0.0)
        if q_BTHP.shape[1] == 1:
            out_BTHC, state.sum_BHPC = recurrent_linear_attention(q_BTHP, k_BTHP, v_BTHC, None, state.sum_BHPC)
        else:
            out_BTHC, state.sum_BHPC = causal_linear_attention(q_BTHP, k_BTHP, v_BTHC, documents_BT, state.sum_BHPC)
        return out_BTHC

    def new_state(self, rows: int, max_tokens: int) -> LinearState:
        shape = (rows, self.heads, self.n_features, self.head_dim + 1)
        return LinearState(self.q.like.new_zeros(shape, dtype=torch.float32))


class EluFeatures(nn.Module):
    """elu + 1 of queries and of keys."""

    def forward(self, q_BTHC: torch.Tensor, k_BTHC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q_BTHP and k_BTHP, none negative, with as many features as channels (Katharopoulos et al. 2020)."""
        # elu's own backward has strides that torch.compile does not foresee.
        return _elu_plus_one(q_BTHC), _elu_plus_one(k_BTHC)


class FavorFeatures(Declared):
    """φ(q)·φ(k) estimates exp(q·k / sqrt(C)) up to a factor of each query's own, which the division takes out again.

    With directions ω and q, k scaled by C^(-1/4) the paper's features are exp(ω·k - |k|²/2). A factor exp((C - |ω|²)/2)
    moves from keys to queries, which bounds a key's features by exp(C/2) and changes no product; a query's are divided
    by their largest. So no maximum over the keys is needed, which a recurrence could not know.
    """

    declared = declare(weight=Parameter("features", "orthogonal"))

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.scale = channels**-0.25
        self.weight = nn.Parameter(torch.empty(features, channels), requires_grad=False)

    def forward(self, q_BTHC: torch.Tensor, k_BTHC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 q_BTHP of at most 1 and k_BTHP of at most exp(C / 2)."""
        w_PC = self.weight.float()
        shift_P = (w_PC.square().sum(1) - w_PC.shape[1]) / 2
        q_BTHC, k_BTHC = q_BTHC * self.scale, k_BTHC * self.scale
        q_BTHP = nn.functional.linear(q_BTHC, w_PC) + shift_P  # |q|² / 2 goes out with the maximum
        k_BTHP = nn.functional.linear(k_BTHC, w_PC) - shift_P - k_BTHC.square().sum(-1, keepdim=True) / 2
        return (q_BTHP - q_BTHP.detach().amax(-1, keepdim=True)).exp(), k_BTHP.exp()


def _elu_plus_one(x_BTHC: torch.Tensor) -> torch.Tensor:
    return torch.where(x_BTHC > 0, x_BTHC + 1, x_BTHC.clamp(max=0).exp())
