"""Softmax attention behind one seam: every kernel has the signature of `dense_attention`, which is the oracle.

Values may have other channels than keys; kernels that cannot have that are given both as wide (`kernels.select`).
"""

from collections.abc import Callable

import torch

from model.masks import Mask, dense, dense_bias

AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask, float], torch.Tensor]


def dense_attention(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """out_BTHC by the definition: softmax in fp32, O(T²) memory; a query that sees nothing gives 0."""
    groups = q_BTHC.shape[2] // k_BSKC.shape[2]
    k_BSHC, v_BSHC = (x.repeat_interleave(groups, dim=2) for x in (k_BSKC, v_BSKC))
    sizes = q_BTHC.shape[1], k_BSKC.shape[1], q_BTHC.device
    visible_BHTS, bias_BHTS = dense(mask, *sizes), dense_bias(mask, *sizes)
    scores_BHTS = torch.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC).float() * scale
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    scores_BHTS = scores_BHTS.masked_fill(~visible_BHTS, torch.finfo(torch.float32).min)
    weights_BHTS = scores_BHTS.softmax(-1) * visible_BHTS
    return torch.einsum("bhts,bshc->bthc", weights_BHTS.to(v_BSHC.dtype), v_BSHC)


def sdpa_attention(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """PyTorch's fused kernels; whatever is more than a direction becomes a mask of [B or 1, H or 1, T, S]."""
    fused_BHTS: torch.Tensor | None = None
    if mask.only_key_padding:
        assert mask.key_documents_BS is not None
        fused_BHTS = (mask.key_documents_BS != 0)[:, None, None]  # no row of it for every query
    elif mask.bias_HL is not None or not mask.plain:
        sizes = q_BTHC.shape[1], k_BSKC.shape[1], q_BTHC.device
        fused_BHTS, bias_BHTS = dense(mask, *sizes), dense_bias(mask, *sizes)
        if bias_BHTS is not None:
            fused_BHTS = bias_BHTS.to(q_BTHC.dtype).masked_fill(~fused_BHTS, float("-inf"))
    out_BHTC = torch.nn.functional.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BSKC.transpose(1, 2),
        v_BSKC.transpose(1, 2),
        attn_mask=fused_BHTS,
        is_causal=mask.causal and fused_BHTS is None,
        scale=scale,
        enable_gqa=q_BTHC.shape[2] != k_BSKC.shape[2],
    )
    return out_BHTC.transpose(1, 2)


def cached_attention(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """Few queries against many remembered keys: two batched products, all heads that share a key in one matrix.

    A single query of each row is computed in fp32 on a CPU: keys and values are read once in either case, and PyTorch's
    products in bf16 copy them for oneDNN, which compiles a product anew for every number of keys.
    """
    rows, tokens, heads, channels = q_BTHC.shape
    keys, kv_heads = k_BSKC.shape[1], k_BSKC.shape[2]
    q_BTKGC = (q_BTHC * scale).view(rows, tokens, kv_heads, -1, channels)
    q_NMC = q_BTKGC.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, -1, channels)
    k_NSC, v_NSC = k_BSKC.transpose(1, 2).flatten(0, 1), v_BSKC.transpose(1, 2).flatten(0, 1)
    if tokens == 1 and q_BTHC.device.type == "cpu":
        q_NMC, k_NSC, v_NSC = q_NMC.float(), k_NSC.float(), v_NSC.float()
    scores_NMS = torch.bmm(q_NMC, k_NSC.transpose(1, 2))
    if not mask.full or mask.bias_HL is not None:
        _discount(scores_NMS.view(rows, kv_heads, -1, tokens, keys), mask, heads)
    out_NMC = torch.bmm(scores_NMS.softmax(-1), v_NSC).to(q_BTHC.dtype)
    out_BKGTC = out_NMC.view(rows, kv_heads, heads // kv_heads, tokens, -1)
    return out_BKGTC.permute(0, 3, 1, 2, 4).reshape(rows, tokens, heads, -1)


def _discount(scores_BKGTS: torch.Tensor, mask: Mask, heads: int) -> None:
    """Add the mask's bias to scores, and hide what no query may see, in place."""
    _, kv_heads, _, tokens, keys = scores_BKGTS.shape
    sizes = tokens, keys, scores_BKGTS.device
    bias_BHTS = dense_bias(mask, *sizes)
    if bias_BHTS is not None:
        scores_BKGTS.add_(bias_BHTS.unflatten(1, (kv_heads, -1)))
    if mask.full:
        return
    hidden_BHTS = mask.lowered("hidden", lambda: ~dense(mask, *sizes))
    grouped = (kv_heads, -1) if hidden_BHTS.shape[1] == heads else (1, 1)
    scores_BKGTS.masked_fill_(hidden_BHTS.unflatten(1, grouped), float("-inf"))
