"""Copies of weights in the order in which few rows read them fastest, for as long as a batch is decoded on a CPU.

A step reads every weight once, so that memory should be what limits it. It is not, with weights as they are stored,
[out, in]: measured on one core of an EPYC 9004 (`benchmarks/decoding.py`), PyTorch's products of 1 to 16 rows read 4 to
13 GB/s of the 26 that the core can read. oneDNN's packed layout reads 9 to 20, and for a single row in fp32 the
transposed weight 14 to 23.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import nn

from model.init import Multiplies, Product

COPIED_BYTES = 2 << 30
"""At most so many bytes are held twice; what is left of a larger model is multiplied as it is stored."""

LAID_OUT_ROWS = 16
"""What oneDNN lays a weight out for: it is as good for any smaller or greater number, unlike the layout for one row."""

FROM_TOKENS = 32
"""A copy costs as much as the tokens it speeds up gain within 2 to 16 steps."""

FROM_PRODUCTS = {torch.float32: 1 << 19, torch.bfloat16: 1 << 16}
"""Rows times elements of the weight; below that, starting oneDNN takes longer than it spares."""


class Packing:
    """Which weights are copied, and how. rows: of the batch; tokens: how many each may get; 0 copies nothing."""

    def __init__(self, rows: int = 0, tokens: int = 0) -> None:
        self.rows = rows
        self.left_bytes = COPIED_BYTES if tokens >= FROM_TOKENS else 0

    def every_step(self, model: nn.Module) -> Iterator[Multiplies]:
        """The maps that every step multiplies with: not an encoder's, which reads once."""
        if self.left_bytes:
            for name, module in model.named_modules():
                if isinstance(module, Multiplies) and name.startswith(("stack.", "head")):
                    yield module

    def product(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
        """x -> x Wᵀ + b, with a copy of the weight where that is faster."""
        kind = self._kind(weight_OI)
        if kind == "packed":
            self.left_bytes -= weight_OI.nbytes
            packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, LAID_OUT_ROWS)
            return partial(_multiply, packed=packed, bias_O=bias_O)
        if kind == "transposed":
            self.left_bytes -= weight_OI.nbytes
            weight_OI = weight_OI.T.contiguous().T
        return as_stored(weight_OI, bias_O)

    def _kind(self, weight_OI: torch.Tensor) -> Literal["stored", "transposed", "packed"]:
        """How the weight is best held."""
        dtype, (outputs, inputs) = weight_OI.dtype, weight_OI.shape
        if weight_OI.device.type != "cpu" or weight_OI.nbytes > self.left_bytes or dtype not in FROM_PRODUCTS:
            return "stored"
        if self.rows * weight_OI.numel() < FROM_PRODUCTS[dtype]:
            return "stored"
        if dtype == torch.float32 and self.rows == 1:
            return "transposed" if outputs >= inputs else "stored"
        if not torch.backends.mkldnn.is_available():
            return "stored"
        able = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "packed" if able else "stored"


def as_stored(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
    """x -> x Wᵀ + b, nothing copied."""
    return partial(nn.functional.linear, weight=weight_OI, bias=bias_O)


def _multiply(x_BTI: torch.Tensor, packed: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    y_BTO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_BTI, packed, bias_O, "none", [], "")
    return y_BTO
