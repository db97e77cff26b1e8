"""How surprised a model is by a sequence: negative log-likelihood over sliding windows, batched by length.

    scores = score_sequences(model, [ids, ids, ...], context_tokens=256, stride_tokens=128, tokens_per_batch=8192)
    scores[0].nats, scores[0].tokens, scores[0].is_greedy

Evaluation and the harness both end here, so "perplexity" cannot mean two things. Torch is imported at the top: stages
import this module inside the task that scores, never at their own top (planning must not pay for torch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from model.architecture import Transformer

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Window:
    """Inputs `ids[start:end]` of one sequence; the predictions at positions `scored_from … end - 1` are scored."""

    sequence: int
    start: int
    scored_from: int
    end: int

    @property
    def tokens(self) -> int:
        """How many inputs the window holds."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of -ln p over the scored tokens (nats), how many they are, and whether each was the model's first choice."""

    nats: float
    tokens: int
    is_greedy: bool


def sliding_windows(
    token_count: int, *, context_tokens: int, stride_tokens: int, sequence: int = 0, first: int = 0
) -> Iterator[Window]:
    """Windows of at most `context_tokens` inputs in which every token after position `first` is predicted once.

    The first window scores all it holds; each later one scores `stride_tokens` new tokens and ends at the last of them,
    so every prediction sees at least `context_tokens - stride_tokens + 1` tokens, or all there are. With
    `stride_tokens == context_tokens` these are the windows of lm-evaluation-harness (`get_rolling_token_windows`), and
    with `first` at the end of a prompt the prompt is truncated on its left, as there.
    """
    scored, last = first, token_count - 1
    while scored < last:
        end = min(max(scored + stride_tokens, context_tokens), last)
        yield Window(sequence, max(0, end - context_tokens), scored, end)
        scored = end


def score_sequences(
    model: Transformer,
    sequences: Sequence[Sequence[int]],
    *,
    context_tokens: int,
    stride_tokens: int,
    tokens_per_batch: int,
    first: Sequence[int] | None = None,
    targets: Sequence[Sequence[bool]] | None = None,
) -> list[Score]:
    """Score every sequence (token ids, `<s>` included) from position `first[i] + 1` on; in the order given.

    targets: which tokens of each sequence count, as long as it; all where left out. Batches are formed over all windows
    sorted by length, so padding is small, and depend only on the arguments.
    """
    starts = first if first is not None else [0] * len(sequences)
    windows = [
        window
        for index, ids in enumerate(sequences)
        for window in sliding_windows(
            len(ids), context_tokens=context_tokens, stride_tokens=stride_tokens, sequence=index, first=starts[index]
        )
    ]
    nats, tokens, greedy = [0.0] * len(sequences), [0] * len(sequences), [True] * len(sequences)
    for batch in _batches(windows, tokens_per_batch):
        for window, loss, is_greedy, counted in zip(
            batch, *_score_batch(model, sequences, targets, batch), strict=True
        ):
            nats[window.sequence] += loss
            tokens[window.sequence] += counted
            greedy[window.sequence] &= is_greedy
    return [Score(*score) for score in zip(nats, tokens, greedy, strict=True)]


def _batches(windows: list[Window], tokens_per_batch: int) -> Iterator[list[Window]]:
    """Longest first: an out-of-memory error comes at once, not after an hour."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda w: (-w.tokens, w.sequence, w.start)):
        if batch and (len(batch) + 1) * batch[0].tokens > tokens_per_batch:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _score_batch(
    model: Transformer,
    sequences: Sequence[Sequence[int]],
    targets: Sequence[Sequence[bool]] | None,
    batch: list[Window],
) -> tuple[list[float], list[bool], list[int]]:
    """Loss in nats, greediness and scored tokens of each window. Rows are padded on the right, where causal attention never
    looks."""
    device = next(model.parameters()).device
    width = batch[0].tokens
    tokens_BT = torch.zeros(len(batch), width, dtype=torch.int64)
    targets_BT = torch.full((len(batch), width), IGNORED, dtype=torch.int64)
    for row, window in enumerate(batch):
        ids = torch.as_tensor(sequences[window.sequence][window.start : window.end + 1], dtype=torch.int64)
        tokens_BT[row, : window.tokens] = ids[:-1]
        skipped = window.scored_from - window.start
        targets_BT[row, skipped : window.tokens] = ids[1 + skipped :]
        if targets is not None:
            counts_T = torch.as_tensor(targets[window.sequence][window.start + 1 : window.end + 1], dtype=torch.bool)
            targets_BT[row, : window.tokens][~counts_T] = IGNORED
    found = model(tokens_BT.to(device), targets_BT=targets_BT.to(device), per_token=True)
    nats_B = found["nll"].double().sum(1)
    is_greedy_B = (found["is_top"].cpu() | (targets_BT == IGNORED)).all(1)
    return nats_B.tolist(), is_greedy_B.tolist(), (targets_BT != IGNORED).sum(1).tolist()
