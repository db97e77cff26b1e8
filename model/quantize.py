"""Fewer bits a weight, after training: int8 and int4 weights, or int8 products.

    names = quantize(model, "int8")     # in place; for inference only

The maps of the blocks are quantized; embeddings, norms and the head stay as they are. PyTorch's own kernels compute on CPUs.
"""

from typing import Literal

import torch
from torch import nn

from model.errors import ModelError
from model.init import Linear

Quantization = Literal["int8", "int4", "int8_dynamic"]
GROUP = 32
"""Inputs that share a scale in int4."""


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W in fewer bits; `like` has the precision and device of what it computes."""

    packed: torch.Tensor
    scales: torch.Tensor
    like: torch.Tensor

    def __init__(self, base: Linear, kind: Quantization) -> None:
        super().__init__()
        self.kind = kind
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        weight_FI = base.weight.detach().float()
        if kind == "int4":
            packed, scales = _int4(weight_FI)
        else:
            scale_F = weight_FI.abs().amax(1).clamp(min=1e-12) / 127
            packed, scales = (weight_FI / scale_F[:, None]).round().to(torch.int8), scale_F
        self.register_buffer("packed", packed)
        # A product of integers is scaled in fp32 before it is rounded.
        self.register_buffer("scales", scales if kind == "int8_dynamic" else scales.to(base.weight.dtype))
        self.register_buffer("like", base.weight.new_empty(0), persistent=False)

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


def quantize(model: nn.Module, kind: Quantization) -> list[str]:
    """Quantize the maps inside the blocks, in place; the names of those that were.

    int8: one scale for each output. int4: a scale and an offset for every 32 inputs; maps whose inputs are no multiple of
    that, or outputs of 16, stay. int8_dynamic: inputs are rounded too, a scale for each token, and the product is one of
    integers. Raises ModelError for other kinds, for a model none of whose maps fits, and off the CPU, where these kernels
    do not run.
    """
    if kind not in ("int8", "int4", "int8_dynamic"):
        raise ModelError(f"quantization is {kind!r}: choose int8, int4 or int8_dynamic.")
    maps = [(n, m) for n, m in model.named_modules() if type(m) is Linear and n.startswith("stack.")]
    if any(part.weight.device.type != "cpu" for _, part in maps):
        raise ModelError("quantize runs on the CPU only: move the model there first.")
    if kind == "int4":
        maps = [(name, part) for name, part in maps if not (part.weight.shape[1] % GROUP or part.weight.shape[0] % 16)]
    if not maps:
        raise ModelError(
            f"quantization is {kind}, and no map of the blocks fits it: int4 takes a multiple of {GROUP} inputs and of 16 "
            "outputs; choose int8, or leave the weights as they are."
        )
    for name, part in maps:
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, QuantizedLinear(part, kind))
    return [name for name, _ in maps]


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
