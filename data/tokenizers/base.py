"""What every tokenizer does, whatever files it is made of. `data.tokenizers.sentencepiece.Tokenizer` knows the kinds."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from conf.refusal import NO_VALUE, Refusal

TEMPLATE_FILE = "chat_template.jinja"
MASK, SENTINEL = "<mask>", "<extra_id_{}>"
"""Control pieces that some objectives hide text with; behind the eight where they are wanted, sentinel 0 last, as in T5."""
SURROGATES = re.compile("[\ud800-\udfff]")

Spans = npt.NDArray[np.int64]
"""First and past-the-last character of each token, [N, 2]; a character of several tokens is in all of them."""


class Tokenizer(ABC):
    """A vocabulary. Load with `Tokenizer.load`; safe to pickle and to share between threads.

    control_ids: every control piece, by rising id. bos_id, eos_id: what a document begins and ends with, which may be one
    piece. pad_id: fills rows; it may stand for something else too, because what is padding is told by the rows' document
    numbers. unk_id: None where every text can be spelled. chat_template: Jinja, as transformers renders it.
    template_origin: which file it is from, None for this program's own.
    template_names: what such a template finds beside the messages.
    """

    vocab_size: int
    control_ids: dict[str, int]
    pad_id: int
    unk_id: int | None
    bos_id: int
    eos_id: int
    chat_template: str
    template_origin: str | None
    template_names: Mapping[str, str]
    mask_piece: str | None
    keeps_text = True
    """Whether decode(encode(text)) == text for every text; if not, losses are counted in shards and charged in scores."""

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a folder: this program's where it is one, else tokenizer.json. Raises Refusal."""
        reasons = []
        for read in READERS:
            tokenizer, reason = read(Path(folder))
            if tokenizer is not None:
                return tokenizer
            reasons.append(reason)
        raise Refusal(folder, NO_VALUE, f"holds no tokenizer that can be read: {'; '.join(reasons)}")

    @property
    def control_pieces(self) -> tuple[str, ...]:
        """Pieces that no text is encoded to, by rising id."""
        return tuple(self.control_ids)

    @property
    def text_ids(self) -> tuple[int, int]:
        """[first, end) of the longest run of ids with no control piece in it: what random pieces of text are drawn from."""
        edges = pairwise((-1, *self.control_ids.values(), self.vocab_size))
        return max(((before + 1, after) for before, after in edges), key=lambda run: run[1] - run[0])

    @cached_property
    def end_id(self) -> int:
        """The piece that the chat template closes an answer with; `eos_id` where it closes with text."""
        from data.tokenizers.chat import answer_end

        return answer_end(self)

    def require_mask_id(self) -> int:
        """The id of the piece that stands for hidden text. Raises Refusal for a tokenizer without one."""
        if self.mask_piece is None:
            remedy = "train one with tokenizer.mask_piece=true, or start from weights with a mask"
            raise Refusal("tokenizer", NO_VALUE, f"has no {MASK}", remedy)
        return self.control_ids[self.mask_piece]

    def require_sentinel_id(self) -> int:
        """The id of `<extra_id_0>`; the next ones count down. Raises Refusal for a tokenizer without sentinels."""
        if not self.sentinels:
            remedy = "train one with tokenizer.sentinel_pieces=100, or start from T5's kin"
            raise Refusal("tokenizer", NO_VALUE, "has no sentinels", remedy)
        return self.control_ids[SENTINEL.format(0)]

    @cached_property
    def sentinels(self) -> int:
        """How many pieces `<extra_id_0>` … there are whose ids count down without a gap."""
        first, number = self.control_ids.get(SENTINEL.format(0)), 0
        while first is not None and self.control_ids.get(SENTINEL.format(number)) == first - number:
            number += 1
        return number

    def encode(self, text: str) -> list[int]:
        """Return a text's ids, without `<s>` or `</s>`; control pieces spelled out in it are plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. One call is faster than many. Raises Refusal for what UTF-8 cannot hold."""
        try:
            return self._encode_batch(texts)
        except (RuntimeError, TypeError, UnicodeEncodeError) as error:
            if any(SURROGATES.search(text) for text in texts):
                raise half_a_pair() from error
            raise

    def decode(self, ids: Sequence[int], *, show_control: bool = False) -> str:
        """Return the text of ids. Control pieces are left out, or written as in `<|user|>` with `show_control`.

        Ids that end within a character give U+FFFD in its place.
        """
        if not show_control:
            return self._decode_text([number for number in ids if number not in self._control_names])
        parts, start = [], 0
        for at, number in enumerate(ids):
            if number in self._control_names:
                parts += [self._decode_text(ids[start:at]), self._control_names[number]]
                start = at + 1
        return "".join([*parts, self._decode_text(ids[start:])])

    @cached_property
    def _control_names(self) -> dict[int, str]:
        return {number: piece for piece, number in self.control_ids.items()}

    @abstractmethod
    def characters(self, text: str) -> Spans:
        """Which characters of a text each of its tokens stands for."""

    @abstractmethod
    def encode_parts(self, parts: Sequence[str | int]) -> tuple[list[int], Spans]:
        """Ids of texts with control pieces (ids) between them; in the spans a control piece counts as one character."""

    @abstractmethod
    def piece(self, number: int) -> str:
        """Return a piece as the files spell it."""

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abstractmethod
    def _decode_text(self, ids: Sequence[int]) -> str: ...


Reader = Callable[[Path], tuple[Tokenizer | None, str]]
READERS: list[Reader] = []
"""What `Tokenizer.load` asks in turn: each gives a folder's tokenizer, or why the folder holds none of its kind."""


def half_a_pair() -> Refusal:
    """What to say of a text that cannot be encoded."""
    return Refusal(
        "text", NO_VALUE, "holds half a surrogate pair, which UTF-8 cannot", "decode it with errors='replace'"
    )
