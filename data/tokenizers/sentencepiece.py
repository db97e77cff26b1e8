"""Text to ids and back. One contract, `Tokenizer`, over two kinds of files: our own SentencePiece, and tokenizer.json.

    tokenizer = Tokenizer.load(folder)          # this program's (data/tokenizers/training.py), or a model's own
    tokenizer.decode(tokenizer.encode("text"))

Control pieces (`<s>`, `<|user|>` …) are never produced by encoding text, only by id. This program's own tokenizers lose
nothing: no normalization, no dummy prefix, every space kept, so decode(encode(text)) == text for every text that UTF-8 can
hold. Those of other models (data/tokenizers/huggingface.py) may normalize.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from conf.refusal import NO_VALUE, Refusal
from data.tokenizers.base import MASK, READERS, TEMPLATE_FILE, Spans, Tokenizer
from data.tokenizers.huggingface import FILES, HuggingFaceTokenizer, read_foreign

__all__ = ["HuggingFaceTokenizer", "SentencePieceTokenizer", "Tokenizer", "tokenizer_files"]

MODEL_FILE = "tokenizer.model"

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL_PIECES = (PAD, UNK, BOS, EOS, SYSTEM, USER, ASSISTANT, END)  # ids 0 … 7

# How a conversation is written, here and in every exported tokenizer. The generation block is what the assistant is
# trained on.
CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
  {%- if message['role'] not in ('system', 'user', 'assistant') -%}
    {{- raise_exception('a message has the role ' ~ message['role'] ~ '; known are system, user and assistant') -}}
  {%- endif -%}
  {{- '<|' ~ message['role'] ~ '|>' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] ~ '<|end|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] ~ '<|end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

# In an exported tokenizer every control piece begins with `<`, and a message's own `<` is written so (data/tokenizer_json).
BREAKER = "<\ufdd0"
BROKEN_MESSAGES = """\
{%- set broken = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set message = dict(message, content=message['content'] | replace('<', '<\ufdd0')) -%}
  {%- endif -%}
  {%- set broken.messages = broken.messages + [message] -%}
{%- endfor -%}
{%- set messages = broken.messages -%}
"""

SPACE_MARK = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
TAB_RUNS = ("\t", "\t\t", "\t\t\t", "\t\t\t\t")


class SentencePieceTokenizer(Tokenizer):
    """This program's own: SentencePiece BPE with byte fallback. Its control pieces have the first ids."""

    def __init__(self, model: bytes, chat_template: str, template_origin: str = TEMPLATE_FILE) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.chat_template = chat_template
        self.template_origin = None if chat_template == CHAT_TEMPLATE else template_origin
        self.vocab_size = self._pieces.vocab_size()
        ends = (number for number in range(len(CONTROL_PIECES), self.vocab_size) if not self._pieces.is_control(number))
        self.control_ids = {self.piece(number): number for number in range(next(ends, self.vocab_size))}
        self.mask_piece = MASK if MASK in self.control_ids else None
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = range(4)
        self.template_names = {"pad_token": PAD, "unk_token": UNK, "bos_token": BOS, "eos_token": EOS}
        self._model = model
        self._space_mark_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes, str, str]]:
        return type(self), (self._model, self.chat_template, self.template_origin or TEMPLATE_FILE)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not any(SPACE_MARK in text for text in texts):
            batch: list[list[int]] = self._pieces.encode(list(texts))
            return batch
        return [self._encode_around_space_marks(text) for text in texts]

    def _encode_around_space_marks(self, text: str) -> list[int]:
        """SentencePiece would read U+2581 as a space; spelled in bytes it comes back as what it was."""
        first, *rest = text.split(SPACE_MARK)
        ids: list[int] = self._pieces.encode(first)
        for part in rest:
            ids += self._space_mark_ids
            ids += self._pieces.encode(part)
        return ids

    def _decode_text(self, ids: Sequence[int]) -> str:
        return str(self._pieces.decode([int(number) for number in ids]))

    def characters(self, text: str) -> Spans:
        """Each piece stands for the bytes it spells."""
        return _spelled(text, [self.piece(number) for number in self.encode(text)])

    def encode_parts(self, parts: Sequence[str | int]) -> tuple[list[int], Spans]:
        """Text between control pieces is encoded by itself."""
        ids: list[int] = []
        spans, at = [np.zeros((0, 2), dtype=np.int64)], 0
        for part in parts:
            if isinstance(part, str):
                found = self.encode(part)
                ids += found
                spans.append(at + _spelled(part, [self.piece(number) for number in found]))
                at += len(part)
            else:
                ids.append(part)
                spans.append(np.array([[at, at + 1]]))
                at += 1
        return ids, np.concatenate(spans)

    def piece(self, number: int) -> str:
        """Return a piece as SentencePiece stores it: U+2581 for spaces, `<0x0A>` for a byte."""
        return str(self._pieces.id_to_piece(int(number)))

    def vocabulary(self) -> list[tuple[str, float]]:
        """Return (piece, score) by id; the higher score merges first."""
        return [(self.piece(number), float(self._pieces.get_score(number))) for number in range(self.vocab_size)]

    def is_plain(self, number: int) -> bool:
        """Whether a piece was learned from text: neither control, unknown nor byte, nor a run of tabs."""
        special = self._pieces.is_control(number) or self._pieces.is_unknown(number) or self._pieces.is_byte(number)
        return not special and self.piece(number) not in TAB_RUNS


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that say what a folder's tokenizer is, those that only other programs read included; none: it has none."""
    own, _ = _own(folder)
    names = (MODEL_FILE, TEMPLATE_FILE) if own is not None else FILES
    return [folder / name for name in names if (folder / name).is_file()]


def _own(folder: Path) -> tuple[Tokenizer | None, str]:
    """The folder's tokenizer if this program made it; else why it is not that."""
    try:
        model, template = ((folder / name).read_bytes() for name in (MODEL_FILE, TEMPLATE_FILE))
        text = template.decode("utf-8").removeprefix(BROKEN_MESSAGES)
        tokenizer = SentencePieceTokenizer(model, text, str(folder / TEMPLATE_FILE))
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        return None, f"not this program's {MODEL_FILE} and {TEMPLATE_FILE}: {error}"
    first = tuple(tokenizer.piece(number) for number in range(min(len(CONTROL_PIECES), tokenizer.vocab_size)))
    if first != CONTROL_PIECES:
        return None, f"its {MODEL_FILE} begins with {first} and this program's begin with {CONTROL_PIECES}"
    return tokenizer, ""


def _spelled(text: str, pieces: Sequence[str]) -> Spans:
    """The characters of SentencePiece pieces that spell a text, byte by byte.

    Raises Refusal where the pieces are not as long as the text.
    """
    raw = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    ends = np.cumsum([len(_bytes_of(piece)) for piece in pieces], dtype=np.int64)
    if (ends[-1] if len(ends) else 0) != len(raw):
        raise Refusal(
            "tokenizer",
            NO_VALUE,
            f"spells a text of {len(raw)} bytes in {ends[-1] if len(ends) else 0}, so characters and tokens do not match",
            "trace with the tokenizer the shards were made with",
        )
    begins = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])[: len(ends)]
    is_first_byte = np.append((raw & 0xC0) != 0x80, True)
    characters_before = np.concatenate([[0], np.cumsum(is_first_byte)])
    inside_character = ~is_first_byte[begins]
    return np.stack([characters_before[begins] - inside_character, characters_before[ends]], axis=1)


def _bytes_of(piece: str) -> bytes:
    """The text bytes a SentencePiece piece stands for: U+2581 is a space, `<0x0A>` one byte."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode("utf-8")


READERS[:] = [_own, read_foreign]
