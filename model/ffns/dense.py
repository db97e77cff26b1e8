"""The position-wise feed-forward network, plain or gated (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from model.decoding.joined import Joins
from model.ffns.base import AbstractFfnConfig
from model.init import Linear
from model.limits import check_counts
from model.mixers.base import MixerInput
from model.slots import Record, SlotCosts

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "quick_gelu"]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x_BTF: nn.functional.gelu(x_BTF, approximate="tanh"),
    "relu": nn.functional.relu,
    "quick_gelu": lambda x_BTF: x_BTF * torch.sigmoid(1.702 * x_BTF),  # CLIP's approximation
    "relu_squared": lambda x_BTF: nn.functional.relu(x_BTF).square(),
}


@dataclass(frozen=True, kw_only=True)
class FfnConfig(AbstractFfnConfig):
    """A feed-forward network."""

    kind: Literal["dense"] = "dense"
    """Which part this is."""
    d_ff: int = 1024
    """Hidden width."""
    activation: Activation = "silu"
    """Of the hidden layer."""
    gated: bool = True
    """activation(gate x) * (up x), which with silu is SwiGLU; false: activation(up x)."""
    bias: bool = False
    """Whether its maps have offsets."""

    def __post_init__(self) -> None:
        check_counts(self, "d_ff")

    def costs(self, d_model: int) -> SlotCosts:
        """Two matrices, or three with a gate."""
        matrices = (3 if self.gated else 2) * d_model * self.d_ff
        biases = (2 if self.gated else 1) * self.d_ff + d_model if self.bias else 0
        return SlotCosts(
            parameters=matrices + biases, matrices=matrices, kept_elements=(4 if self.gated else 2) * self.d_ff
        )

    def build(self, d_model: int, layer: int) -> FeedForward:
        return FeedForward(self, d_model)


@dataclass(frozen=True, kw_only=True)
class NoFfnConfig(AbstractFfnConfig):
    """Nothing behind the mixer: the block has one branch and one norm (Mamba)."""

    is_empty: ClassVar[bool] = True

    kind: Literal["none"] = "none"
    """Which part this is."""

    def costs(self, d_model: int) -> SlotCosts:
        """Nothing."""
        return SlotCosts(parameters=0, matrices=0)

    def build(self, d_model: int, layer: int) -> None:
        return None


class FeedForward(Joins):
    """x_BTD -> y_BTD, each token by itself; it has nothing to record."""

    def __init__(self, config: FfnConfig, d_model: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = Linear(d_model, config.d_ff, bias=config.bias) if config.gated else None
        self.up = Linear(d_model, config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, d_model, bias=config.bias, residual=True)

    def forward(self, x_BTD: torch.Tensor, shared: MixerInput) -> tuple[torch.Tensor, Record]:
        """(y_BTD, {}); while its maps are joined the gate and what it gates come of one product."""
        if self.gate is None:
            return self.down(self.activation(self.up(x_BTD))), {}
        if self.joined is not None:
            gate_BTF, up_BTF = self.joined(x_BTD).chunk(2, dim=-1)
        else:
            gate_BTF, up_BTF = self.gate(x_BTD), self.up(x_BTD)
        return self.down(self.activation(gate_BTF) * up_BTF), {}

    def joinable(self) -> Sequence[nn.Module]:
        """The gate and what it gates read the same input."""
        return () if self.gate is None else (self.gate, self.up)
