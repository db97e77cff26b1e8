"""Normalisation layers. PyTorch's kernels take the statistics of a bf16 input in fp32, and give bf16 back."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from conf.refusal import Refusal, field
from model.init import Declared, Parameter, declare


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A norm."""

    kind: Literal["rms", "layer"] = "rms"
    """rms (Zhang & Sennrich 2019) or layer (Ba et al. 2016)."""
    eps: float = 1e-5
    """Added under the root."""
    bias: bool = False
    """An offset; for layer only."""

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise Refusal("eps", self.eps, "it keeps a division finite and must be above 0, such as 1e-5")
        if self.kind == "rms" and self.bias:
            raise Refusal(
                "bias",
                True,
                f"with {field('kind')}=rms: RMSNorm has no offset",
                f"drop it or use {field('kind')}=layer",
            )

    def parameters(self, width: int) -> int:
        """How many parameters one such norm has."""
        return width * (2 if self.bias else 1)


class RMSNorm(Declared):
    """x / rms(x) * weight over the last axis."""

    declared = declare(weight=Parameter("norm", "ones"))

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """In the precision of the input."""
        return nn.functional.rms_norm(x_BTD, self.weight.shape, self.weight.to(x_BTD.dtype), self.eps)


class LayerNorm(Declared):
    """(x - mean) / std * weight + bias over the last axis."""

    declared = declare(weight=Parameter("norm", "ones"), bias=Parameter("bias", "zeros"))

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """In the precision of the input."""
        bias_D = None if self.bias is None else self.bias.to(x_BTD.dtype)
        return nn.functional.layer_norm(x_BTD, self.weight.shape, self.weight.to(x_BTD.dtype), bias_D, self.eps)


def build_norm(config: NormConfig, width: int) -> nn.Module:
    """The norm of `config` over a last axis of `width`."""
    if config.kind == "rms":
        return RMSNorm(width, config.eps)
    return LayerNorm(width, config.eps, config.bias)
