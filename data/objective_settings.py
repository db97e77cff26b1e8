"""The objectives that pretraining can be told, before a tokenizer says which ids they hide with.

objective = MaskedTokenSettings(rate=0.2)
objective.over(tokenizer, seed=0)        # the pure function of (row, seed, global row) that the loader applies
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from data.denoising import AnyObjective, MaskedToken, SpanDenoising, TextInfilling
from data.errors import DataError
from data.objectives import NextToken
from data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class NextTokenSettings:
    """Predict each token from those before it: decoders."""

    kind: Literal["next_token"] = "next_token"
    needs_mask: ClassVar[bool] = False

    def sentinels(self, seq_len: int) -> int:
        """Sentinel pieces that a row of `seq_len` tokens may take."""
        return 0

    def widths(self, seq_len: int) -> tuple[int, int] | None:
        """Tokens of a row that an encoder and its decoder read; None where there is one stack."""
        return None

    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        """The objective with this tokenizer's ids. Raises DataError where it lacks a piece."""
        return NextToken()


@dataclass(frozen=True, kw_only=True)
class MaskedTokenSettings:
    """Find hidden tokens from both sides (BERT; dynamic: RoBERTa): encoders. See `MaskedToken`."""

    kind: Literal["masked_token"] = "masked_token"
    rate: float = 0.15
    dynamic: bool = True
    needs_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        MaskedToken(mask_id=0, random_ids=(0, 1), rate=self.rate)

    def sentinels(self, seq_len: int) -> int:
        """None is taken."""
        return 0

    def widths(self, seq_len: int) -> tuple[int, int] | None:
        """There is one stack."""
        return None

    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        """Hides any piece of text, no control piece."""
        return MaskedToken(
            mask_id=tokenizer.require_mask_id(),
            random_ids=tokenizer.text_ids,
            kept_ids=tuple(tokenizer.control_ids.values()),
            rate=self.rate,
            dynamic=self.dynamic,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class SpanDenoisingSettings:
    """Say what sentinels stand for (T5): encoder-decoders. See `SpanDenoising`."""

    kind: Literal["span_denoising"] = "span_denoising"
    rate: float = 0.15
    mean_span: float = 3.0
    needs_mask: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._with_ids(0, 0, 0, 0)

    def sentinels(self, seq_len: int) -> int:
        """One for each span."""
        return self._with_ids(0, 0, 0, 0).lengths(seq_len)[1]

    def widths(self, seq_len: int) -> tuple[int, int] | None:
        """What is left with sentinels, and what was hidden with sentinels; both end with `</s>`."""
        return self._with_ids(0, 0, 0, 0).widths(seq_len)

    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        """The decoder begins with the padding piece, as T5's does."""
        return self._with_ids(tokenizer.require_sentinel_id(), tokenizer.pad_id, tokenizer.eos_id, seed)

    def _with_ids(self, sentinel_id: int, start_id: int, end_id: int, seed: int) -> SpanDenoising:
        return SpanDenoising(
            sentinel_id=sentinel_id,
            start_id=start_id,
            end_id=end_id,
            rate=self.rate,
            mean_span=self.mean_span,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class TextInfillingSettings:
    """Say a text again of which spans were hidden (BART): encoder-decoders. See `TextInfilling`."""

    kind: Literal["text_infilling"] = "text_infilling"
    rate: float = 0.3
    mean_span: float = 3.0
    needs_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._with_ids(0, 0, 0)

    def sentinels(self, seq_len: int) -> int:
        """None is taken."""
        return 0

    def widths(self, seq_len: int) -> tuple[int, int] | None:
        """Both as long as the row."""
        return self._with_ids(0, 0, 0).widths(seq_len)

    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        """The decoder begins with `</s>`, as BART's does."""
        return self._with_ids(tokenizer.require_mask_id(), tokenizer.eos_id, seed)

    def _with_ids(self, mask_id: int, start_id: int, seed: int) -> TextInfilling:
        return TextInfilling(mask_id=mask_id, start_id=start_id, rate=self.rate, mean_span=self.mean_span, seed=seed)


ObjectiveChoice = NextTokenSettings | MaskedTokenSettings | SpanDenoisingSettings | TextInfillingSettings


def check_pieces(objective: ObjectiveChoice, tokenizer: Tokenizer, seq_len: int) -> None:
    """Whether a tokenizer has the pieces that an objective hides with in rows of `seq_len`. Raises DataError."""
    objective.over(tokenizer, 0)
    check_sentinels(objective, tokenizer.sentinels, seq_len)


def check_sentinels(objective: ObjectiveChoice, sentinel_pieces: int, seq_len: int) -> None:
    """Whether so many sentinel pieces are enough. Raises DataError."""
    taken = objective.sentinels(seq_len)
    if taken > sentinel_pieces:
        raise DataError(
            f"tokenizer.sentinel_pieces = {sentinel_pieces}: objective={objective.kind} hides up to {taken} spans of a "
            f"row of {seq_len:,} tokens, and each needs a piece of its own; use tokenizer.sentinel_pieces={taken}, "
            "shorter rows or longer spans."
        )
