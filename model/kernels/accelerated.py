"""Attention on CUDA: PyTorch's varlen and FlexAttention, and the flash-attn package where it is installed.

All is imported when first used: a machine without CUDA never compiles or loads any of it.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from model.errors import ModelError
from model.kernels.columns import by_columns
from model.masks import Mask
from model.uncompiled import uncompiled

HALF = (torch.bfloat16, torch.float16)
SEQUENCES_QUANTUM = 64  # counts of packed documents are rounded up to it, so that shapes repeat
FLASH_PACKAGES = ("flash_attn_interface", "flash_attn")  # of Hopper, of all since Ampere

Packed = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, tuple[int, int], float], torch.Tensor
]  # q_NHC, k_NKC, v_NKC, first token of every sequence and the end, longest, (tokens seen behind, ahead), scale


def varlen_attention(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """Documents and windows by PyTorch's varlen kernel; fp32, which it has not, by FlexAttention."""
    if q_BTHC.dtype not in HALF:
        return flex_attention(q_BTHC, k_BTKC, v_BTKC, mask, scale)
    return packed_attention(q_BTHC, k_BTKC, v_BTKC, mask, scale, _torch_varlen)


def flash_attention(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """Documents and windows by the flash-attn package; fp32, which it has not, by FlexAttention."""
    if q_BTHC.dtype not in HALF:
        return flex_attention(q_BTHC, k_BTKC, v_BTKC, mask, scale)
    return packed_attention(q_BTHC, k_BTKC, v_BTKC, mask, scale, _flash_varlen)


def flash_installed() -> bool:
    """Whether one of the flash-attn packages can be imported."""
    return any(importlib.util.find_spec(name) is not None for name in FLASH_PACKAGES)


@uncompiled
def packed_attention(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: Mask, scale: float, attend: Packed
) -> torch.Tensor:
    """Self-attention within every document (each row one, if there are none) and window; padding gives 0."""
    rows, tokens = q_BTHC.shape[:2]
    starts = mask.lowered("sequences", lambda: sequence_starts(mask, rows, tokens, q_BTHC.device))
    reach = -1 if mask.window is None else mask.window - 1
    q_NHC, k_NKC, v_NKC = (x.flatten(0, 1).contiguous() for x in (q_BTHC, k_BTKC, v_BTKC))
    out_NHC = attend(q_NHC, k_NKC, v_NKC, starts, tokens, (reach, 0 if mask.causal else reach), scale)
    out_BTHC = out_NHC.view(q_BTHC.shape)
    if mask.documents_BT is None:
        return out_BTHC
    return out_BTHC.masked_fill((mask.documents_BT == 0)[:, :, None, None], 0.0)


def sequence_starts(mask: Mask, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """int32: where each run of one document begins in the flattened rows, then the end, again and again to fill up.

    One wait for the device in each pass: how many documents there are. Empty sequences at the end cost nothing.
    """
    if mask.documents_BT is None:
        return torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=device)
    first_BT = torch.ones_like(mask.documents_BT, dtype=torch.bool)
    first_BT[:, 1:] = mask.documents_BT[:, 1:] != mask.documents_BT[:, :-1]
    starts = first_BT.flatten().nonzero()[:, 0].int()
    filling = SEQUENCES_QUANTUM - len(starts) % SEQUENCES_QUANTUM
    return torch.nn.functional.pad(starts, (0, filling), value=rows * tokens)


def _torch_varlen(
    q_NHC: torch.Tensor,
    k_NKC: torch.Tensor,
    v_NKC: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    reach: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shared = q_NHC.shape[1] != k_NKC.shape[1]
    out = varlen_attn(
        q_NHC, k_NKC, v_NKC, starts, starts, longest, longest, scale=scale, window_size=reach, enable_gqa=shared
    )
    assert isinstance(out, torch.Tensor)
    return out


def _flash_varlen(
    q_NHC: torch.Tensor,
    k_NKC: torch.Tensor,
    v_NKC: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    reach: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    found = next(name for name in FLASH_PACKAGES if importlib.util.find_spec(name) is not None)
    attend: Any = importlib.import_module(found).flash_attn_varlen_func
    out = attend(
        q_NHC,
        k_NKC,
        v_NKC,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=reach[1] == 0,
        window_size=reach,
    )
    attended: torch.Tensor = out[0] if isinstance(out, tuple) else out  # flash-attn 3 has returned (out, lse)
    return attended


def flex_attention(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """Any mask and bias by FlexAttention (https://arxiv.org/abs/2412.05496), which skips the blocks that see nothing.

    The mask's rule is its `mask_mod` as it stands. Its block mask is made once for all layers of a pass. Compiled where
    there is CUDA; elsewhere PyTorch's own unfused form runs, of T² memory, for tests.
    """
    if mask.grid is not None and mask.grid.pattern == "column" and q_BTHC.shape[1] == k_BTKC.shape[1]:
        return by_columns(flex_attention, q_BTHC, k_BTKC, v_BTKC, mask, scale)
    flex, block_mask_of = _flex(q_BTHC.device.type == "cuda")
    (rows, queries, heads, _), keys = q_BTHC.shape, k_BTKC.shape[1]

    def rule(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask.allows(row, head, query, key)  # FlexAttention counts arguments, and takes no bound method

    def lower() -> Any:
        shape = rows if _differs_by_row(mask) else None, heads if mask.layout_HQJ is not None else None
        return block_mask_of(rule, *shape, queries, keys, device=q_BTHC.device)

    plain = mask.plain and not mask.causal
    out_BHTC: torch.Tensor = flex(
        q_BTHC.transpose(1, 2),
        k_BTKC.transpose(1, 2),
        v_BTKC.transpose(1, 2),
        score_mod=_score_mod(mask),
        block_mask=None if plain else mask.lowered(("flex", queries, keys), lower),
        scale=scale,
        enable_gqa=heads != k_BTKC.shape[2],
    )
    return out_BHTC.transpose(1, 2)


def _score_mod(mask: Mask) -> Callable[..., torch.Tensor] | None:
    counted = mask.layout_HQJ is not None and mask.layout_HQJ.dtype != torch.bool
    if mask.bias_HL is None and not counted:
        return None

    def add_bias(
        score: torch.Tensor, row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        bias = mask.bias(row, head, query, key)
        assert bias is not None
        return score + bias

    return add_bias


def _differs_by_row(mask: Mask) -> bool:
    parts = (mask.documents_BT, mask.key_documents_BS, mask.prefix_B, mask.globals_BT, mask.slots_BT)
    return any(part is not None for part in parts)


@cache
def _flex(compiled: bool) -> tuple[Any, Any]:
    """(flex_attention, create_block_mask)."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise ModelError(f"this PyTorch has no FlexAttention ({error}): choose kernel=sdpa or install 2.6.") from error
    return (torch.compile(flex_attention, dynamic=False) if compiled else flex_attention), create_block_mask
