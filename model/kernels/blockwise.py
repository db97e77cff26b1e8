"""Causal attention on the CPU, a block of queries at a time, each packed document by itself.

PyTorch's fused CPU kernel gains nothing from causality at the lengths we train on, and its products run far below the
rate of a plain `bmm`. Here a block of queries meets only the keys up to its own end, in two batched products around one
softmax. Documents of similar length are gathered into one padded batch: causality hides a document's padding, which
stands behind it, from every real token. Nothing of size T² is held, for the backward pass either: that computes the
weights again.

Both directions are custom operators. What happens inside depends on the documents' lengths, but `torch.compile` sees
one node of fixed shape, so a new batch never recompiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

QUERY_BLOCK = 128
TILE_ELEMENTS = 1 << 19  # scores held at a time: 1 MiB in bf16, so that softmax finds them in cache


@torch.library.custom_op("athanor::blockwise_attention", mutates_args=())
def blockwise_attention(
    q_BTHC: torch.Tensor, k_BTKC: torch.Tensor, v_BTKC: torch.Tensor, documents_BT: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """out_BTHC of causal attention within documents (each row one document if not given); padding gives 0."""
    out_BTHC = torch.zeros_like(q_BTHC, memory_format=torch.contiguous_format)
    kv_heads = k_BTKC.shape[2]
    for batch in _batches(q_BTHC, documents_BT):
        q_MGTC = batch.take(q_BTHC, kv_heads).mul_(scale)
        k_M1TC, v_M1TC = batch.take(k_BTKC, kv_heads), batch.take(v_BTKC, kv_heads)
        out_MGTC = torch.empty_like(q_MGTC)
        for tile in _tiles(q_MGTC):
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
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; the weights are computed again, tile by tile."""
    dq_BTHC, dk_BTKC, dv_BTKC = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_BTHC, k_BTKC, v_BTKC)
    )
    kv_heads = k_BTKC.shape[2]
    for batch in _batches(q_BTHC, documents_BT):
        q_MGTC = batch.take(q_BTHC, kv_heads).mul_(scale)
        k_M1TC, v_M1TC = batch.take(k_BTKC, kv_heads), batch.take(v_BTKC, kv_heads)
        grad_MGTC = batch.take(grad_BTHC, kv_heads, zero_padding=True)
        dq_MGTC, dk_M1TC, dv_M1TC = torch.empty_like(q_MGTC), torch.zeros_like(k_M1TC), torch.zeros_like(v_M1TC)
        for tile in _tiles(q_MGTC):
            q_MTC, grad_MTC = tile.queries(q_MGTC), tile.queries(grad_MGTC)
            k_MSC, v_MSC = tile.keys(k_M1TC), tile.keys(v_M1TC)
            weights_MTS = tile.weights(q_MTC, k_MSC)
            tile.keys(dv_M1TC).baddbmm_(weights_MTS.transpose(1, 2), grad_MTC)
            dweights_MTS = grad_MTC @ v_MSC.transpose(1, 2)
            dscores_MTS = torch._softmax_backward_data(dweights_MTS, weights_MTS, -1, weights_MTS.dtype)
            tile.keys(dk_M1TC).baddbmm_(dscores_MTS.transpose(1, 2), q_MTC)
            tile.put_queries(dscores_MTS @ k_MSC, dq_MGTC)
        batch.put(dq_MGTC.mul_(scale), dq_BTHC)
        batch.put(dk_M1TC, dk_BTKC)
        batch.put(dv_M1TC, dv_BTKC)
    return dq_BTHC, dk_BTKC, dv_BTKC


@dataclass(frozen=True)
class _Batch:
    """Documents padded to one length, or all rows as they are.

    places_BT: where in the flattened rows each of their tokens stands; real_BT: false for padding.
    """

    places_BT: torch.Tensor | None = None
    real_BT: torch.Tensor | None = None

    def take(self, x_BTHC: torch.Tensor, kv_heads: int, zero_padding: bool = False) -> torch.Tensor:
        """A copy of these documents' tokens, as x_MGTC: one matrix for each document and key/value head."""
        if self.places_BT is not None and self.real_BT is not None:
            x_BTHC = x_BTHC.flatten(0, 1)[self.places_BT]
            if zero_padding:
                x_BTHC *= self.real_BT[:, :, None, None]
        rows, tokens, heads, channels = x_BTHC.shape
        x_BTKGC = x_BTHC.view(rows, tokens, kv_heads, heads // kv_heads, channels)
        return x_BTKGC.permute(0, 2, 3, 1, 4).clone(memory_format=torch.contiguous_format).flatten(0, 1)

    def put(self, x_MGTC: torch.Tensor, out_BTHC: torch.Tensor) -> None:
        """Write these documents' tokens where they belong, without the padding."""
        _, groups, tokens, channels = x_MGTC.shape
        x_BTKGC = x_MGTC.view(-1, out_BTHC.shape[2] // groups, groups, tokens, channels).permute(0, 3, 1, 2, 4)
        if self.places_BT is None or self.real_BT is None:
            out_BTHC.view(x_BTKGC.shape).copy_(x_BTKGC)
            return
        out_BTHC.flatten(0, 1)[self.places_BT[self.real_BT]] = x_BTKGC.flatten(2, 3)[self.real_BT]


def _batches(q_BTHC: torch.Tensor, documents_BT: torch.Tensor | None) -> Iterator[_Batch]:
    """All documents, those of similar length together.

    Lengths and counts are rounded up to few distinct values: oneDNN compiles its products for each shape it meets,
    which takes longer than a small product itself.
    """
    if documents_BT is None:
        yield _Batch()
        return
    rows, tokens = documents_BT.shape
    starts, lengths = document_runs(documents_BT)
    if len(lengths) == rows and all(length == tokens for length in lengths):
        yield _Batch()
        return
    classes: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        classes.setdefault(min(_rounded(max(length, 16), 2 if length > QUERY_BLOCK else 1), tokens), []).append(number)
    for longest, numbers in sorted(classes.items()):
        absent = [0] * (_rounded(len(numbers), 3) - len(numbers))
        first_B1 = torch.tensor([starts[number] for number in numbers] + absent)[:, None]
        length_B1 = torch.tensor([lengths[number] for number in numbers] + absent)[:, None]
        step_T = torch.arange(longest)
        places_BT = (first_B1 + step_T).clamp_(max=rows * tokens - 1)
        yield _Batch(places_BT, step_T < length_B1)


def document_runs(documents_BT: torch.Tensor) -> tuple[list[int], list[int]]:
    """Where each document starts in the flattened rows, and its length; padding is left out."""
    first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first_BT.flatten().nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([documents_BT.numel()]))
    real = documents_BT.flatten()[starts] != 0
    return starts[real].tolist(), lengths[real].tolist()


def _rounded(count: int, digits: int) -> int:
    """`count` rounded up to a number with `digits` binary digits after the leading one."""
    step = 1 << max(0, count.bit_length() - 1 - digits)
    return -(-count // step) * step


@dataclass(frozen=True)
class _Tile:
    """A block of queries of some of the matrices, and the keys up to its end."""

    some: slice
    start: int
    end: int

    def queries(self, x_MGTC: torch.Tensor) -> torch.Tensor:
        """x_MTC: the queries of all heads that share the keys, in one matrix."""
        return x_MGTC[self.some, :, self.start : self.end].flatten(1, 2)

    def put_queries(self, x_MTC: torch.Tensor, out_MGTC: torch.Tensor) -> None:
        place = out_MGTC[self.some, :, self.start : self.end]
        place.copy_(x_MTC.view(place.shape))

    def keys(self, x_M1TC: torch.Tensor) -> torch.Tensor:
        return x_M1TC[self.some, 0, : self.end]

    def weights(self, q_MTC: torch.Tensor, k_MSC: torch.Tensor) -> torch.Tensor:
        scores_MTS = q_MTC @ k_MSC.transpose(1, 2)
        block = self.end - self.start
        future = torch.full((block, block), float("-inf"), dtype=scores_MTS.dtype).triu_(1)
        scores_MTS.unflatten(1, (-1, block))[..., self.start :].add_(future)
        return scores_MTS.softmax(-1)


def _tiles(q_MGTC: torch.Tensor) -> Iterator[_Tile]:
    matrices, groups, tokens, _ = q_MGTC.shape
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        some = max(1, TILE_ELEMENTS // (groups * (end - start) * end))
        for first in range(0, matrices, some):
            yield _Tile(slice(first, first + some), start, end)


@blockwise_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, scale: float) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q_BTHC, k_BTKC, v_BTKC, documents_BT, ctx.scale = inputs
    ctx.save_for_backward(q_BTHC, k_BTKC, v_BTKC, documents_BT)


def _differentiate(ctx: Any, grad_BTHC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q_BTHC, k_BTKC, v_BTKC, documents_BT = ctx.saved_tensors
    return *_backward(grad_BTHC, q_BTHC, k_BTKC, v_BTKC, documents_BT, ctx.scale), None, None


blockwise_attention.register_autograd(_differentiate, setup_context=_setup)
