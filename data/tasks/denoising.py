"""Objectives that hide part of a row and ask for it back: masked tokens, denoised spans, filled-in text.

Each is a pure function of (row, seed, global row): what is hidden is drawn from these alone, so that a row asks the same
whichever rank reads it, after any restart, and something else each time the run comes by it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from conf.refusal import Refusal
from data.order import mixed
from data.rows.packing import PackedRows
from data.tasks.objectives import IGNORED, EncoderInputs, Examples, NextToken

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MaskedToken:
    """Find hidden tokens again from both sides (BERT, Devlin et al. 2018, https://arxiv.org/abs/1810.04805).

    rate: the share of a row's tokens to be found; of these 80 % become `mask_id`, 10 % a random token and 10 % stay.
    random_ids: [first, end) of the ids that random ones are drawn from. kept_ids: never hidden, such as <s> and </s>.
    dynamic: another choice each time a row is read (RoBERTa, Liu et al. 2019, https://arxiv.org/abs/1907.11692); false
        hides the same tokens of a row always, as BERT's prepared files did.
    """

    kind: Literal["masked_token"] = "masked_token"
    mask_id: int
    random_ids: tuple[int, int]
    kept_ids: tuple[int, ...] = ()
    rate: float = 0.15
    dynamic: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if self.random_ids[0] >= self.random_ids[1]:
            raise Refusal("random_ids", self.random_ids, "holds no id", "give (first, end) of the text's ids")

    def __call__(self, rows: PackedRows, global_rows: Ints) -> Examples:
        numbers_RT = np.ascontiguousarray(rows.document_numbers()[:, :-1])
        tokens_RT = rows.tokens_RW[:, :-1].astype(np.int64)
        targets_RT = np.full_like(tokens_RT, IGNORED)
        may_RT = (numbers_RT != 0) & ~np.isin(tokens_RT, self.kept_ids)
        if rows.is_target_RW is not None:
            may_RT &= rows.is_target_RW[:, :-1]
        for row, global_row in enumerate(global_rows):
            key = _key(self.seed, int(global_row) if self.dynamic else _content(tokens_RT[row]))
            candidates = np.flatnonzero(may_RT[row])
            draws_3N = _uniform(key, 3 * len(candidates)).reshape(3, -1)
            count = min(len(candidates), max(1, round(self.rate * len(candidates))))
            order = np.argsort(draws_3N[0], kind="stable")[:count]
            chosen, how = candidates[order], draws_3N[1][order]
            targets_RT[row, chosen] = tokens_RT[row, chosen]
            first, end = self.random_ids
            random = first + (draws_3N[2][order] * (end - first)).astype(np.int64)
            replaced = np.where(how < 0.8, self.mask_id, np.where(how < 0.9, random, tokens_RT[row, chosen]))
            tokens_RT[row, chosen] = replaced
        return Examples(
            tokens_RT=tokens_RT, targets_RT=targets_RT, documents_RT=numbers_RT, positions_RT=rows.positions()
        )


@dataclass(frozen=True, kw_only=True)
class SpanDenoising:
    """Spans of a row give way to sentinels in the encoder; the decoder says each sentinel and what it stands for (T5,
    Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.3.4).

    rate: the share of tokens that are hidden. mean_span: their spans' mean length. sentinel_id: of the first span; the
    next ones count down. A row is one text, whatever documents it holds, as in T5; both sides end with `end_id`.
    """

    kind: Literal["span_denoising"] = "span_denoising"
    sentinel_id: int
    start_id: int
    end_id: int
    rate: float = 0.15
    mean_span: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if self.mean_span < 1:
            raise Refusal(
                "mean_span",
                self.mean_span,
                "a span has at least one token",
                f"choose {type(self).mean_span:g}, for example",
            )

    def lengths(self, tokens: int) -> tuple[int, int, int]:
        """(hidden tokens, spans, tokens left) of a text of so many tokens; it needs two."""
        hidden = min(max(round(tokens * self.rate), 1), tokens - 1)
        spans = min(max(round(hidden / self.mean_span), 1), hidden, tokens - hidden)
        return hidden, spans, tokens - hidden

    def widths(self, seq_len: int) -> tuple[int, int]:
        """Tokens of a row that the encoder and the decoder read."""
        hidden, spans, left = self.lengths(seq_len)
        return left + spans + 1, hidden + spans + 1

    def __call__(self, rows: PackedRows, global_rows: Ints) -> Examples:
        texts = _texts(rows)
        sources, targets = [], []
        for text, global_row in zip(texts, global_rows, strict=True):
            source, target = self.split(text, _key(self.seed, int(global_row)))
            sources.append(source)
            targets.append(target)
        return _seq2seq(sources, targets, self.start_id, *self.widths(rows.tokens_RW.shape[1] - 1))

    def split(self, text: Ints, key: np.uint64) -> tuple[Ints, Ints]:
        """(what the encoder reads, what the decoder is to say) of one text."""
        end = np.array([self.end_id])
        if len(text) < 2:  # nothing can be hidden and something left
            return np.concatenate([text, end]), np.zeros(0, dtype=np.int64)
        hidden, spans, left = self.lengths(len(text))
        draws = _uniform(key, len(text))
        lengths_2S = np.stack([_segments(left, spans, draws[:left]), _segments(hidden, spans, draws[left:])])
        bounds = np.concatenate([[0], np.cumsum(lengths_2S.T.reshape(-1))])  # kept, hidden, kept, hidden …
        source, target = [], []
        for span in range(spans):
            sentinel = np.array([self.sentinel_id - span])
            kept, hides, after = bounds[2 * span : 2 * span + 3]
            source += [text[kept:hides], sentinel]
            target += [sentinel, text[hides:after]]
        return np.concatenate([*source, end]), np.concatenate([*target, end])


@dataclass(frozen=True, kw_only=True)
class TextInfilling:
    """Spans of a row, some of them empty, each give way to one mask in the encoder; the decoder says the whole row (BART,
    Lewis et al. 2019, https://arxiv.org/abs/1910.13461, section 2.2).

    rate: the share of tokens that are hidden. mean_span: the mean of the Poisson distribution of spans' lengths.
    """

    kind: Literal["text_infilling"] = "text_infilling"
    mask_id: int
    start_id: int
    rate: float = 0.3
    mean_span: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if self.mean_span <= 0:
            raise Refusal(
                "mean_span",
                self.mean_span,
                "a mean length is above 0",
                f"choose {type(self).mean_span:g}, for example",
            )

    def widths(self, seq_len: int) -> tuple[int, int]:
        """Tokens of a row that the encoder and the decoder read."""
        return seq_len, seq_len

    def __call__(self, rows: PackedRows, global_rows: Ints) -> Examples:
        texts = _texts(rows)
        pairs = zip(texts, global_rows, strict=True)
        sources = [self.infilled(text, _key(self.seed, int(global_row))) for text, global_row in pairs]
        return _seq2seq(sources, texts, self.start_id, *self.widths(rows.tokens_RW.shape[1] - 1))

    def infilled(self, text: Ints, key: np.uint64) -> Ints:
        """What the encoder reads of one text; never longer than the text."""
        if len(text) < 2:
            return text
        hidden = min(max(round(len(text) * self.rate), 1), len(text) - 1)
        draws_3N = _uniform(key, 6 * len(text)).reshape(3, -1)
        lengths = _poisson(draws_3N[0], self.mean_span)
        drawn_at = np.flatnonzero(lengths)
        filled = lengths[drawn_at] if len(drawn_at) else np.array([hidden])
        spans = min(int(np.searchsorted(np.cumsum(filled), hidden)) + 1, len(text) - hidden, len(filled))
        filled = filled[:spans].copy()
        filled[-1] += hidden - filled.sum()  # the last one makes up the number, longer where there is no room for more
        drawn = drawn_at[spans - 1] + 1 if len(drawn_at) else 0
        empty = min(int((lengths[:drawn] == 0).sum()), hidden - spans)  # an empty span adds a mask to the text
        kept = _segments(len(text) - hidden + 2, spans + 1, draws_3N[1])
        kept[[0, -1]] -= 1  # a span may begin or end the text
        pieces, at = [], 0
        for keep, hide in zip(kept, filled, strict=False):
            pieces += [text[at : at + keep], np.array([self.mask_id])]
            at += keep + hide
        source = np.concatenate([*pieces, text[at:]])
        places = np.sort((draws_3N[2][:empty] * len(source)).astype(np.int64))
        return np.insert(source, places, self.mask_id)


AnyObjective = NextToken | MaskedToken | SpanDenoising | TextInfilling


def _seq2seq(sources: list[Ints], targets: list[Ints], start_id: int, source_len: int, target_len: int) -> Examples:
    """Examples whose decoder reads its targets one place late, from `start_id` on; both sides padded behind."""
    rows = len(targets)
    tokens_RT = np.full((rows, target_len), start_id, dtype=np.int64)
    targets_RT = np.full((rows, target_len), IGNORED, dtype=np.int64)
    documents_RT = np.zeros((rows, target_len), dtype=np.int32)
    source_RS = np.zeros((rows, source_len), dtype=np.int64)
    source_documents_RS = np.zeros((rows, source_len), dtype=np.int32)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        tokens_RT[row, 1 : len(target)] = target[:-1]
        targets_RT[row, : len(target)] = target
        documents_RT[row, : len(target)] = 1
        source_RS[row, : len(source)] = source
        source_documents_RS[row, : len(source)] = 1
    positions_RT = np.broadcast_to(np.arange(target_len), tokens_RT.shape).copy()
    encoder = EncoderInputs(tokens_RS=source_RS, documents_RS=source_documents_RS)
    return Examples(
        tokens_RT=tokens_RT,
        targets_RT=targets_RT,
        documents_RT=documents_RT,
        positions_RT=positions_RT,
        encoder=encoder,
    )


def _texts(rows: PackedRows) -> list[Ints]:
    """The tokens of every row's input columns, without padding."""
    real_RT = rows.document_numbers()[:, :-1] != 0
    return [tokens[real].astype(np.int64) for tokens, real in zip(rows.tokens_RW[:, :-1], real_RT, strict=True)]


def _segments(total: int, parts: int, draws: npt.NDArray[np.float64]) -> Ints:
    """`total` as a sum of `parts` positive numbers, every way equally likely."""
    cuts = np.sort(np.argsort(draws[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _poisson(draws: npt.NDArray[np.float64], mean: float) -> Ints:
    """Poisson numbers by inversion of uniform ones."""
    most = int(mean + 12 * math.sqrt(mean) + 12)
    terms = np.exp(-mean + np.arange(most) * math.log(mean) - np.array([math.lgamma(k + 1) for k in range(most)]))
    return np.searchsorted(np.cumsum(terms), draws, side="right").astype(np.int64)


def _key(seed: int, row: int) -> np.uint64:
    """What all draws of one row start from."""
    mixed_seed = mixed(np.array([seed], dtype=np.uint64))
    return np.uint64(mixed(mixed_seed ^ mixed(np.array([row], dtype=np.uint64) + np.uint64(1)))[0])


def _uniform(key: np.uint64, count: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1)."""
    bits = mixed(key + np.arange(count, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _content(tokens_T: Ints) -> int:
    """A number that hangs on a row's tokens alone."""
    places = mixed(np.arange(len(tokens_T), dtype=np.uint64))
    return int(np.bitwise_xor.reduce(mixed(places ^ tokens_T.astype(np.uint64)), initial=np.uint64(0)))


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise Refusal("rate", rate, "a share between 0 and 1 of the tokens is hidden", "choose 0.15, for example")
