"""A short convolution over the tokens of each channel by itself, which looks back only and stays within documents.

Written as one multiply-add over all tokens for each tap: the layout stays [B, T, F], and nothing is kept for the
backward pass but the input. On CUDA, causal-conv1d's kernel is taken where it is installed.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch


def causal_conv(
    x_BTF: torch.Tensor,
    weight_F1U: torch.Tensor,
    bias_F: torch.Tensor | None,
    documents_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_BTF, y_t = Σ_u weight_u x_(t - U + 1 + u) over the tokens of the same document, in the precision of x."""
    if x_BTF.is_cuda and FUSED is not None:
        numbers_BT = None if documents_BT is None else documents_BT.int()
        fused_BFT = FUSED(x_BTF.transpose(1, 2), weight_F1U[:, 0], bias_F, seq_idx=numbers_BT)
        return fused_BFT.transpose(1, 2)
    y_BTF: torch.Tensor = tap_by_tap(x_BTF, weight_F1U, bias_F, documents_BT)
    return y_BTF


@torch.library.custom_op("athanor::causal_conv", mutates_args=())
def tap_by_tap(
    x_BTF: torch.Tensor, weight_F1U: torch.Tensor, bias_F: torch.Tensor | None, documents_BT: torch.Tensor | None
) -> torch.Tensor:
    """The convolution in fp32, tap by tap."""
    taps = weight_F1U.shape[2]
    y_BTF = x_BTF.new_zeros(x_BTF.shape, dtype=torch.float32)
    if bias_F is not None:
        y_BTF += bias_F
    for lag in range(min(taps, x_BTF.shape[1])):
        tap_F = weight_F1U[:, 0, taps - 1 - lag].float()
        end = x_BTF.shape[1] - lag
        same_BT1 = _same_document(documents_BT, lag)
        x_lagged_BTF = x_BTF[:, :end].float()
        y_BTF[:, lag:].addcmul_(x_lagged_BTF if same_BT1 is None else x_lagged_BTF * same_BT1, tap_F)
    return y_BTF.to(x_BTF.dtype)


@torch.library.custom_op("athanor::causal_conv_backward", mutates_args=())
def _backward(
    grad_BTF: torch.Tensor, x_BTF: torch.Tensor, weight_F1U: torch.Tensor, documents_BT: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the input, the weight and the bias."""
    taps = weight_F1U.shape[2]
    grad_BTF = grad_BTF.float()
    dx_BTF = torch.zeros_like(grad_BTF)
    dweight_F1U = torch.zeros_like(weight_F1U, dtype=torch.float32, memory_format=torch.contiguous_format)
    for lag in range(min(taps, x_BTF.shape[1])):
        tap_F = weight_F1U[:, 0, taps - 1 - lag].float()
        end = x_BTF.shape[1] - lag
        same_BT1 = _same_document(documents_BT, lag)
        seen_BTF = grad_BTF[:, lag:] if same_BT1 is None else grad_BTF[:, lag:] * same_BT1
        dx_BTF[:, :end].addcmul_(seen_BTF, tap_F)
        dweight_F1U[:, 0, taps - 1 - lag] = (seen_BTF * x_BTF[:, :end]).sum((0, 1))
    return dx_BTF.to(x_BTF.dtype), dweight_F1U.to(weight_F1U.dtype), grad_BTF.sum((0, 1))


def _same_document(documents_BT: torch.Tensor | None, lag: int) -> torch.Tensor | None:
    """bool: whether the token `lag` places before belongs to the document of each from place `lag` on."""
    if documents_BT is None or lag == 0:
        return None
    return (documents_BT[:, lag:] == documents_BT[:, :-lag])[..., None]


@tap_by_tap.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, documents: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, documents: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))
    return dx, dweight, grad.new_empty(weight.shape[0], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x_BTF, weight_F1U, bias_F, documents_BT = inputs
    ctx.bias_dtype = None if bias_F is None else bias_F.dtype
    ctx.save_for_backward(x_BTF, weight_F1U, documents_BT)


def _differentiate(ctx: Any, grad_BTF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_BTF, weight_F1U, documents_BT = ctx.saved_tensors
    dx_BTF, dweight_F1U, dbias_F = _backward(grad_BTF, x_BTF, weight_F1U, documents_BT)
    return dx_BTF, dweight_F1U, None if ctx.bias_dtype is None else dbias_F.to(ctx.bias_dtype), None


tap_by_tap.register_autograd(_differentiate, setup_context=_setup)


def _causal_conv1d() -> Callable[..., torch.Tensor] | None:
    try:
        found: Callable[..., torch.Tensor] = importlib.import_module("causal_conv1d").causal_conv1d_fn
    except (ImportError, AttributeError):
        return None
    return found


FUSED = _causal_conv1d() if torch.cuda.is_available() else None
"""causal-conv1d's kernel, where there is one and a device for it."""
