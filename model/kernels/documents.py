"""Packed documents by themselves: those of similar length gathered into one padded batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.kernels.sizes import rounded

SHORT = 128  # up to this length, documents share a batch with others within a power of two
BATCH_PAIRS = 150_000
"""Pairs of tokens of one head that take as long as a batch's beginning, forward and backward: 1.3 ms beside 6 to 10 ns a
pair, measured on two cores. From 100,000 to 400,000 makes little difference."""

Runs = list[tuple[int, int]]
"""Of documents, where each starts in the flattened rows, and its length."""


@dataclass(frozen=True)
class DocumentBatch:
    """Documents padded to one length, or all rows as they are.

    places_BT: where in the flattened rows each of their tokens stands; real_BT: false for padding. real_N, places_N: of
        each token that is real, its number among them all and its place.
    """

    places_BT: torch.Tensor | None = None
    real_BT: torch.Tensor | None = None
    real_N: torch.Tensor | None = None
    places_N: torch.Tensor | None = None

    def take(self, x_BTHC: torch.Tensor, kv_heads: int, zero_padding: bool = False) -> torch.Tensor:
        """A copy of these documents' tokens, as x_MGTC: one matrix for each document and key/value head."""
        if self.places_BT is not None and self.real_BT is not None:
            # index_select copies whole tokens; indexing by a matrix takes more than twice as long
            x_NHC = x_BTHC.flatten(0, 1).index_select(0, self.places_BT.flatten())
            x_BTHC = x_NHC.view(*self.places_BT.shape, *x_NHC.shape[1:])
            if zero_padding:
                x_BTHC *= self.real_BT[:, :, None, None]
        rows, tokens, heads, channels = x_BTHC.shape
        x_BTKGC = x_BTHC.view(rows, tokens, kv_heads, heads // kv_heads, channels)
        return x_BTKGC.permute(0, 2, 3, 1, 4).clone(memory_format=torch.contiguous_format).flatten(0, 1)

    def put(self, x_MGTC: torch.Tensor, out_BTHC: torch.Tensor) -> None:
        """Write these documents' tokens where they belong, without the padding."""
        _, groups, tokens, channels = x_MGTC.shape
        x_BTKGC = x_MGTC.view(-1, out_BTHC.shape[2] // groups, groups, tokens, channels).permute(0, 3, 1, 2, 4)
        if self.real_N is None or self.places_N is None:
            out_BTHC.view(x_BTKGC.shape).copy_(x_BTKGC)
            return
        x_NHC = x_BTKGC.reshape(-1, *out_BTHC.shape[2:]).index_select(0, self.real_N)
        out_BTHC.view(-1, *x_NHC.shape[1:]).index_copy_(0, self.places_N, x_NHC)


def document_batches(q_BTHC: torch.Tensor, documents_BT: torch.Tensor | None) -> Iterator[DocumentBatch]:
    """All documents, those of similar length together, lengths and counts rounded up to few distinct values."""
    if documents_BT is None:
        yield DocumentBatch()
        return
    rows, tokens = documents_BT.shape
    starts, lengths = document_runs(documents_BT)
    if len(lengths) == rows and all(length == tokens for length in lengths):
        yield DocumentBatch()
        return
    classes: dict[int, Runs] = {}
    for start, length in zip(starts, lengths, strict=True):
        classes.setdefault(_padded(length, tokens), []).append((start, length))
    for longest, runs in _joined(classes, q_BTHC.shape[2]):
        yield _batch(runs, longest, rows * tokens)


def paired_batches(
    documents_BT: torch.Tensor, key_documents_BS: torch.Tensor
) -> Iterator[tuple[DocumentBatch, DocumentBatch]]:
    """Documents of queries, and as many of the keys: those of the same rows and numbers. What has no partner is left out."""
    (rows, queries), keys = documents_BT.shape, key_documents_BS.shape[1]
    partners = _named_runs(key_documents_BS)
    classes: dict[tuple[int, int], list[tuple[tuple[int, int], tuple[int, int]]]] = {}
    for name, run in _named_runs(documents_BT).items():
        if (partner := partners.get(name)) is not None:
            sizes = _padded(run[1], queries), _padded(partner[1], keys)
            classes.setdefault(sizes, []).append((run, partner))
    for (longest, longest_partner), pairs in sorted(classes.items()):
        own = _batch([run for run, _ in pairs], longest, rows * queries)
        yield own, _batch([partner for _, partner in pairs], longest_partner, rows * keys)


def _named_runs(documents_BT: torch.Tensor) -> dict[tuple[int, int], tuple[int, int]]:
    """Of each row and document number, where it starts in the flattened rows, and its length."""
    starts, lengths = document_runs(documents_BT)
    numbers, tokens = documents_BT.flatten()[starts].tolist(), documents_BT.shape[1]
    runs = zip(starts, lengths, strict=True)
    return {(run[0] // tokens, number): run for number, run in zip(numbers, runs, strict=True)}


def _joined(classes: dict[int, Runs], heads: int) -> Iterator[tuple[int, Runs]]:
    """The classes, longest first, with those put together whose shorter documents cost less as padded than by themselves.

    Found by dynamic programming over the lengths: a batch costs BATCH_PAIRS and, for each head, its pairs of tokens.
    """
    lengths = sorted(classes)
    least: list[tuple[float, int]] = [(0.0, 0)]  # of the shortest 0, 1, ... lengths: cost, and the last batch's begin
    for end, longest in enumerate(lengths, start=1):
        count, choices = 0, []
        for begin in range(end - 1, -1, -1):
            count += len(classes[lengths[begin]])
            pairs = rounded(count, 3) * longest * (longest + SHORT) / 2
            choices.append((least[begin][0] + BATCH_PAIRS + heads * pairs, begin))
        least.append(min(choices))
    end = len(lengths)
    while end:
        begin = least[end][1]
        yield lengths[end - 1], [run for length in lengths[begin:end] for run in classes[length]]
        end = begin


def _padded(length: int, tokens: int) -> int:
    return min(rounded(max(length, 16), 2 if length > SHORT else 1), tokens)


def _batch(runs: Runs, longest: int, places: int) -> DocumentBatch:
    """Documents by where they start among so many places, and their lengths; empty ones fill up the batch."""
    filled = runs + [(0, 0)] * (rounded(len(runs), 3) - len(runs))
    first_B1, length_B1 = torch.tensor(filled).T[..., None]
    step_T = torch.arange(longest)
    places_BT = (first_B1 + step_T).clamp_(max=places - 1)
    real_BT = step_T < length_B1
    real_N = real_BT.flatten().nonzero()[:, 0]
    return DocumentBatch(places_BT, real_BT, real_N, places_BT.flatten()[real_N])


def document_runs(documents_BT: torch.Tensor) -> tuple[list[int], list[int]]:
    """Where each document starts in the flattened rows, and its length; padding is left out."""
    first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first_BT.flatten().nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([documents_BT.numel()]))
    real = documents_BT.flatten()[starts] != 0
    return starts[real].tolist(), lengths[real].tolist()
