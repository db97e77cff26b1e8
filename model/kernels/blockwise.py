"""Attention within a band on the CPU, a block of queries at a time, each packed document by itself.

PyTorch's fused CPU kernel gains nothing from causality or a window at the lengths we train on, and its products run far
below the rate of a plain `bmm`. Here a block of queries meets only the keys that its band reaches, in two batched
products around one softmax: time and memory grow with the window, not with the row. Documents of similar length are
gathered into one padded batch, and in cross-attention those they look at into another; causality hides a document's
padding, which stands behind it, from every real token, and where there is no causality a mask does. Nothing of size T²
is held, for the backward pass either: that computes the weights again.

Both directions are custom operators. What happens inside depends on the documents' lengths, but `torch.compile` sees
one node of fixed shape, so a new batch never recompiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from model.kernels.documents import DocumentBatch, document_batches, paired_batches
from model.masks import Mask

QUERY_BLOCK = 128
TILE_ELEMENTS = 1 << 19  # scores held at a time: 1 MiB in bf16, so that softmax finds them in cache


@torch.library.custom_op("athanor::blockwise_attention", mutates_args=())
def blockwise_attention(
    q_BTHC: torch.Tensor,
    k_BTKC: torch.Tensor,
    v_BTKC: torch.Tensor,
    documents_BT: torch.Tensor | None,
    bias_HL: torch.Tensor | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    key_documents_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """out_BTHC of attention within documents (each row one document if not given); padding gives 0.

    causal, window, bias_HL, key_documents_BS: as `Mask` has them; with the last, neither of the former three.
    """
    out_BTHC = torch.zeros_like(q_BTHC, memory_format=torch.contiguous_format)
    kv_heads = k_BTKC.shape[2]
    for batch, memory in _batches(q_BTHC, documents_BT, key_documents_BS):
        q_MGTC = batch.take(q_BTHC, kv_heads).mul_(scale)
        k_M1TC, v_M1TC = memory.take(k_BTKC, kv_heads), memory.take(v_BTKC, kv_heads)
        out_MGTC = torch.empty_like(q_MGTC)
        for tile in _tiles(q_MGTC, k_M1TC.shape[2], memory, bias_HL, kv_heads, causal, window):
            weights_MTS = tile.weights(tile.queries(q_MGTC), tile.keys(k_M1TC))
            tile.put_queries(weights_MTS @ tile.keys(v_M1TC), out_MGTC)
        batch.put(out_MGTC, out_BTHC)
    return out_BTHC


@torch.library.custom_op("athanor::blockwise_attention_backward", mutates_args=())
def _backward(
    grad_BTHC: torch.Tensor,
    q_BTHC: torch.Tensor,
    k_BTKC: torch.Tensor,
    v_BTKC: torch.Tensor,
    documents_BT: torch.Tensor | None,
    bias_HL: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    key_documents_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the bias (empty without one); the weights are computed again, tile by tile."""
    dq_BTHC, dk_BTKC, dv_BTKC, dbias_HL = _empty_gradients(q_BTHC, k_BTKC, v_BTKC, bias_HL, torch.zeros_like)
    kv_heads = k_BTKC.shape[2]
    for batch, memory in _batches(q_BTHC, documents_BT, key_documents_BS):
        q_MGTC = batch.take(q_BTHC, kv_heads).mul_(scale)
        k_M1TC, v_M1TC = memory.take(k_BTKC, kv_heads), memory.take(v_BTKC, kv_heads)
        grad_MGTC = batch.take(grad_BTHC, kv_heads, zero_padding=True)
        dq_MGTC, dk_M1TC, dv_M1TC = torch.empty_like(q_MGTC), torch.zeros_like(k_M1TC), torch.zeros_like(v_M1TC)
        for tile in _tiles(q_MGTC, k_M1TC.shape[2], memory, bias_HL, kv_heads, causal, window):
            q_MTC, grad_MTC = tile.queries(q_MGTC), tile.queries(grad_MGTC)
            k_MSC, v_MSC = tile.keys(k_M1TC), tile.keys(v_M1TC)
            weights_MTS = tile.weights(q_MTC, k_MSC)
            tile.keys(dv_M1TC).baddbmm_(weights_MTS.transpose(1, 2), grad_MTC)
            dweights_MTS = grad_MTC @ v_MSC.transpose(1, 2)
            dscores_MTS = torch._softmax_backward_data(dweights_MTS, weights_MTS, -1, weights_MTS.dtype)
            tile.keys(dk_M1TC).baddbmm_(dscores_MTS.transpose(1, 2), q_MTC)
            tile.put_queries(dscores_MTS @ k_MSC, dq_MGTC)
            if bias_HL is not None:
                tile.add_bias_gradient(dscores_MTS, dbias_HL)
        batch.put(dq_MGTC.mul_(scale), dq_BTHC)
        memory.put(dk_M1TC, dk_BTKC)
        memory.put(dv_M1TC, dv_BTKC)
    return dq_BTHC, dk_BTKC, dv_BTKC, dbias_HL


def banded_attention(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """The operator behind the seam that all kernels share: no pattern but the band and documents, or documents alone
    between queries and other keys."""
    documents = mask.documents_BT, mask.key_documents_BS
    out_BTHC: torch.Tensor = blockwise_attention(
        q_BTHC, k_BTKC, v_BTKC, documents[0], mask.bias_HL, scale, mask.causal, mask.window, documents[1]
    )
    return out_BTHC


@dataclass(frozen=True)
class _Tile:
    """A block of queries of some of the matrices, and the keys that its band reaches.

    hidden_TS: 0 or a great negative number, added to the scores of the last keys. absent_M1S: the same for keys that
    are padding. bias_KGTS: added to the scores. offset: where in bias_HL the first query finds the first key.
    """

    some: slice
    queries_from: int
    queries_to: int
    keys_from: int
    keys_to: int
    hidden_TS: torch.Tensor | None
    absent_M1S: torch.Tensor | None
    bias_KGTS: torch.Tensor | None
    offset: int

    def queries(self, x_MGTC: torch.Tensor) -> torch.Tensor:
        """x_MTC: the queries of all heads that share the keys, in one matrix."""
        return x_MGTC[self.some, :, self.queries_from : self.queries_to].flatten(1, 2)

    def put_queries(self, x_MTC: torch.Tensor, out_MGTC: torch.Tensor) -> None:
        """Write x_MTC, as `queries` gives them, to where these queries stand."""
        place = out_MGTC[self.some, :, self.queries_from : self.queries_to]
        place.copy_(x_MTC.view(place.shape))

    def keys(self, x_M1TC: torch.Tensor) -> torch.Tensor:
        """x_MSC: a view of the keys (or values, or gradients of either) that the band reaches."""
        return x_M1TC[self.some, 0, self.keys_from : self.keys_to]

    def weights(self, q_MTC: torch.Tensor, k_MSC: torch.Tensor) -> torch.Tensor:
        """Softmax over the keys, [M, T, S] with the queries of all heads that share them in T; they are scaled already."""
        scores_MTS = q_MTC @ k_MSC.transpose(1, 2)
        scores_MGTS = scores_MTS.unflatten(1, (-1, self.queries_to - self.queries_from))
        if self.bias_KGTS is not None:
            scores_MGTS += self.bias_KGTS[self._key_heads(len(scores_MTS), len(self.bias_KGTS))]
        if self.hidden_TS is not None:
            scores_MGTS[..., -self.hidden_TS.shape[1] :] += self.hidden_TS
        if self.absent_M1S is not None:
            scores_MTS += self.absent_M1S[self.some, :, self.keys_from : self.keys_to]
        return scores_MTS.softmax(-1)

    def add_bias_gradient(self, dscores_MTS: torch.Tensor, dbias_HL: torch.Tensor) -> None:
        """Sum over matrices, and along the diagonals, on which the distance is the same."""
        assert self.bias_KGTS is not None
        kv_heads, groups, queries, keys = self.bias_KGTS.shape
        sums_KGTS = torch.zeros(self.bias_KGTS.shape, dtype=dbias_HL.dtype)
        dscores_MGTS = dscores_MTS.unflatten(1, (groups, queries)).to(dbias_HL.dtype)
        sums_KGTS.index_add_(0, self._key_heads(len(dscores_MTS), kv_heads), dscores_MGTS)
        # Rows in reverse order, each one place further to the right: with one column of padding too few, a plain view.
        padded_HTL = torch.nn.functional.pad(sums_KGTS.flatten(0, 1).flip(1), (0, queries))
        skewed_HTL = padded_HTL.flatten(1)[:, :-queries].unflatten(1, (queries, keys + queries - 1))
        dbias_HL[:, self.offset - queries + 1 : self.offset + keys] += skewed_HTL.sum(1)

    def _key_heads(self, matrices: int, kv_heads: int) -> torch.Tensor:
        """Of each matrix, the number of its key/value head."""
        return torch.arange(self.some.start, self.some.start + matrices) % kv_heads


def _batches(
    q_BTHC: torch.Tensor, documents_BT: torch.Tensor | None, key_documents_BS: torch.Tensor | None
) -> Iterator[tuple[DocumentBatch, DocumentBatch]]:
    """Documents of queries and of their keys, which in self-attention are the same."""
    if documents_BT is not None and key_documents_BS is not None:
        yield from paired_batches(documents_BT, key_documents_BS)
    else:
        yield from ((batch, batch) for batch in document_batches(q_BTHC, documents_BT))


def _tiles(
    q_MGTC: torch.Tensor,
    keys: int,
    memory: DocumentBatch,
    bias_HL: torch.Tensor | None,
    kv_heads: int,
    causal: bool,
    window: int | None,
) -> Iterator[_Tile]:
    matrices, groups, tokens, _ = q_MGTC.shape
    never = torch.finfo(q_MGTC.dtype).min / 2  # finite: a padding query that sees nothing must not be NaN
    absent_M1S: torch.Tensor | None = None
    if memory.real_BT is not None and not causal:
        hidden_BS = torch.zeros(memory.real_BT.shape, dtype=q_MGTC.dtype).masked_fill_(~memory.real_BT, never)
        absent_M1S = hidden_BS.repeat_interleave(kv_heads, 0)[:, None]
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        reach = max(tokens, keys) if window is None else window - 1
        first = max(0, start - reach) // 64 * 64  # few distinct shapes: oneDNN compiles its products for each
        last = end if causal else min(keys, end + reach)
        hidden_TS = None
        if window is not None and window < tokens:
            distance_TS = torch.arange(first, last) - torch.arange(start, end)[:, None]
            outside_TS = (distance_TS.abs() >= window) | (distance_TS > 0 if causal else False)
            hidden_TS = torch.zeros(distance_TS.shape, dtype=q_MGTC.dtype).masked_fill_(outside_TS, never)
        elif causal:
            hidden_TS = _later_keys(end - start, q_MGTC.dtype)
        bias_KGTS, offset = None, 0
        if bias_HL is not None:
            offset = first - start + (bias_HL.shape[1] - 1) // 2
            reached_HL = bias_HL[:, offset - (end - start) + 1 : offset + last - first].to(q_MGTC.dtype)
            bias_KGTS = reached_HL.unfold(1, last - first, 1).flip(1).unflatten(0, (kv_heads, groups))
        some = max(1, TILE_ELEMENTS // (groups * (end - start) * (last - first)))
        for at in range(0, matrices, some):
            chosen = slice(at, at + some)
            yield _Tile(chosen, start, end, first, last, hidden_TS, absent_M1S, bias_KGTS, offset)


@lru_cache(maxsize=4 * QUERY_BLOCK)
def _later_keys(queries: int, dtype: torch.dtype) -> torch.Tensor:
    """hidden_TS on the diagonal of a causal band. Never written to, so made once: a small kernel costs little by itself,
    but beside other work its threads wait for each other."""
    return torch.full((queries, queries), torch.finfo(dtype).min / 2, dtype=dtype).triu_(1)


def _empty_gradients(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, bias_HL: torch.Tensor | None, like: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq_BTHC, dk_BTKC, dv_BTKC = (like(x, memory_format=torch.contiguous_format) for x in (q_BTHC, k_BTKC, v_BTKC))
    return dq_BTHC, dk_BTKC, dv_BTKC, q_BTHC.new_empty(0) if bias_HL is None else like(bias_HL)


@blockwise_attention.register_fake
def _(
    q_BTHC: torch.Tensor,
    k_BTKC: torch.Tensor,
    v_BTKC: torch.Tensor,
    documents_BT: torch.Tensor | None,
    bias_HL: torch.Tensor | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    key_documents_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(q_BTHC, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    grad_BTHC: torch.Tensor,
    q_BTHC: torch.Tensor,
    k_BTKC: torch.Tensor,
    v_BTKC: torch.Tensor,
    documents_BT: torch.Tensor | None,
    bias_HL: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    key_documents_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    return _empty_gradients(q_BTHC, k_BTKC, v_BTKC, bias_HL, torch.empty_like)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.window, key_documents_BS = inputs
    ctx.save_for_backward(*tensors, key_documents_BS)


def _differentiate(ctx: Any, grad_BTHC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, key_documents_BS = ctx.saved_tensors
    *gradients, dbias_HL = _backward(grad_BTHC, *tensors, ctx.scale, ctx.causal, ctx.window, key_documents_BS)
    return *gradients, None, dbias_HL if ctx.needs_input_grad[4] else None, None, None, None, None


blockwise_attention.register_autograd(_differentiate, setup_context=_setup)
