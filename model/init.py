"""Parameter roles and the starting value of every parameter.

A role says what a parameter is *for*. The optimizer's groups, weight decay, sharding and LoRA targets follow roles,
never names. Starting values are drawn from a generator keyed by (seed, name): adding a layer, building on the meta
device or initialising only the parameters of one rank changes no other value.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from conf.refusal import Refusal

Role = Literal["matrix", "embedding", "head", "router", "expert", "norm", "bias", "adapter", "recurrence", "features"]
"""`recurrence`: rates and passages of a state space mixer. `features`: random ones, which are never trained."""

Draw = Literal[
    "weight",
    "residual",
    "embedding",
    "head",
    "zeros",
    "ones",
    "fan_in",
    "time_step",
    "decay",
    "orthogonal",
    "conv",
    "temperature",
]
"""`InitConfig` decides about the first four. fan_in: uniform within ±1/sqrt(fan_in). time_step: the offset that makes
softplus give steps between 0.001 and 0.1, evenly on a logarithmic scale. decay: ln(1), ln(2) … along the last axis.
orthogonal: Gaussian rows, orthogonal among each block of as many as they have columns. conv: Gaussian of variance
2 / fan_in (He et al. 2015). temperature: the logarithm of 1 / 0.07, rounded as CLIP's authors have it."""

# Roles that are not pulled towards zero by weight decay: a scale of one, an offset or the logarithm of a rate is not a
# weight to be kept small, and a rare token's embedding would shrink between its sightings.
NO_WEIGHT_DECAY: frozenset[Role] = frozenset({"norm", "bias", "embedding", "recurrence", "features"})


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How weights start."""

    std: float | None = 0.02
    """Standard deviation of weight matrices; null: 1/sqrt(fan_in), which suits narrow models."""
    embedding_std: float | None = None
    """The same for token embeddings; null: `std`, or 0.02 where that is null."""
    head_std: float | None = None
    """The same for an untied head; null: `std`, or 0.02 where that is null."""
    residual: Literal["scaled", "plain", "zero"] = "scaled"
    """Matrices that write into the residual stream: drawn with std / sqrt(2 * n_layers) (GPT-2), left at std, or
    zero, so that every block begins as the identity."""

    def __post_init__(self) -> None:
        for name in ("std", "embedding_std", "head_std"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise Refusal(f"init.{name}", value, "a standard deviation cannot be negative", "use 0 or more")


@dataclass(frozen=True)
class Parameter:
    """What a module declares about one of its own parameters: its role, how it is drawn, and how many times as wide."""

    role: Role
    draw: Draw
    gain: float = 1.0


def declare(**by_local_name: Parameter) -> Mapping[str, Parameter]:
    """Declarations by local parameter name, as `Declared.declared` holds them."""
    return by_local_name


class Declared(nn.Module):
    """A module that holds parameters, each with a declared role.

    Subclasses set `declared`, from the local parameter name to its declaration, on the class or the instance.
    """

    declared: Mapping[str, Parameter] = declare()


Product = Callable[[torch.Tensor], torch.Tensor]
"""x -> x Wᵀ + b."""


class Multiplies(Declared):
    """A module with a `weight` [out, in] and perhaps a `bias` [out], which it multiplies with what it is given.

    product: what does so in its place while `model.decoding.joined.arranged_products` lasts, else None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    product: Product | None = None

    def multiply(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b."""
        if self.product is not None:
            return self.product(x_BTI)
        return nn.functional.linear(x_BTI, self.weight, self.bias)


class Linear(Multiplies):
    """y = x Wᵀ + b, with `weight` [out, in]; `residual` marks a map that writes into the residual stream."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.declared = declare(
            weight=Parameter("matrix", "residual" if residual else "weight"), bias=Parameter("bias", "zeros")
        )

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """y_BTO, by the product of the moment (`multiply`)."""
        return self.multiply(x_BTI)

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the precision and on the device of what the map computes."""
        return self.weight

    def extra_repr(self) -> str:
        """Its sizes, as `print(model)` shows them."""
        return f"{self.in_features} -> {self.out_features}{', bias' if self.bias is not None else ''}"


def declarations(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Parameter]]:
    """Every distinct parameter of `model` as (name, parameter, declaration); a tied parameter under its first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            declared: Mapping[str, Parameter] = getattr(module, "declared", {})
            assert local in declared, f"{type(module).__name__} declares no role for its parameter {local!r}"
            yield (f"{prefix}.{local}" if prefix else local), parameter, declared[local]


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by the name `model.named_parameters()` gives it."""
    return {name: declaration.role for name, _, declaration in declarations(model)}


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that take no weight decay."""
    return {name for name, role in parameter_roles(model).items() if role in NO_WEIGHT_DECAY}


def initial_value(
    *,
    name: str,
    shape: torch.Size | tuple[int, ...],
    draw: Draw,
    config: InitConfig,
    n_layers: int,
    seed: int,
    gain: float = 1.0,
) -> torch.Tensor:
    """The fp32 CPU starting value of one parameter: a pure function of its arguments."""
    if draw == "ones":
        return torch.ones(shape)
    if draw == "decay":
        return torch.arange(1.0, shape[-1] + 1).log().repeat(*shape[:-1], 1)
    if draw == "temperature":
        return torch.full(shape, 2.6592)
    std = gain * _std(shape=shape, draw=draw, config=config, n_layers=n_layers)
    if std == 0.0:
        return torch.zeros(shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # Always drawn on the CPU in fp32: a model started on another device or in another precision is the same model.
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(key[:8], "big", signed=True))
    if draw == "fan_in":
        bound = math.prod(shape[1:]) ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if draw == "time_step":
        step = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
        return step + torch.log(-torch.expm1(-step))
    if draw == "orthogonal":
        return _orthogonal(shape, generator)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _orthogonal(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """[rows, columns]: each row's length and direction are a Gaussian vector's (Choromanski et al. 2020, section 2.4)."""
    rows, columns = shape
    blocks = []
    for _ in range(-(-rows // columns)):
        q, r = torch.linalg.qr(torch.empty(columns, columns, dtype=torch.float64).normal_(generator=generator))
        blocks.append((q * r.diagonal().sign()).T)  # without the signs no direction is as likely as its opposite
    lengths = torch.empty(rows, columns, dtype=torch.float64).normal_(generator=generator).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * lengths).float()


def _std(*, shape: torch.Size | tuple[int, ...], draw: Draw, config: InitConfig, n_layers: int) -> float:
    if draw == "zeros":
        return 0.0
    if draw == "conv":
        return float((2 / math.prod(shape[1:])) ** 0.5)
    if draw == "embedding" or draw == "head":
        chosen = config.embedding_std if draw == "embedding" else config.head_std
        fallback = 0.02 if config.std is None else config.std
        return fallback if chosen is None else chosen
    base = shape[-1] ** -0.5 if config.std is None else config.std
    if draw == "residual":
        if config.residual == "zero":
            return 0.0
        if config.residual == "scaled":
            return float(base * (2 * n_layers) ** -0.5)
    return float(base)


@torch.no_grad()
def initialize(model: nn.Module, *, config: InitConfig, n_layers: int, seed: int, within: str = "") -> None:
    """Fill every parameter of a materialised model whose name begins with `within` with its starting value, and every
    buffer with zeros."""
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter, declaration in declarations(model):
        if not name.startswith(within):
            continue
        value = initial_value(
            name=name,
            shape=parameter.shape,
            draw=declaration.draw,
            config=config,
            n_layers=n_layers,
            seed=seed,
            gain=declaration.gain,
        )
        parameter.copy_(value)
