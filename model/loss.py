"""Cross-entropy of a vocabulary head, a chunk of tokens at a time.

The logits of a whole batch are the largest tensor of a small model's training step by far. Here a chunk's logits are
made, turned into their own gradient and consumed before the next chunk is made (the idea of Liger Kernel, Hsu et al.
2024): never a [B, T, V] in fp32, and no second head matmul in the backward pass as recomputation would need.
"""

from typing import Any

import torch
from torch.nn.functional import linear

IGNORED = -100
CHUNK_ELEMENTS = 1 << 22


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose fp32 logits fill about 16 MiB."""
    return max(64, CHUNK_ELEMENTS // vocab_size // 64 * 64)


def chunked_cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    weights_N: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """fp32 sums over the targets that are not -100: `loss_sum`, `target_count` and, if asked for, `z_loss_sum`.

    soft_cap: logits become cap * tanh(logits / cap). z_loss: weight of Σ logsumexp² (PaLM, Chowdhery et al. 2022).
    smoothing: the share of every target that is spread over the whole vocabulary (Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567). weights_N: fp32, what each target weighs.
    The value of `loss_sum` is the plain Σ NLL, fit for reports; its gradient is that of Σ NLL + z_loss Σ logsumexp², of
    the smoothed targets, each as heavy as it weighs, so that whoever minimises it minimises all that. `z_loss_sum` is the
    second term, for reports only.
    """
    device = x_ND.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    valid_N = targets_N != IGNORED
    objective, nll_N, z_N = _HeadLoss.apply(
        x_ND.to(precision),
        weight_VD.to(precision),
        None if bias_V is None else bias_V.to(precision),
        targets_N.clamp(min=0),
        valid_N,
        valid_N.float() if weights_N is None else weights_N * valid_N,
        soft_cap,
        z_loss,
        smoothing,
        torch.is_grad_enabled() and x_ND.requires_grad,
        torch.is_grad_enabled() and weight_VD.requires_grad,
        torch.is_grad_enabled() and bias_V is not None and bias_V.requires_grad,
    )
    nll = nll_N.sum()
    sums = {"loss_sum": objective + (nll - objective).detach() if z_loss else objective, "target_count": valid_N.sum()}
    if z_loss:
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
    pieces = (tensor.split(chunk_tokens(weight_VD.shape[0])) for tensor in (x_ND, targets_N))
    for chunk_ND, chunk_targets_N in zip(*pieces, strict=True):
        logits_NV = capped(linear(chunk_ND, weight_VD, bias_V), soft_cap)
        valid_N = chunk_targets_N != IGNORED
        target_N1 = chunk_targets_N.clamp(min=0)[:, None]
        log_p_N = torch.log_softmax(logits_NV, dim=-1).gather(1, target_N1)[:, 0]
        nlls.append(torch.where(valid_N, -log_p_N, 0.0))
        tops.append(valid_N & (logits_NV.argmax(-1) == target_N1[:, 0]))
    return torch.cat(nlls), torch.cat(tops)


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
        soft_cap: float | None,
        z_loss: float,
        smoothing: float,
        wants_x: bool,
        wants_weight: bool,
        wants_bias: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Makes the gradients that are wanted too, for an incoming gradient of 1: sums over chunks in fp32.

        x_ND, weight_VD, bias_V: in one precision. targets_N: int64 from 0 to V - 1, of ignored tokens too. valid_N: bool.
        weights_N: fp32, 0 where ignored; they weigh the gradients, not the values.
        """
        nlls, zs, grads_x = [], [], []
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        pieces = (tensor.split(chunk_tokens(weight_VD.shape[0])) for tensor in (x_ND, targets_N, valid_N, weights_N))
        for chunk_ND, chunk_targets_N, chunk_valid_N, chunk_weights_N in zip(*pieces, strict=True):
            logits_NV = linear(chunk_ND, weight_VD, bias_V)
            nll_N, z_N, grad_NV = _chunk_loss(logits_NV, chunk_targets_N, soft_cap, z_loss, smoothing)
            nlls.append(nll_N * chunk_valid_N)
            zs.append(z_N * chunk_valid_N)
            # Tokens are weighed, ignored ones by 0, on the narrow side of both products; grad_NV is the wide one.
            weights_N1 = chunk_weights_N[:, None].to(chunk_ND.dtype)
            if wants_x:
                grads_x.append((grad_NV @ weight_VD) * weights_N1)
            if grad_weight_VD is not None:
                grad_weight_VD += grad_NV.T @ (chunk_ND * weights_N1)
            if grad_bias_V is not None:
                grad_bias_V += (grad_NV.T @ weights_N1)[:, 0]
        nll_N, z_N = torch.cat(nlls), torch.cat(zs)
        ctx.save_for_backward(torch.cat(grads_x) if wants_x else None, grad_weight_VD, grad_bias_V)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_N, z_N)
        return (nll_N + z_N).sum(), nll_N, z_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients made in the forward pass, times that of the loss."""
        scale = grads[0]
        grad_x_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        if grad_x_ND is not None:
            grad_x_ND = (grad_x_ND * scale).to(grad_x_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * scale).to(ctx.weight_dtype)
        if grad_bias_V is not None:
            grad_bias_V = (grad_bias_V * scale).to(ctx.weight_dtype)
        return grad_x_ND, grad_weight_VD, grad_bias_V, None, None, None, None, None, None, None, None, None


def _chunk_loss(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, soft_cap: float | None, z_loss: float, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 NLL and z-loss of each token, and d(smoothed NLL + z-loss)/d logits in the logits' precision."""
    capped_NV = capped(logits_NV, soft_cap)
    target_N1 = targets_N[:, None]
    grad_NV = capped_NV.softmax(-1)
    # The likeliest token's probability is at least 1/V, so this logsumexp is exact where log p of the target is not.
    lse_N1 = capped_NV.amax(-1, keepdim=True) - grad_NV.amax(-1, keepdim=True).log()
    nll_N1 = lse_N1 - capped_NV.gather(1, target_N1)
    if z_loss:
        grad_NV *= 1 + 2 * z_loss * lse_N1
    grad_NV.scatter_add_(1, target_N1, torch.full_like(nll_N1, smoothing - 1.0))
    if smoothing:
        grad_NV -= smoothing / grad_NV.shape[-1]
    if soft_cap is not None:
        grad_NV *= 1 - (capped_NV / soft_cap).square()
    return nll_N1[:, 0], z_loss * lse_N1[:, 0].square(), grad_NV.to(logits_NV.dtype)
