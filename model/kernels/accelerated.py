"""Attention on CUDA: PyTorch's varlen and FlexAttention, and the flash-attn package where it is installed.

All is imported when first used: a machine without CUDA never compiles or loads any of it.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from conf.refusal import NO_VALUE, Refusal
from model.kernels.columns import by_columns
from model.masks import Mask
from model.uncompiled import uncompiled

HALF = (torch.bfloat16, torch.float16)
SEQUENCES_QUANTUM = 64  # counts of packed documents are rounded up to it, so that shapes repeat
FLASH_PACKAGES = ("flash_attn_interface", "flash_attn")  # of Hopper, of all since Ampere

Packed = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "Sequences", tuple[int, int], float], torch.Tensor
]  # q_NHC, k_NKC, v_NKC, where each sequence is, (tokens seen behind, ahead), scale


class Sequences(NamedTuple):
    """Of queries and of keys, int32: the first token of every sequence and the end; and the longest there may be."""

    starts: torch.Tensor
    key_starts: torch.Tensor
    longest: int
    longest_key: int


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
    """Attention within every document (each row one, if there are none) and window; padding gives 0."""
    if mask.documents_BT is not None and mask.key_documents_BS is not None:
        return _paired_attention(q_BTHC, k_BTKC, v_BTKC, mask, scale, attend)
    rows, tokens = q_BTHC.shape[:2]
    starts = mask.lowered("sequences", lambda: sequence_starts(mask, rows, tokens, q_BTHC.device))
    reach = -1 if mask.window is None else mask.window - 1
    q_NHC, k_NKC, v_NKC = (x.flatten(0, 1).contiguous() for x in (q_BTHC, k_BTKC, v_BTKC))
    sequences = Sequences(starts, starts, tokens, tokens)
    out_NHC = attend(q_NHC, k_NKC, v_NKC, sequences, (reach, 0 if mask.causal else reach), scale)
    out_BTHC = out_NHC.view(q_BTHC.shape)
    if mask.documents_BT is None:
        return out_BTHC
    return out_BTHC.masked_fill((mask.documents_BT == 0)[:, :, None, None], 0.0)


def _paired_attention(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float, attend: Packed
) -> torch.Tensor:
    """Between documents of queries and those of keys with the same row and number, gathered into the same order."""
    at_N, key_at_N, starts, key_starts = mask.lowered("pairs", lambda: document_pairs(mask))
    if not len(at_N):  # nothing sees anything, yet all three have a gradient
        return q_BTHC * 0.0 + (k_BSKC.sum() + v_BSKC.sum()) * 0.0
    k_NKC, v_NKC = (x.flatten(0, 1).index_select(0, key_at_N) for x in (k_BSKC, v_BSKC))
    q_NHC = q_BTHC.flatten(0, 1)
    sequences = Sequences(starts, key_starts, q_BTHC.shape[1], k_BSKC.shape[1])
    out_NHC = attend(q_NHC.index_select(0, at_N), k_NKC, v_NKC, sequences, (-1, -1), scale)
    return torch.zeros_like(q_NHC).index_copy(0, at_N, out_NHC).view(q_BTHC.shape)


def document_pairs(mask: Mask) -> tuple[torch.Tensor, ...]:
    """Places of the queries and of the keys that have a partner, document by document, and where each of these begins.

    Waits for the device, once in each pass: how many there are.
    """
    assert mask.documents_BT is not None and mask.key_documents_BS is not None
    both = mask.documents_BT.long(), mask.key_documents_BS.long()
    numbers = 1 + int(max(documents_BT.max() for documents_BT in both))
    rows = len(both[0])
    row_B1 = torch.arange(rows, device=both[0].device)[:, None]
    names = [(row_B1 * numbers + documents_BT).flatten() for documents_BT in both]  # 0 is padding
    counts = [name_N.bincount(minlength=rows * numbers) for name_N in names]
    kept = (counts[0] > 0) & (counts[1] > 0)
    kept[::numbers] = False
    places = [name_N.argsort(stable=True) for name_N in names]
    places = [at_N[kept[name_N[at_N]]] for at_N, name_N in zip(places, names, strict=True)]
    starts = [torch.nn.functional.pad(count[kept].cumsum(0), (1, 0)).int() for count in counts]
    return *places, *starts


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
    sequences: Sequences,
    reach: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shared = q_NHC.shape[1] != k_NKC.shape[1]
    out = varlen_attn(q_NHC, k_NKC, v_NKC, *sequences, scale=scale, window_size=reach, enable_gqa=shared)
    assert isinstance(out, torch.Tensor)
    return out


def _flash_varlen(
    q_NHC: torch.Tensor,
    k_NKC: torch.Tensor,
    v_NKC: torch.Tensor,
    sequences: Sequences,
    reach: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    found = next(name for name in FLASH_PACKAGES if importlib.util.find_spec(name) is not None)
    attend: Any = importlib.import_module(found).flash_attn_varlen_func
    out = attend(
        q_NHC,
        k_NKC,
        v_NKC,
        cu_seqlens_q=sequences.starts,
        cu_seqlens_k=sequences.key_starts,
        max_seqlen_q=sequences.longest,
        max_seqlen_k=sequences.longest_key,
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

    The mask's rule is its `mask_mod` as it stands. Its block mask is made once for all layers of a pass, by way of a bool
    for every pair: the one thing of T² that it holds, and only while that is made. Compiled where there is CUDA;
    elsewhere PyTorch's own unfused form runs, of T² memory, for tests.
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
        raise Refusal(
            "model", NO_VALUE, f"this PyTorch has no FlexAttention ({error})", "choose the kernel sdpa or install 2.6"
        ) from error
    return (torch.compile(flex_attention, dynamic=False) if compiled else flex_attention), create_block_mask
