"""Rows sorted by expert, each group times its own matrix, and the way of tokens there and back.

`torch.nn.functional.grouped_mm` where it is best (bf16 on CUDA and fp32 on a CPU, rows of a multiple of 16 bytes), a
product for each group elsewhere. Both are one custom operator: `torch.compile` sees a node of fixed shape however the
groups fall, and FlopCounterMode, which knows nothing of grouped_mm, is told what it costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from model.kernels.sizes import rounded, step_of

SIZE_DIGITS = 4
"""Binary digits, after the leading one, of the numbers of rows that are multiplied at a time: groups of ever other sizes
took 1.3 to 1.5 times as long in bf16 on a CPU."""


@dataclass(frozen=True)
class Dispatch:
    """Where the copies of tokens go, a copy for each choice.

    order_Q: the choice (token times top_k plus its rank) that stands at each place when sorted by expert, those that
    are not kept at the end. place_Q: the inverse. ends_E: int32, where each expert's copies end.
    """

    order_Q: torch.Tensor
    place_Q: torch.Tensor
    ends_E: torch.Tensor


def by_expert(experts_NJ: torch.Tensor, kept_NJ: torch.Tensor, n_experts: int) -> Dispatch:
    """The places of all choices, sorted by expert and within an expert by token."""
    expert_Q = torch.where(kept_NJ, experts_NJ, n_experts).flatten()
    order_Q = expert_Q.argsort(stable=True)
    place_Q = torch.empty_like(order_Q)
    place_Q[order_Q] = torch.arange(len(order_Q), device=order_Q.device)
    counts_E = torch.zeros(n_experts + 1, dtype=torch.int64, device=expert_Q.device)
    counts_E.scatter_add_(0, expert_Q, torch.ones_like(expert_Q))
    return Dispatch(order_Q, place_Q, counts_E[:-1].cumsum(0).to(torch.int32))


class Scatter(torch.autograd.Function):
    """x_ND -> x_QD: each token's copies at their places. Its backward sums a token's copies in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, order_Q: torch.Tensor, place_Q: torch.Tensor) -> torch.Tensor:
        """order_Q, place_Q: of a `Dispatch`."""
        ctx.save_for_backward(place_Q)
        ctx.top_k = len(order_Q) // len(x_ND)
        return x_ND.index_select(0, order_Q // ctx.top_k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad_ND; the order is not differentiable."""
        (place_Q,) = ctx.saved_tensors
        return grads[0].index_select(0, place_Q).unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class Gather(torch.autograd.Function):
    """(y_QD, weights_NJ) -> y_ND: the sum of a token's copies, weighted.

    whole: the weights of a token are known to sum to one. Then the sum is taken as the first copy plus weighted distances
    from it, so that equal copies give what they are to the last bit, however the weights are rounded. The gradients are
    those of the plain sum, whose difference no weights that sum to one can tell.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_QD: torch.Tensor,
        weights_NJ: torch.Tensor,
        order_Q: torch.Tensor,
        place_Q: torch.Tensor,
        whole: bool = False,
    ) -> torch.Tensor:
        """order_Q, place_Q: of a `Dispatch`. The sum is in the precision of y_QD."""
        ctx.save_for_backward(y_QD, weights_NJ, order_Q, place_Q)
        y_NJD = y_QD.index_select(0, place_Q).view(*weights_NJ.shape, -1)
        if whole:
            y_NJD[:, 1:].sub_(y_NJD[:, :1]).mul_(weights_NJ[:, 1:, None].to(y_QD.dtype))
            return y_NJD.sum(1)
        return y_NJD.mul_(weights_NJ[..., None].to(y_QD.dtype)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad_QD, and grad_weights_NJ summed over D in fp32."""
        y_QD, weights_NJ, order_Q, place_Q = ctx.saved_tensors
        grad_QD = grads[0].index_select(0, order_Q // weights_NJ.shape[1])
        grad_weights_Q = (grad_QD * y_QD).sum(-1, dtype=torch.float32)
        grad_QD *= weights_NJ.flatten().index_select(0, order_Q)[:, None].to(grad_QD.dtype)
        return (
            grad_QD,
            grad_weights_Q.index_select(0, place_Q).view_as(weights_NJ).to(weights_NJ.dtype),
            None,
            None,
            None,
        )


@torch.library.custom_op("athanor::grouped_matmul", mutates_args=())
def grouped_matmul(x_QD: torch.Tensor, weight_EFD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """y_QF: row q times weightᵀ of the expert whose group it is in; zeros after the last group's end."""
    if _runs(x_QD, weight_EFD.shape[1]):
        y_QF = torch.nn.functional.grouped_mm(x_QD, weight_EFD.transpose(1, 2), offs=ends_E)
    else:
        y_QF = _one_by_one(x_QD, weight_EFD, ends_E)
    if y_QF.device.type == "cpu":
        y_QF[int(ends_E[-1]) :].zero_()
        return y_QF
    after_Q = torch.arange(len(y_QF), device=y_QF.device) >= ends_E[-1]  # without waiting for the device
    return y_QF.masked_fill_(after_Q[:, None], 0.0)


def _one_by_one(x_QD: torch.Tensor, weight_EFD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """y_QF, with whatever the memory held after the last group's end."""
    rows, y_QF = len(x_QD), x_QD.new_empty(x_QD.shape[0], weight_EFD.shape[1])
    for expert, start, end in _groups(ends_E):
        taken = min(rounded(end - start, SIZE_DIGITS), rows)
        if start + taken <= rows:  # the rows beyond the end are the next groups' to write
            torch.mm(x_QD[start : start + taken], weight_EFD[expert].T, out=y_QF[start : start + taken])
        else:
            last_QF = x_QD[rows - taken :] @ weight_EFD[expert].T
            y_QF[start:end] = last_QF[taken - rows + start : taken - rows + end]
    return y_QF


@torch.library.custom_op("athanor::grouped_outer", mutates_args=())
def grouped_outer(grad_QF: torch.Tensor, x_QD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """grad_EFD: gradᵀ x of each group, the gradient of `grouped_matmul` for its weight."""
    if _runs(x_QD, grad_QF.shape[1]):
        return torch.nn.functional.grouped_mm(grad_QF.T, x_QD, offs=ends_E)
    grad_EFD = x_QD.new_zeros(len(ends_E), grad_QF.shape[1], x_QD.shape[1])
    for expert, start, end in _groups(ends_E):
        step = step_of(end - start, SIZE_DIGITS)
        left = (end - start) % step
        torch.mm(grad_QF[start : end - left].T, x_QD[start : end - left], out=grad_EFD[expert])
        if left:
            last_QF = grad_QF.new_zeros(step, grad_QF.shape[1])
            last_QF[step - left :] = grad_QF[end - left : end]
            grad_EFD[expert].addmm_(last_QF.T, x_QD[end - step : end])
    return grad_EFD


def _runs(x_QD: torch.Tensor, outputs: int) -> bool:
    """Whether grouped_mm is the way: bf16 on CUDA, fp32 on a CPU, and rows in steps of 16 bytes."""
    aligned = all(width * x_QD.element_size() % 16 == 0 for width in (x_QD.shape[1], outputs))
    best = torch.float32 if x_QD.device.type == "cpu" else torch.bfloat16
    return len(x_QD) > 0 and aligned and x_QD.dtype == best


def _groups(ends_E: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Expert, start and end of every group that has rows."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if start < end:
            yield expert, start, end
        start = end


@grouped_matmul.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_QF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_QD, weight_EFD, ends_E = ctx.saved_tensors
    wants_x, wants_weight, _ = ctx.needs_input_grad
    grad_QF = grad_QF.contiguous()
    grad_QD = grouped_matmul(grad_QF, weight_EFD.transpose(1, 2), ends_E) if wants_x else None
    return grad_QD, grouped_outer(grad_QF, x_QD, ends_E) if wants_weight else None, None


grouped_matmul.register_autograd(_differentiate, setup_context=_setup)


@register_flop_formula(torch.ops.athanor.grouped_matmul)
def _(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * x_shape[0] * weight_shape[1] * weight_shape[2])


@register_flop_formula(torch.ops.athanor.grouped_outer)
def _(grad_shape: Any, x_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * x_shape[0] * x_shape[1] * grad_shape[1])
