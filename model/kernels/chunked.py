"""Sparse attention of any pattern without T²: every block of queries gathers the blocks of keys it may look at.

For Longformer (https://arxiv.org/abs/2004.05150), BigBird (https://arxiv.org/abs/2007.14062), prefix-LM, and whatever
else a `Mask` says. Blocks that see equally many blocks are computed together; one that sees everything, because a
global token is in it, costs O(T), and of these there are few. The mask's rule is evaluated once for all layers, and
only where a block of queries sees less than all of its gathered keys. Gradients compute the weights again, so what is
held grows with T times the keys a query looks at in pieces of bounded size.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from model.kernels.columns import by_columns
from model.kernels.sizes import rounded
from model.masks import Mask
from model.uncompiled import uncompiled

CHUNK_ELEMENTS = 1 << 20  # scores held at a time, unless those of one block are more


@dataclass(frozen=True)
class Chunk:
    """Blocks of queries that gather equally many blocks of keys.

    row_P, head_P: of which row and head each is; all zero where the mask is the same for all. query_block_P: its
    number. key_blocks_PJ: the blocks it gathers. visible_PTS: who may look at whom; none where all may.
    """

    row_P: torch.Tensor
    head_P: torch.Tensor
    query_block_P: torch.Tensor
    key_blocks_PJ: torch.Tensor
    visible_PTS: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """All chunks of a mask; by_row, by_head: whether rows and heads differ in what they see."""

    chunks: list[Chunk]
    by_row: bool
    by_head: bool


@uncompiled
def chunked_attention(
    q_BTHC: torch.Tensor, k_BSKC: torch.Tensor, v_BSKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """out_BTHC of self-attention under any mask but that of cached decoding; a query that sees nothing gives 0."""
    if mask.grid is not None and mask.grid.pattern == "column":
        return by_columns(chunked_attention, q_BTHC, k_BSKC, v_BSKC, mask, scale)
    tokens = q_BTHC.shape[1]
    plan = mask.lowered(("chunks", tokens), lambda: plan_chunks(mask, tokens, q_BTHC.device))
    out_BTHC: torch.Tensor = _Chunked.apply(q_BTHC, k_BSKC, v_BSKC, mask.bias_HL, plan, mask.block, scale)
    return out_BTHC


def plan_chunks(mask: Mask, tokens: int, device: torch.device) -> Plan:
    """Which blocks meet, and who sees whom in them: linear in `tokens` but for one bit a pair of blocks."""
    meets_BHQJ, times = _repeated(meeting_blocks(mask, tokens, device), mask)
    entries_PM = meets_BHQJ.sum(-1).nonzero()  # row, head, query block of those that see anything
    counts_P = meets_BHQJ.sum(-1)[tuple(entries_PM.T)]
    # Few distinct counts: rounded up to two binary digits after the leading one, no more than there are.
    sizes_P = torch.tensor([min(rounded(n, 2), meets_BHQJ.shape[-1]) for n in range(meets_BHQJ.shape[-1] + 1)])
    sizes_P = sizes_P.to(device)[counts_P]
    chunks: list[Chunk] = []
    for size in sizes_P.unique().tolist():
        chosen_PM = entries_PM[sizes_P == size]
        most = max(1, CHUNK_ELEMENTS // (size * mask.block**2))
        for part_PM in chosen_PM.split(most):
            row_P, head_P, block_P = part_PM.unbind(1)
            met_PJ, key_blocks_PJ = meets_BHQJ[row_P, head_P, block_P].int().sort(dim=-1, descending=True, stable=True)
            met_PJ, key_blocks_PJ = met_PJ[:, :size].bool(), key_blocks_PJ[:, :size] // times
            visible_PTS = _visible(mask, tokens, row_P, head_P, block_P, key_blocks_PJ, met_PJ)
            full_P = visible_PTS.flatten(1).all(1)
            for whole in (True, False):
                if (which_P := full_P == whole).any():
                    seen_PTS = None if whole else visible_PTS[which_P]
                    indices = row_P[which_P], head_P[which_P], block_P[which_P], key_blocks_PJ[which_P]
                    chunks.append(Chunk(*indices, seen_PTS))
    return Plan(chunks, by_row=meets_BHQJ.shape[0] > 1, by_head=meets_BHQJ.shape[1] > 1)


def meeting_blocks(mask: Mask, tokens: int, device: torch.device) -> torch.Tensor:
    """bool [B or 1, H or 1, Q, J]: blocks in which some query may see some key; a few too many do no harm."""
    size = mask.block
    count = -(-tokens // size)
    query_Q1, key_J = torch.arange(count, device=device)[:, None], torch.arange(count, device=device)
    meets_BHQJ = torch.ones(1, 1, count, count, dtype=torch.bool, device=device)
    if mask.window is not None:
        nearest_QJ = ((query_Q1 - key_J).abs() - 1) * size + 1  # tokens between the nearest two of these blocks
        meets_BHQJ = meets_BHQJ & (nearest_QJ < mask.window)
    if mask.layout_HQJ is not None:
        meets_BHQJ = meets_BHQJ & (mask.layout_HQJ[None, :, :count, :count] > 0)
    if mask.grid is not None:
        meets_BHQJ = meets_BHQJ & mask.grid.meeting(size, query_Q1, key_J)
    if mask.globals_BT is not None:
        any_BQ = _blocks(mask.globals_BT, size).any(-1)
        meets_BHQJ = meets_BHQJ | any_BQ[:, None, :, None] | any_BQ[:, None, None, :]
    if mask.causal:
        meets_BHQJ = meets_BHQJ & (key_J <= query_Q1)
    if mask.prefix_B is not None:
        meets_BHQJ = meets_BHQJ | (key_J * size < mask.prefix_B[:, None, None, None])
    if mask.documents_BT is not None:
        changed_BT = mask.documents_BT[:, 1:] != mask.documents_BT[:, :-1]
        run_BT = torch.nn.functional.pad(changed_BT.long().cumsum(1), (1, 0), value=0)  # rises along the row
        last_BQ = _blocks(run_BT, size).amax(-1)
        first_BQ = run_BT[:, ::size]
        overlap_BQJ = (first_BQ[:, :, None] <= last_BQ[:, None]) & (first_BQ[:, None] <= last_BQ[:, :, None])
        real_BQ = _blocks(mask.documents_BT != 0, size).any(-1)
        meets_BHQJ = meets_BHQJ & (overlap_BQJ & real_BQ[:, :, None] & real_BQ[:, None])[:, None]
    return meets_BHQJ


def _repeated(meets_BHQJ: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, int]:
    """Every block of keys as many times as the most any counts, true as often as it counts here; and that number."""
    if mask.layout_HQJ is None or mask.layout_HQJ.dtype == torch.bool:
        return meets_BHQJ, 1
    count = meets_BHQJ.shape[-1]
    counts_HQJ = mask.layout_HQJ[:, :count, :count].clamp(min=1)
    times = int(counts_HQJ.max())
    counted_HQJM = counts_HQJ[..., None] > torch.arange(times, device=counts_HQJ.device)
    return (meets_BHQJ[..., None] & counted_HQJM).flatten(3), times


def _blocks(x_BT: torch.Tensor, size: int) -> torch.Tensor:
    """x_BT padded with zeros, and a last axis for the tokens of a block."""
    return torch.nn.functional.pad(x_BT, (0, -x_BT.shape[1] % size)).unflatten(1, (-1, size))


def _visible(
    mask: Mask,
    tokens: int,
    row_P: torch.Tensor,
    head_P: torch.Tensor,
    block_P: torch.Tensor,
    key_blocks_PJ: torch.Tensor,
    met_PJ: torch.Tensor,
) -> torch.Tensor:
    step_T = torch.arange(mask.block, device=row_P.device)
    query_PT1 = (block_P[:, None] * mask.block + step_T)[..., None]
    key_P1S = (key_blocks_PJ[..., None] * mask.block + step_T).flatten(1)[:, None]
    inside_PTS = (key_P1S < tokens) & met_PJ.repeat_interleave(mask.block, 1)[:, None]
    row_P11, head_P11 = row_P[:, None, None], head_P[:, None, None]
    seen_PTS = mask.allows(row_P11, head_P11, query_PT1.clamp(max=tokens - 1), key_P1S.clamp(max=tokens - 1))
    return seen_PTS & inside_PTS


@dataclass(frozen=True)
class _Piece:
    """Some entries of a chunk, rows and heads: what is gathered for them, merged to one batch of matrices.

    queries_at, keys_at: where it comes from in the blocks. bias_at: the places in bias_HL, flattened.
    """

    queries_at: tuple[torch.Tensor, ...]
    keys_at: tuple[torch.Tensor, ...]
    q_MTC: torch.Tensor
    k_MSC: torch.Tensor
    v_MSC: torch.Tensor
    weights_MTS: torch.Tensor
    bias_at: torch.Tensor | None


class _Blocks:
    """q, k and v cut into blocks of tokens. Heads that see alike share their key/value head's product."""

    def __init__(
        self,
        q_BTHC: torch.Tensor,
        k_BTKC: torch.Tensor,
        v_BTKC: torch.Tensor,
        bias_HL: torch.Tensor | None,
        plan: Plan,
        block: int,
        scale: float,
    ) -> None:
        self.plan, self.block, self.bias_HL = plan, block, bias_HL
        self.heads_per_key = q_BTHC.shape[2] // k_BTKC.shape[2]
        self.units = q_BTHC.shape[2] if plan.by_head else k_BTKC.shape[2]
        self.groups = q_BTHC.shape[2] // self.units  # query heads in one product
        self.q_BKQMC = self.cut(q_BTHC, self.units) * scale
        self.k_BKJTC, self.v_BKJTC = self.cut(k_BTKC, k_BTKC.shape[2]), self.cut(v_BTKC, v_BTKC.shape[2])

    def cut(self, x_BTHC: torch.Tensor, units: int) -> torch.Tensor:
        """x_BKQMC: blocks, with the tokens of all heads of a unit in one matrix; zeros fill up the last block."""
        padded_BTHC = torch.nn.functional.pad(x_BTHC, (0, 0, 0, 0, 0, -x_BTHC.shape[1] % self.block))
        x_BQTKGC = padded_BTHC.unflatten(2, (units, -1)).unflatten(1, (-1, self.block))
        return x_BQTKGC.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).contiguous()

    def whole(self, x_BKQMC: torch.Tensor, tokens: int) -> torch.Tensor:
        """The reverse of `cut`."""
        x_BKQGTC = x_BKQMC.unflatten(3, (-1, self.block))
        return x_BKQGTC.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)[:, :tokens].contiguous()

    def pieces(self) -> Iterator[_Piece]:
        """Every chunk in pieces whose scores are about `CHUNK_ELEMENTS`, for all rows and heads that it stands for."""
        rows = torch.arange(len(self.q_BKQMC), device=self.q_BKQMC.device)[None, :, None]
        units = torch.arange(self.units, device=self.q_BKQMC.device)
        for chunk in self.plan.chunks:
            row_P11 = chunk.row_P[:, None, None] if self.plan.by_row else rows
            unit_P11 = chunk.head_P[:, None, None] if self.plan.by_head else units
            counts = len(chunk.row_P), row_P11.shape[1], unit_P11.shape[-1]
            matrix = self.groups * self.block**2 * chunk.key_blocks_PJ.shape[1]
            for some, of_rows, of_units in _slices(counts, CHUNK_ELEMENTS // matrix):
                at_rows = row_P11[some if self.plan.by_row else slice(None), of_rows]
                at_units = unit_P11[some] if self.plan.by_head else unit_P11[of_units]
                yield self._piece(chunk, some, at_rows, at_units)

    def _piece(self, chunk: Chunk, some: slice, row_PB1: torch.Tensor, unit_P1K: torch.Tensor) -> _Piece:
        blocks_P, key_blocks_PJ = chunk.query_block_P[some], chunk.key_blocks_PJ[some]
        queries_at = row_PB1, unit_P1K, blocks_P[:, None, None]
        key_heads = unit_P1K // (self.units // self.k_BKJTC.shape[1])
        keys_at = row_PB1[..., None], key_heads[..., None], key_blocks_PJ[:, None, None]
        q_PBKMC = self.q_BKQMC[queries_at]
        k_MSC, v_MSC = (x[keys_at].flatten(3, 4).flatten(0, 2) for x in (self.k_BKJTC, self.v_BKJTC))
        q_MTC = q_PBKMC.flatten(0, 2)
        scores_MTS = q_MTC @ k_MSC.transpose(1, 2)
        scores_PBKGTS = scores_MTS.view(*q_PBKMC.shape[:3], self.groups, self.block, -1)
        bias_at = None
        if self.bias_HL is not None:
            bias_at = self._bias_places(blocks_P, key_blocks_PJ, unit_P1K)
            scores_PBKGTS += self.bias_HL.flatten()[bias_at].to(scores_MTS.dtype)
        if chunk.visible_PTS is None:
            weights_MTS = scores_MTS.softmax(-1)
        else:
            visible_P111TS = chunk.visible_PTS[some, None, None, None]
            scores_PBKGTS.masked_fill_(~visible_P111TS, torch.finfo(scores_MTS.dtype).min)
            weights_MTS = scores_MTS.softmax(-1)
            weights_MTS.view(scores_PBKGTS.shape).mul_(visible_P111TS)  # of a query that sees nothing: none
        return _Piece(queries_at, keys_at, q_MTC, k_MSC, v_MSC, weights_MTS, bias_at)

    def _bias_places(self, blocks_P: torch.Tensor, key_blocks_PJ: torch.Tensor, unit_P1K: torch.Tensor) -> torch.Tensor:
        """Where in the flattened bias each score finds its own: [P, 1, K, G, T, S]."""
        assert self.bias_HL is not None
        step_T = torch.arange(self.block, device=blocks_P.device)
        query_PT1 = (blocks_P[:, None] * self.block + step_T)[..., None]
        key_P1S = (key_blocks_PJ[..., None] * self.block + step_T).flatten(1)[:, None]
        length = self.bias_HL.shape[1]
        distance_PTS = (key_P1S - query_PT1 + (length - 1) // 2).clamp(0, length - 1)
        group_G11 = torch.arange(self.groups, device=blocks_P.device)[:, None, None]
        head_P1KG11 = unit_P1K.expand(len(blocks_P), 1, -1)[..., None, None, None] * self.groups + group_G11
        return head_P1KG11 * length + distance_PTS[:, None, None, None]

    def add_to_keys(self, gradient_BKJTC: torch.Tensor, piece: _Piece, x_MSC: torch.Tensor) -> None:
        """Gathered gradients back to where their keys stand; a block may have been gathered many times."""
        row, head, block = piece.keys_at
        place = (row * gradient_BKJTC.shape[1] + head) * gradient_BKJTC.shape[2] + block
        x_NTC = x_MSC.unflatten(1, (-1, self.block)).flatten(0, 1)
        gradient_BKJTC.flatten(0, 2).index_add_(0, place.flatten(), x_NTC)


def _slices(counts: tuple[int, int, int], budget: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of three axes that hold about `budget` matrices, as many of the last axis as fit."""
    sizes = [1, 1, 1]
    for axis in (2, 1, 0):
        sizes[axis] = max(1, min(counts[axis], budget))
        budget //= counts[axis]
    ranges = [[slice(at, at + size) for at in range(0, count, size)] for count, size in zip(counts, sizes, strict=True)]
    yield from itertools.product(*ranges)


class _Chunked(torch.autograd.Function):
    """(q_BTHC, k_BTKC, v_BTKC, bias_HL) -> out_BTHC by a plan; `backward` computes the weights again, a piece at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHC: torch.Tensor,
        k_BTKC: torch.Tensor,
        v_BTKC: torch.Tensor,
        bias_HL: torch.Tensor | None,
        plan: Plan,
        block: int,
        scale: float,
    ) -> torch.Tensor:
        """Keeps the inputs alone for the backward pass."""
        ctx.save_for_backward(q_BTHC, k_BTKC, v_BTKC, bias_HL)
        ctx.plan, ctx.block, ctx.scale = plan, block, scale
        blocks = _Blocks(q_BTHC, k_BTKC, v_BTKC, bias_HL, plan, block, scale)
        out_BKQMC = torch.zeros_like(blocks.q_BKQMC)
        for piece in blocks.pieces():
            out_MTC = piece.weights_MTS @ piece.v_MSC
            out_BKQMC[piece.queries_at] = out_MTC.view(out_BKQMC[piece.queries_at].shape)
        return blocks.whole(out_BKQMC, q_BTHC.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v and the bias; the weights of each piece are computed anew."""
        q_BTHC, k_BTKC, v_BTKC, bias_HL = ctx.saved_tensors
        blocks = _Blocks(q_BTHC, k_BTKC, v_BTKC, bias_HL, ctx.plan, ctx.block, ctx.scale)
        grad_BKQMC = blocks.cut(gradients[0], blocks.units)
        dq_BKQMC, dk_BKJTC, dv_BKJTC = (torch.zeros_like(x) for x in (blocks.q_BKQMC, blocks.k_BKJTC, blocks.v_BKJTC))
        dbias_HL = None if bias_HL is None else torch.zeros_like(bias_HL)
        for piece in blocks.pieces():
            grad_PBKMC = grad_BKQMC[piece.queries_at]
            grad_MTC = grad_PBKMC.flatten(0, 2)
            blocks.add_to_keys(dv_BKJTC, piece, piece.weights_MTS.transpose(1, 2) @ grad_MTC)
            dweights_MTS = grad_MTC @ piece.v_MSC.transpose(1, 2)
            dscores_MTS = torch._softmax_backward_data(dweights_MTS, piece.weights_MTS, -1, dweights_MTS.dtype)
            blocks.add_to_keys(dk_BKJTC, piece, dscores_MTS.transpose(1, 2) @ piece.q_MTC)
            dq_BKQMC[piece.queries_at] = (dscores_MTS @ piece.k_MSC).view(grad_PBKMC.shape)
            if dbias_HL is not None and piece.bias_at is not None:
                shape = (*grad_PBKMC.shape[:3], blocks.groups, blocks.block, -1)
                summed = dscores_MTS.view(shape).sum(1, keepdim=True).to(dbias_HL.dtype)  # over rows
                dbias_HL.view(-1).index_add_(0, piece.bias_at.flatten(), summed.flatten())
        tokens = q_BTHC.shape[1]
        dq_BTHC = blocks.whole(dq_BKQMC, tokens).mul_(ctx.scale)
        return dq_BTHC, blocks.whole(dk_BKJTC, tokens), blocks.whole(dv_BKJTC, tokens), dbias_HL, None, None, None
