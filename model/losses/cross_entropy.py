"""Cross-entropy of a vocabulary head that never holds the logits of a large batch.

The logits of a whole batch are the largest tensor of a small model's training step by far. Here the logits of a chunk of
tokens are made, overwritten with their own gradient and consumed before the next chunk is made (the idea of Liger Kernel,
Hsu et al. 2024): three products of [tokens, D] and [D, V], and none again in the backward pass as recomputation would need.

Every chunk after the first adds to an fp32 [V, D] gradient, some 12 bytes of traffic an entry: nothing beside the products
of 2,000 tokens, more than they take for 64. So a chunk is as large as a budget of memory allows, and a batch that fits is
one chunk without an fp32 sum. The passes over the logits (softmax, casts) go through them a few rows at a time, which stay
in the cache, or are one kernel where they are compiled. The vocabulary is not tiled: a softmax over tiles needs the logits
twice, a fourth product.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

IGNORED = -100
LOGITS_BYTES = 1 << 29
"""Limit on the logits of a chunk, unless the fp32 gradient of the weight takes more anyway."""
CPU_PASS, GPU_PASS = 1 << 22, 1 << 24
"""Logits in one pass without a compiler: 16 MiB of fp32 stay in a CPU's cache, a GPU wants more for each launch."""


class Terms(NamedTuple):
    """Options of the loss; see `chunked_cross_entropy`."""

    soft_cap: float | None = None
    z_loss: float = 0.0
    smoothing: float = 0.0


SoftmaxGradient = Callable[[torch.Tensor, torch.Tensor, Terms], tuple[torch.Tensor, torch.Tensor]]
"""`softmax_gradient_`, or the same compiled."""


def chunk_tokens(tokens: int, vocab_size: int, d_model: int, dtype_bytes: int) -> int:
    """How many of `tokens` tokens have their logits held at once: all of them, or a share in multiples of 64.

    Equal shares where the number allows it, so that kernels tuned or compiled for a shape meet one.
    """
    budget = max(LOGITS_BYTES, 4 * vocab_size * d_model)
    max_units = max(1, budget // (vocab_size * dtype_bytes) // 64)
    units = -(-tokens // 64)
    if units <= max_units:
        return tokens
    min_chunks = -(-units // max_units)
    chunks = next((n for n in range(min_chunks, 2 * min_chunks) if units % n == 0), min_chunks)
    return 64 * -(-units // chunks)


def chunked_cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    terms: Terms = Terms(),  # noqa: B008  (frozen)
    weights_N: torch.Tensor | None = None,
    compiled: SoftmaxGradient | None = None,
) -> dict[str, torch.Tensor]:
    """fp32 sums over the targets that are not -100: `loss_sum`, `target_count` and, if asked for, `z_loss_sum`.

    terms.soft_cap: logits become cap * tanh(logits / cap). terms.z_loss: weight of Σ logsumexp² (PaLM, Chowdhery et al.
    2022). terms.smoothing: the share of every target that is spread over the whole vocabulary (Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567). weights_N: fp32, what each target weighs. compiled: for the passes over the logits.
    The value of `loss_sum` is the plain Σ NLL, fit for reports; its gradient is that of Σ NLL + z_loss Σ logsumexp², of
    the smoothed targets, each as heavy as it weighs, so that whoever minimises it minimises all that. `z_loss_sum` is the
    second term, for reports only.
    """
    device = x_ND.device.type
    valid_N = targets_N != IGNORED
    objective, nll_N, z_N = _HeadLoss.apply(
        x_ND,
        weight_VD,
        bias_V,
        targets_N.clamp(min=0),
        valid_N,
        valid_N.float() if weights_N is None else weights_N * valid_N,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype,
        terms,
        compiled,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (x_ND, weight_VD, bias_V)],
    )
    nll = nll_N.sum()
    sums = {
        "loss_sum": objective + (nll - objective).detach() if terms.z_loss else objective,
        "target_count": valid_N.sum(),
    }
    if terms.z_loss:
        sums["z_loss_sum"] = z_N.sum()
    return sums


@torch.no_grad()
def token_scores(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For evaluation: fp32 NLL of every target, and whether it was the likeliest token; 0 and false where ignored."""
    nlls, tops = [], []
    size = _chunk_size(x_ND, weight_VD)
    for chunk_ND, chunk_targets_N in zip(x_ND.split(size), targets_N.split(size), strict=True):
        for logits_NV, piece_N in _row_blocks(linear(chunk_ND, weight_VD, bias_V), chunk_targets_N):
            capped_NV = capped(logits_NV, soft_cap)
            valid_N = piece_N != IGNORED
            target_N1 = piece_N.clamp(min=0)[:, None]
            log_p_N = torch.log_softmax(capped_NV, dim=-1).gather(1, target_N1)[:, 0]
            nlls.append(torch.where(valid_N, -log_p_N, 0.0))
            tops.append(valid_N & (capped_NV.argmax(-1) == target_N1[:, 0]))
    return torch.cat(nlls), torch.cat(tops)


def _chunk_size(x_ND: torch.Tensor, weight_VD: torch.Tensor) -> int:
    vocab_size, d_model = weight_VD.shape
    return chunk_tokens(len(x_ND), vocab_size, d_model, weight_VD.element_size())


def capped(logits_NV: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    """The logits in fp32, squashed to ±soft_cap where there is one."""
    wide_NV = logits_NV.float()
    return wide_NV if soft_cap is None else soft_cap * torch.tanh(wide_NV / soft_cap)


class _HeadLoss(torch.autograd.Function):
    """(Σ NLL + z_loss Σ logsumexp², NLL per token, z_loss logsumexp² per token); only the first is differentiable, as if
    its targets were smoothed."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        valid_N: torch.Tensor,
        weights_N: torch.Tensor,
        precision: torch.dtype,
        terms: Terms,
        compiled: SoftmaxGradient | None,
        needs_grad: list[bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Also computes the gradients that `needs_grad` names, of x, weight and bias, for an incoming gradient of 1.

        targets_N: int64 from 0 to V - 1, of ignored tokens too. valid_N: bool. weights_N: fp32, 0 where ignored; they
        weigh the gradients, not the values. precision: of the products; sums over chunks are fp32.
        """
        ctx.dtypes = [None if x is None else x.dtype for x in (x_ND, weight_VD, bias_V)]
        x_ND, weight_VD = x_ND.to(precision), weight_VD.to(precision)
        bias_V = None if bias_V is None else bias_V.to(precision)
        nlls, zs, grads_x = [], [], []
        grad_weight_VD, grad_bias_V = None, None
        size = _chunk_size(x_ND, weight_VD)
        parts = (tensor.split(size) for tensor in (x_ND, targets_N, weights_N))
        for chunk_ND, chunk_targets_N, chunk_weights_N in zip(*parts, strict=True):
            logits_NV = linear(chunk_ND, weight_VD, bias_V)
            nll_N, z_N = _chunk_loss_(logits_NV, chunk_targets_N, terms, compiled or _softmax_gradient_by_row_blocks_)
            grad_NV = logits_NV  # overwritten in place
            nlls.append(nll_N)
            zs.append(z_N)
            # Tokens are weighed, ignored ones by 0, on the narrow side of both products; grad_NV is the wide one.
            weights_N1 = chunk_weights_N[:, None].to(precision)
            if needs_grad[0]:
                grads_x.append((grad_NV @ weight_VD) * weights_N1)
            if needs_grad[1]:
                grad_weight_VD = _accumulate_product(grad_weight_VD, grad_NV.T, chunk_ND * weights_N1, size < len(x_ND))
            if needs_grad[2]:
                grad_bias_V = _accumulate_product(grad_bias_V, grad_NV.T, weights_N1, size < len(x_ND))
        nll_N, z_N = torch.cat(nlls) * valid_N, torch.cat(zs) * valid_N
        grad_bias_V = None if grad_bias_V is None else grad_bias_V[:, 0]
        ctx.save_for_backward(torch.cat(grads_x) if needs_grad[0] else None, grad_weight_VD, grad_bias_V)
        ctx.mark_non_differentiable(nll_N, z_N)
        return (nll_N + z_N).sum(), nll_N, z_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients made in the forward pass, times that of the loss."""
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if grad is None else _scaled(grad, grads[0], dtype) for grad, dtype in gradients]
        return *scaled, None, None, None, None, None, None, None


def _scaled(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """grad * scale (fp32, []) in `dtype`, without rounding to grad's own between; a product of two types would widen a
    copy of grad and write a third tensor."""
    return grad.to(scale.dtype, copy=True).mul_(scale).to(dtype)


def _accumulate_product(
    sum_VD: torch.Tensor | None, a_VN: torch.Tensor, b_ND: torch.Tensor, more: bool
) -> torch.Tensor:
    """sum_VD + a_VN b_ND, in place where there is a sum. more: products follow, so the sum is fp32."""
    if sum_VD is None:
        product_VD = a_VN @ b_ND
        return product_VD.float() if more else product_VD
    if a_VN.dtype == sum_VD.dtype:
        return sum_VD.addmm_(a_VN, b_ND)
    return sum_VD.add_(a_VN @ b_ND)


def _chunk_loss_(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, terms: Terms, softmax_gradient: SoftmaxGradient
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 NLL and z-loss of each token; d(smoothed NLL + z-loss)/d logits takes the place of the logits."""
    target_N1 = targets_N[:, None]
    lse_N1, target_logit_N1 = softmax_gradient(logits_NV, target_N1, terms)
    # The target's own entry, of which one is subtracted, recomputed in fp32.
    grad_N1 = (target_logit_N1 - lse_N1).exp()
    if terms.z_loss:
        grad_N1 *= 1 + 2 * terms.z_loss * lse_N1
    grad_N1 += terms.smoothing - 1.0
    if terms.smoothing:
        grad_N1 -= terms.smoothing / logits_NV.shape[1]
    if terms.soft_cap is not None:
        grad_N1 *= 1 - (target_logit_N1 / terms.soft_cap).square()
    # Not scatter_, which copies all logits, twice, on a CPU.
    row_N = torch.arange(len(targets_N), device=targets_N.device)
    logits_NV.index_put_((row_N, targets_N), grad_N1[:, 0].to(logits_NV.dtype))
    return (lse_N1 - target_logit_N1)[:, 0], terms.z_loss * lse_N1[:, 0].square()


def softmax_gradient_(
    logits_NV: torch.Tensor, target_N1: torch.Tensor, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logsumexp and the target's (capped) logit, [N, 1] each; the gradient of a token without a target takes the
    place of the logits. `torch.compile` makes one kernel of it."""
    capped_NV = capped(logits_NV, terms.soft_cap)
    target_logit_N1 = capped_NV.gather(1, target_N1)
    grad_NV = capped_NV.softmax(-1)
    # The likeliest token's probability is at least 1/V, so this logsumexp is exact where log p of the target is not.
    lse_N1 = capped_NV.amax(-1, keepdim=True) - grad_NV.amax(-1, keepdim=True).log()
    if terms.z_loss:
        grad_NV *= 1 + 2 * terms.z_loss * lse_N1
    if terms.smoothing:
        grad_NV -= terms.smoothing / grad_NV.shape[-1]
    if terms.soft_cap is not None:
        grad_NV *= 1 - (capped_NV / terms.soft_cap).square()
    logits_NV.copy_(grad_NV)
    return lse_N1, target_logit_N1


def _softmax_gradient_by_row_blocks_(
    logits_NV: torch.Tensor, target_N1: torch.Tensor, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax_gradient_`, a few rows at a time."""
    parts = [softmax_gradient_(*piece, terms) for piece in _row_blocks(logits_NV, target_N1)]
    lse_N1, target_logit_N1 = (torch.cat(column) for column in zip(*parts, strict=True))
    return lse_N1, target_logit_N1


def _row_blocks(logits_NV: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in blocks of rows, each as large as one pass takes."""
    rows = max(1, (CPU_PASS if logits_NV.device.type == "cpu" else GPU_PASS) // logits_NV.shape[1])
    return zip(logits_NV.split(rows), targets.split(rows), strict=True)
