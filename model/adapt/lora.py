"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685): attach and merge.

    attach_lora(model, LoraConfig(rank=8), seed=0)     # only the adapters are trained from here on
    state = merged(dict(model.state_dict()), config)   # an ordinary model again

An adapted layer computes W x + (alpha / rank) · B A x. B starts at zero, so attaching changes no output.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.adapt.quantize import QuantizedLinear
from model.init import InitConfig, Linear, Parameter, declare, initial_value
from model.mixers.mamba import Mamba

LORA_A, LORA_B = "lora_A", "lora_B"
State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: an update B A of frozen matrices.

    Routers and the experts' weights, which are held together in one tensor, are no linear maps: they stay frozen.
    """

    rank: int = 8
    """Of B A."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability on the adapters' input, in training."""
    targets: tuple[str, ...] | None = None
    """Patterns of module names such as stack.layers.0.mixer.q; null: every linear map of the blocks, an encoder's and
    a tower's too, but Mamba's output, which the peft package does not adapt."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise Refusal("lora.rank", self.rank, "an adapter has at least rank 1")
        if not 0 <= self.dropout < 1:
            raise Refusal("lora.dropout", self.dropout, "it is a probability below 1", "use 0 for none")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


class LoraLinear(Linear):
    """A linear map whose weight is frozen, with a trained low-rank update beside it."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(config.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, config.rank))
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.scale
        self.declared = {
            **base.declared,
            **declare(lora_A=Parameter("adapter", "weight"), lora_B=Parameter("adapter", "zeros")),
        }

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """W x + b + scale B A dropout(x)."""
        low_BTR = nn.functional.linear(self.dropout(x_BTI), self.lora_A)
        return super().forward(x_BTI) + self.scale * nn.functional.linear(low_BTR, self.lora_B)


@torch.no_grad()
def attach_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> list[str]:
    """Give the target layers adapters and freeze everything else; the names of the adapted modules.

    Raises Refusal where a pattern matches no linear map, or null finds none.
    """
    linear = {name: module for name, module in model.named_modules() if type(module) is Linear}
    kept = {f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, Mamba)}
    patterns = ("*stack.layers.*",) if config.targets is None else config.targets
    for pattern in patterns:
        found = [name for name, _ in model.named_modules() if fnmatch.fnmatch(name, pattern)]
        if quantized := [name for name in found if isinstance(model.get_submodule(name), QuantizedLinear)]:
            raise Refusal(
                "lora.targets",
                NO_VALUE,
                f"has {pattern!r}, and {quantized[0]!r} is quantized: an adapter is trained beside whole weights",
                "attach it to the model as it was, merge it, and quantize then",
            )
        if linear.keys().isdisjoint(found):
            other = f"; {found[0]!r} is no linear map, nor are routers and the experts' joint weights" if found else ""
            raise Refusal(
                "lora.targets",
                NO_VALUE,
                (
                    f"has {pattern!r}, which matches no layer{other}: a layer's name is like "
                    f"{next(iter(linear), 'none')!r}, and * stands for any part of it"
                ),
            )
    chosen = [name for name in linear if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if config.targets is None:
        chosen = [name for name in chosen if name not in kept]
    model.requires_grad_(False)
    draw = InitConfig(std=None)
    for name in chosen:
        adapted = LoraLinear(linear[name], config)
        adapted.lora_A.copy_(
            initial_value(
                name=f"{name}.{LORA_A}", shape=adapted.lora_A.shape, draw="weight", config=draw, n_layers=1, seed=seed
            )
        )
        adapted.lora_B.zero_()
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, adapted)
    return chosen


def merged(state: Mapping[str, torch.Tensor], config: LoraConfig) -> State:
    """The state dict of the model without adapters that computes the same: W + (alpha / rank) B A, in W's precision."""
    out = {name: tensor for name, tensor in state.items() if not name.endswith((f".{LORA_A}", f".{LORA_B}"))}
    for name in adapted_layers(state):
        weight = state[f"{name}.weight"]
        update = state[f"{name}.{LORA_B}"].double() @ state[f"{name}.{LORA_A}"].double()
        out[f"{name}.weight"] = (weight.double() + config.scale * update).to(weight.dtype)
    return out


def adapted_layers(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the layers that have adapters in a state dict."""
    return [name.removesuffix(f".{LORA_A}") for name in state if name.endswith(f".{LORA_A}")]
