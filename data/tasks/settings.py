"""The objectives that pretraining can be told, before a tokenizer says which ids they hide with.

objective = MaskedTokenSettings(rate=0.2)
objective.over(tokenizer, seed=0)        # the pure function of (row, seed, global row) that the loader applies
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from conf.refusal import Refusal
from data.tasks.denoising import AnyObjective, MaskedToken, SpanDenoising, TextInfilling
from data.tasks.objectives import NextToken
from data.tokenizers.sentencepiece import Tokenizer


class Asked(ABC):
    """What there is to know of an objective while no tokenizer has given it ids."""

    needs_mask: ClassVar[bool] = False
    """Whether it hides with `<mask>`."""

    def sentinels(self, seq_len: int) -> int:
        """Sentinel pieces that a row of `seq_len` tokens may take."""
        return 0

    def widths(self, seq_len: int) -> tuple[int, int] | None:
        """Tokens of a row that an encoder and its decoder read; None where there is one stack."""
        return None

    @abstractmethod
    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        """The objective with this tokenizer's ids. Raises Refusal where it lacks a piece."""


@dataclass(frozen=True, kw_only=True)
class NextTokenSettings(Asked):
    """Predict each token from those before it: decoders."""

    kind: Literal["next_token"] = "next_token"
    """Predict each token from those before it."""

    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        return NextToken()


@dataclass(frozen=True, kw_only=True)
class MaskedTokenSettings(Asked):
    """Find hidden tokens from both sides (BERT; dynamic: RoBERTa): encoders. See `MaskedToken`."""

    kind: Literal["masked_token"] = "masked_token"
    """Find hidden tokens from both sides."""
    rate: float = 0.15
    """Share of the tokens that are hidden."""
    dynamic: bool = True
    """Hide other tokens every time a row comes up (RoBERTa); false hides the same (BERT)."""
    needs_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._without_ids()

    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        """Hides any piece of text, no control piece."""
        return replace(
            self._without_ids(),
            mask_id=tokenizer.require_mask_id(),
            random_ids=tokenizer.text_ids,
            kept_ids=tuple(tokenizer.control_ids.values()),
            seed=seed,
        )

    def _without_ids(self) -> MaskedToken:
        return MaskedToken(mask_id=0, random_ids=(0, 1), rate=self.rate, dynamic=self.dynamic)


@dataclass(frozen=True, kw_only=True)
class SpanDenoisingSettings(Asked):
    """Say what sentinels stand for (T5): encoder-decoders. See `SpanDenoising`."""

    kind: Literal["span_denoising"] = "span_denoising"
    """Say what sentinels stand for."""
    rate: float = 0.15
    """Share of the tokens that are hidden."""
    mean_span: float = 3.0
    """Mean tokens of a hidden span."""

    def __post_init__(self) -> None:
        self._without_ids()

    def sentinels(self, seq_len: int) -> int:
        """One for each span."""
        return self._without_ids().lengths(seq_len)[1]

    def widths(self, seq_len: int) -> tuple[int, int] | None:
        """What is left with sentinels, and what was hidden with sentinels; both end with `</s>`."""
        return self._without_ids().widths(seq_len)

    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        """The decoder begins with the padding piece, as T5's does."""
        return replace(
            self._without_ids(),
            sentinel_id=tokenizer.require_sentinel_id(),
            start_id=tokenizer.pad_id,
            end_id=tokenizer.eos_id,
            seed=seed,
        )

    def _without_ids(self) -> SpanDenoising:
        return SpanDenoising(sentinel_id=0, start_id=0, end_id=0, rate=self.rate, mean_span=self.mean_span)


@dataclass(frozen=True, kw_only=True)
class TextInfillingSettings(Asked):
    """Say a text again of which spans were hidden (BART): encoder-decoders. See `TextInfilling`."""

    kind: Literal["text_infilling"] = "text_infilling"
    """Say a text of which spans are hidden."""
    rate: float = 0.3
    """Share of the tokens that are hidden."""
    mean_span: float = 3.0
    """Mean tokens of a hidden span, drawn from a Poisson distribution."""
    needs_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._without_ids()

    def widths(self, seq_len: int) -> tuple[int, int] | None:
        """Both as long as the row."""
        return self._without_ids().widths(seq_len)

    def over(self, tokenizer: Tokenizer, seed: int) -> AnyObjective:
        """The decoder begins with `</s>`, as BART's does."""
        return replace(self._without_ids(), mask_id=tokenizer.require_mask_id(), start_id=tokenizer.eos_id, seed=seed)

    def _without_ids(self) -> TextInfilling:
        return TextInfilling(mask_id=0, start_id=0, rate=self.rate, mean_span=self.mean_span)


ObjectiveChoice = NextTokenSettings | MaskedTokenSettings | SpanDenoisingSettings | TextInfillingSettings


def check_pieces(objective: ObjectiveChoice, tokenizer: Tokenizer, seq_len: int) -> None:
    """Whether a tokenizer has the pieces that an objective hides with in rows of `seq_len`. Raises Refusal."""
    objective.over(tokenizer, 0)
    check_sentinels(objective, tokenizer.sentinels, seq_len)


def check_sentinels(objective: ObjectiveChoice, sentinel_pieces: int, seq_len: int) -> None:
    """Whether so many sentinel pieces are enough. Raises Refusal."""
    taken = objective.sentinels(seq_len)
    if taken > sentinel_pieces:
        raise Refusal(
            "tokenizer.sentinel_pieces",
            sentinel_pieces,
            f"objective={objective.kind} hides up to {taken} spans of a row of {seq_len:,} tokens, and each needs a piece "
            "of its own",
            f"use tokenizer.sentinel_pieces={taken}, shorter rows or longer spans",
        )
