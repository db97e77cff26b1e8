"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685): attach, merge, and PEFT's file format.

    attach_lora(model, LoraConfig(rank=8), seed=0)     # only the adapters are trained from here on
    state = merged(dict(model.state_dict()), config)   # an ordinary model again

An adapted layer computes W x + (alpha / rank) · B A x. B starts at zero, so attaching changes no output.
"""

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from model.config import ModelConfig
from model.errors import ModelError
from model.init import InitConfig, Linear, Parameter, declare, initial_value
from model.interop.convert import family_of, spelled_weights

A, B = "lora_A", "lora_B"
State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """rank: of B A. alpha: the update is scaled by alpha / rank. dropout: on the adapters' input, in training.

    targets: patterns over module names such as `stack.layers.0.mixer.q`; null adapts every matrix of the blocks.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModelError(f"lora.rank is {self.rank}: an adapter has at least rank 1.")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"lora.dropout is {self.dropout}: it is a probability below 1; use 0 for none.")

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
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, config.rank, device=base.weight.device))
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.scale
        self.declared = {
            **base.declared,
            **declare(lora_A=Parameter("adapter", "weight"), lora_B=Parameter("adapter", "zeros")),
        }

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        low_BTR = nn.functional.linear(self.dropout(x_BTI), self.lora_A)
        return super().forward(x_BTI) + self.scale * nn.functional.linear(low_BTR, self.lora_B)


@torch.no_grad()
def attach_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> list[str]:
    """Give the target layers adapters and freeze everything else; the names of the adapted modules.

    Raises ModelError where a pattern matches no linear map.
    """
    linear = {name: module for name, module in model.named_modules() if type(module) is Linear}
    chosen = [name for name in linear if _is_target(name, config)]
    if config.targets is not None:
        for pattern in config.targets:
            if not any(fnmatch.fnmatch(name, pattern) for name in linear):
                raise ModelError(f"lora.targets has {pattern!r}, which matches no layer. Layers are {', '.join(linear)}.")
    model.requires_grad_(False)
    draw = InitConfig(std=None)
    for name in chosen:
        adapted = LoraLinear(linear[name], config)
        for part, kind in ((A, "weight"), (B, "zeros")):
            parameter: nn.Parameter = getattr(adapted, part)
            value = initial_value(
                name=f"{name}.{part}", shape=parameter.shape, draw=kind, config=draw, n_layers=1, seed=seed  # type: ignore[arg-type]
            )
            parameter.copy_(value)
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, adapted)
    return chosen


def merged(state: Mapping[str, torch.Tensor], config: LoraConfig) -> State:
    """The state dict of the model without adapters that computes the same: W + (alpha / rank) B A, in W's precision."""
    out = {name: tensor for name, tensor in state.items() if not name.endswith((f".{A}", f".{B}"))}
    for name in adapted_layers(state):
        weight = state[f"{name}.weight"]
        update = state[f"{name}.{B}"].double() @ state[f"{name}.{A}"].double()
        out[f"{name}.weight"] = (weight.double() + config.scale * update).to(weight.dtype)
    return out


def adapted_layers(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the layers that have adapters in a state dict."""
    return [name.removesuffix(f".{A}") for name in state if name.endswith(f".{A}")]


def save_adapter(state: Mapping[str, torch.Tensor], model: ModelConfig, config: LoraConfig, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as the `peft` package reads them, over the exported model.

    Where their layer is several of ours side by side (GPT-2's fused projection), its adapter is the block-diagonal one
    of all of them: rank times as many, scale the same. Raises ModelError where no Hugging Face class matches.
    """
    adapted = set(adapted_layers(state))
    tensors: State = {}
    ranks: dict[str, int] = {}
    transposed = False
    for weight in spelled_weights(family_of(model), model):
        ours = [name.removesuffix(".weight") for name in weight.ours]
        if not weight.theirs.endswith(".weight") or not adapted & set(ours):
            continue
        theirs = weight.theirs.removesuffix(".weight")
        pairs = [_pair(state, name, config) for name in ours]
        tensors[f"base_model.model.{theirs}.{A}.weight"] = torch.cat([a for a, _ in pairs]).contiguous()
        tensors[f"base_model.model.{theirs}.{B}.weight"] = torch.block_diag(*[b for _, b in pairs]).contiguous()
        ranks[theirs] = config.rank * len(ours)
        transposed |= weight.transposed
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {name: config.scale * rank for name, rank in ranks.items() if rank != config.rank},
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _pair(state: Mapping[str, torch.Tensor], name: str, config: LoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one of our layers; zeros for one without an adapter that shares a layer of theirs with one that has."""
    if f"{name}.{A}" in state:
        return state[f"{name}.{A}"].float(), state[f"{name}.{B}"].float()
    rows, columns = state[f"{name}.weight"].shape
    return torch.zeros(config.rank, columns), torch.zeros(rows, config.rank)


def _is_target(name: str, config: LoraConfig) -> bool:
    patterns = ("stack.layers.*",) if config.targets is None else config.targets
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
