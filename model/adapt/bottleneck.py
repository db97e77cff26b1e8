"""Bottleneck adapters: a small residual network behind a sublayer, trained while the model stays as it is.

Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) put one behind the mixer and one behind the feed-forward network of
every layer, Pfeiffer et al. 2021 (https://arxiv.org/abs/2005.00247) behind the latter only.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from conf.refusal import Refusal
from model.block import Block
from model.ffns.dense import ACTIVATIONS
from model.init import InitConfig, Linear, Parameter, declarations, declare, initial_value


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """Adapters of two small layers behind sublayers."""

    kind: Literal["bottleneck"] = "bottleneck"
    """Which part this is."""
    width: int = 64
    """Channels of the bottleneck."""
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """houlsby: behind mixer and ffn; pfeiffer: behind the ffn."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "relu"
    """Between the two layers."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise Refusal("bottleneck.width", self.width, "the narrow layer needs at least one unit")


class Bottleneck(nn.Module):
    """x_BTD + up(activation(down x)); `up` starts at zero, so attaching changes no output."""

    def __init__(self, config: BottleneckConfig, like: torch.Tensor) -> None:
        super().__init__()
        width = like.shape[-1]
        self.activation = ACTIVATIONS[config.activation]
        self.down = _adapter_map(width, config.width, like, "weight")
        self.up = _adapter_map(config.width, width, like, "zeros")

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.up(self.activation(self.down(x_BTD)))


def attach_bottlenecks(model: nn.Module, config: BottleneckConfig, *, seed: int = 0) -> list[str]:
    """Put an adapter behind the chosen sublayers of every block and freeze everything else; the adapters' names.

    Raises Refusal where no block has such a sublayer.
    """
    places = ("mixer", "ffn") if config.placement == "houlsby" else ("ffn",)
    names = []
    blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, Block)]
    if not any(getattr(block, place) is not None for _, block in blocks for place in places):
        raise Refusal(
            "bottleneck.placement",
            config.placement,
            "behind the ffn, and no block of this model has one: use houlsby, which adapts mixers too",
        )
    model.requires_grad_(False)
    for name, block in blocks:
        for place in places:
            sublayer = getattr(block, place)
            if sublayer is None:  # a block without an ffn
                continue
            adapter = Bottleneck(config, next(block.mixer_norm.parameters()))
            sublayer.adapter = adapter
            sublayer.register_forward_hook(_through_adapter)
            names.append(f"{name}.{place}.adapter")
            start(adapter, names[-1], seed)
    return names


@torch.no_grad()
def start(module: nn.Module, prefix: str, seed: int) -> None:
    """Fill what was attached under the name `prefix` with starting values, a function of name and seed."""
    for local, parameter, declaration in declarations(module):
        value = initial_value(
            name=f"{prefix}.{local}",
            shape=parameter.shape,
            draw=declaration.draw,
            config=InitConfig(std=None),
            n_layers=1,
            seed=seed,
        )
        parameter.copy_(value)


def _through_adapter(sublayer: nn.Module, inputs: Any, output: Any) -> Any:
    """y_BTD adapted; what an ffn records of the pass stays as it is."""
    adapter = sublayer.adapter
    assert isinstance(adapter, Bottleneck)
    if isinstance(output, tuple):
        y_BTD, record = output
        return adapter(y_BTD), record
    return adapter(output)


def _adapter_map(inputs: int, outputs: int, like: torch.Tensor, draw: Literal["weight", "zeros"]) -> Linear:
    """A map with an offset, in the precision and on the device of the model, all of it with the role `adapter`."""
    linear = Linear(inputs, outputs, bias=True).to(like)
    linear.declared = declare(weight=Parameter("adapter", draw), bias=Parameter("adapter", "zeros"))
    return linear
