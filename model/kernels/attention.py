"""Softmax attention behind one seam: every kernel has the signature of `dense_attention`, which is the oracle."""

from collections.abc import Callable

import torch

from model.errors import ModelError
from model.kernels.blockwise import blockwise_attention
from model.masks import Mask, dense

AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask, float], torch.Tensor]


def dense_attention(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """out_BTHC by the definition: softmax in fp32, O(T²) memory; a query that sees nothing gives 0."""
    groups = q_BTHC.shape[2] // k_BSKC.shape[2]
    k_BSHC, v_BSHC = (x.repeat_interleave(groups, dim=2) for x in (k_BSKC, v_BSKC))
    visible_BTS = dense(mask, q_BTHC.shape[1], k_BSKC.shape[1], q_BTHC.device)
    scores_BHTS = torch.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC).float() * scale
    scores_BHTS = scores_BHTS.masked_fill(~visible_BTS[:, None], torch.finfo(torch.float32).min)
    weights_BHTS = scores_BHTS.softmax(-1) * visible_BTS[:, None]
    return torch.einsum("bhts,bshc->bthc", weights_BHTS.to(v_BSHC.dtype), v_BSHC)


def sdpa_attention(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """PyTorch's fused kernels; documents become a boolean mask of [B, 1, T, S]."""
    if mask.slots_BT is not None:
        return cached_attention(q_BTHC, k_BSKC, v_BSKC, mask, scale)
    visible_B1TS: torch.Tensor | None = None
    if mask.documents_BT is not None or mask.key_documents_BS is not None:
        visible_B1TS = dense(mask, q_BTHC.shape[1], k_BSKC.shape[1], q_BTHC.device)[:, None]
    out_BHTC = torch.nn.functional.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BSKC.transpose(1, 2),
        v_BSKC.transpose(1, 2),
        attn_mask=visible_B1TS,
        is_causal=mask.causal and visible_B1TS is None,
        scale=scale,
        enable_gqa=q_BTHC.shape[2] != k_BSKC.shape[2],
    )
    return out_BHTC.transpose(1, 2)


def cached_attention(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """Few queries against many remembered keys: two batched products, all heads that share a key in one matrix.

    The fused CPU kernel takes ten times as long for a single query of each row.
    """
    rows, tokens, heads, channels = q_BTHC.shape
    kv_heads = k_BSKC.shape[2]
    q_BKMC = (q_BTHC * scale).view(rows, tokens, kv_heads, -1, channels).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores_BKMS = q_BKMC @ k_BSKC.permute(0, 2, 3, 1)
    scores_BKMS.unflatten(2, (-1, tokens)).masked_fill_(mask.hidden[:, None, None], float("-inf"))
    out_BKMC = scores_BKMS.softmax(-1, dtype=torch.float32).to(v_BSKC.dtype) @ v_BSKC.transpose(1, 2)
    out_BKGTC = out_BKMC.unflatten(2, (-1, tokens))
    return out_BKGTC.permute(0, 3, 1, 2, 4).reshape(rows, tokens, heads, channels)


def blockwise_or_fused(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """Blockwise where it applies, causal self-attention on the CPU; PyTorch's fused kernels for everything else."""
    if mask.causal and mask.slots_BT is None and q_BTHC.device.type == "cpu":
        out_BTHC: torch.Tensor = blockwise_attention(q_BTHC, k_BSKC, v_BSKC, mask.documents_BT, scale)
        return out_BTHC
    return sdpa_attention(q_BTHC, k_BSKC, v_BSKC, mask, scale)


KERNELS: dict[str, AttentionKernel] = {
    "dense": dense_attention,
    "sdpa": sdpa_attention,
    "blockwise": blockwise_or_fused,
}


def select_kernel(name: str, device: torch.device) -> tuple[str, AttentionKernel]:
    """The kernel of that name; `auto` takes the fastest one that runs here. Raises ModelError for an unknown name."""
    fastest = "sdpa" if device.type == "cuda" else "blockwise"
    chosen = fastest if name == "auto" else name
    if chosen not in KERNELS:
        raise ModelError(f"kernel is {name!r}: choose auto, {' or '.join(KERNELS)}.")
    return chosen, KERNELS[chosen]
