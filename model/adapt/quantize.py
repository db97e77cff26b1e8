"""Fewer bits a weight, after training: int8 and int4 weights, or int8 products.

    names = quantize(model, "int8")     # in place; for inference only

The maps of the blocks are quantized, an encoder's, a tower's and every expert's among them; embeddings, norms, routers,
convolutions and heads stay as they are. PyTorch's own kernels compute on CPUs.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from conf.refusal import Refusal
from model.ffns.experts.layer import Experts
from model.init import Linear

Quantization = Literal["int8", "int4", "int8_dynamic"]
GROUP = 32
"""Inputs that share a scale in int4."""


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W in fewer bits; `like` has the precision and device of what it computes."""

    packed: torch.Tensor
    scales: torch.Tensor
    like: torch.Tensor

    def __init__(self, weight_FI: torch.Tensor, bias_F: torch.Tensor | None, kind: Quantization) -> None:
        super().__init__()
        self.kind = kind
        self.bias = None if bias_F is None else nn.Parameter(bias_F.detach(), requires_grad=False)
        like, weight_FI = weight_FI, weight_FI.detach().float()
        if kind == "int4":
            packed, scales = _int4(weight_FI)
        else:
            scale_F = weight_FI.abs().amax(1).clamp(min=1e-12) / 127
            packed, scales = (weight_FI / scale_F[:, None]).round().to(torch.int8), scale_F
        self.register_buffer("packed", packed)
        # A product of integers is scaled in fp32 before it is rounded.
        self.register_buffer("scales", scales if kind == "int8_dynamic" else scales.to(like.dtype))
        self.register_buffer("like", like.new_empty(0), persistent=False)

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """y_BTF in the precision of the input; `int8_dynamic` quantizes each token as it comes."""
        x_NI = x_BTI.flatten(0, -2).contiguous()
        if self.kind == "int8":
            y_NF = torch.ops.aten._weight_int8pack_mm(x_NI, self.packed, self.scales)
        elif self.kind == "int4":
            y_NF = torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI, self.packed, GROUP, self.scales)
        else:
            scale_N1 = x_NI.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            whole_NI = (x_NI.float() / scale_N1).round().to(torch.int8)
            y_NF = (torch._int_mm(whole_NI, self.packed.T) * scale_N1 * self.scales).to(x_NI.dtype)
        y_BTF = y_NF.view(*x_BTI.shape[:-1], -1)
        return y_BTF if self.bias is None else y_BTF + self.bias


class QuantizedExperts(nn.Module):
    """The experts of a layer, each with maps of its own; they are gone through one after the other."""

    def __init__(self, base: Experts, kind: Quantization) -> None:
        super().__init__()
        self.activation, self.gated = base.activation, base.gated
        self.first = nn.ModuleList(QuantizedLinear(weight_FD, None, kind) for weight_FD in _first(base))
        self.down = nn.ModuleList(QuantizedLinear(weight_DF, None, kind) for weight_DF in base.down)

    def forward(self, x_QD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """y_QD, row by row of the expert it is sorted to; 0 behind the last expert's."""
        y_QD, begin = torch.zeros_like(x_QD), 0
        for first, down, end in zip(self.first, self.down, ends_E.tolist(), strict=True):
            if end > begin:
                hidden_QF = first(x_QD[begin:end])
                if self.gated:
                    gate_QF, up_QF = hidden_QF.chunk(2, dim=-1)
                    y_QD[begin:end] = down(self.activation(gate_QF) * up_QF)
                else:
                    y_QD[begin:end] = down(self.activation(hidden_QF))
            begin = end
        return y_QD


def quantize(model: nn.Module, kind: Quantization) -> list[str]:
    """Quantize the maps inside the blocks, in place; the names of those that were, experts of a layer under one name.

    int8: one scale for each output. int4: a scale and an offset for every 32 inputs; maps whose inputs are no multiple of
    that, or outputs of 16, stay. int8_dynamic: inputs are rounded too, a scale for each token, and the product is one of
    integers. Raises Refusal for other kinds, for a model that
    has adapters or is quantized already, where no map fits, and off the CPU, where these kernels do not run.
    """
    if kind not in ("int8", "int4", "int8_dynamic"):
        raise Refusal("quantization", kind, "there is no such kind", "choose int8, int4 or int8_dynamic")
    for name, part in model.named_modules():
        if getattr(part, "lora_A", None) is not None:
            raise Refusal(
                "quantization",
                kind,
                f"{name} has an adapter, and quantized weights take none",
                "load merged(model.state_dict(), lora) into a model without adapters and quantize that",
            )
        if isinstance(part, QuantizedLinear):
            raise Refusal(
                "quantization",
                kind,
                f"{name} is {part.kind} already",
                "start from whole weights",
            )
    maps = whole_maps(model)
    if any(parameter.device.type != "cpu" for part in maps.values() for parameter in part.parameters()):
        raise Refusal("quantization", kind, "it runs on the CPU only", "move the model there first")
    fitting = {name: part for name, part in maps.items() if kind != "int4" or all(map(_fits_int4, _weights(part)))}
    if not fitting:
        raise Refusal(
            "quantization",
            kind,
            (f"no map of the blocks fits it: int4 takes a multiple of {GROUP} inputs and of 16 outputs"),
            "choose int8, or leave the weights as they are",
        )
    for name, part in fitting.items():
        parent, _, local = name.rpartition(".")
        quantized: nn.Module
        if isinstance(part, Experts):
            quantized = QuantizedExperts(part, kind)
        else:
            assert isinstance(part, Linear)
            quantized = QuantizedLinear(part.weight, part.bias, kind)
        setattr(model.get_submodule(parent), local, quantized)
    return list(fitting)


def whole_maps(model: nn.Module) -> dict[str, nn.Module]:
    """The maps inside blocks, by name, whose weights are not quantized; the experts of a layer are one of them."""
    return {
        name: part
        for name, part in model.named_modules()
        if "stack" in name.split(".") and (type(part) is Linear or isinstance(part, Experts))
    }


def _first(experts: Experts) -> torch.Tensor:
    """weight_EFD of the maps into the hidden layer."""
    return experts.get_parameter("gate_up" if experts.gated else "up")


def _weights(part: nn.Module) -> Sequence[torch.Tensor]:
    """The matrices of a map; of experts those of one, which are as large as the others'."""
    if isinstance(part, Experts):
        return _first(part)[0], part.down[0]
    assert isinstance(part, Linear)
    return (part.weight,)


def _fits_int4(weight_FI: torch.Tensor) -> bool:
    return weight_FI.shape[1] % GROUP == 0 and weight_FI.shape[0] % 16 == 0


def held_bytes(model: nn.Module) -> int:
    """Bytes of all weights, scales and offsets, each once."""
    held = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held if tensor.numel()}.values())


def _int4(weight_FI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as PyTorch's CPU kernel reads them, and [inputs / GROUP, F, 2] of (scale, the value of level 8)."""
    outputs, inputs = weight_FI.shape
    grouped = weight_FI.view(outputs, -1, GROUP)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-12)
    levels_FI = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels_FI.view(outputs, inputs), 1)
    return packed, torch.stack((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous()
