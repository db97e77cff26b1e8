"""SentencePiece BPE with byte fallback: training it, and text to ids and back without loss.

No normalization, no dummy prefix, every space kept: decode(encode(text)) == text for every text that UTF-8 can hold.
Newlines and runs of spaces are learned like letters; control pieces (`<s>`, `<|user|>` …) are never produced by
encoding text, only by id.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from data.errors import DataError

MODEL_FILE = "tokenizer.model"
TEMPLATE_FILE = "chat_template.jinja"
STATISTICS_FILE = "statistics.json"

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL_PIECES = (PAD, UNK, BOS, EOS, SYSTEM, USER, ASSISTANT, END)  # ids 0 … 7
MASK, SENTINEL = "<mask>", "<extra_id_{}>"
"""Control pieces that some objectives hide text with; behind the eight where they are wanted, sentinel 0 last, as in T5."""

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

# SentencePiece leaves out, without a word, training lines longer than this.
MAX_LINE_BYTES = 4192
# Characters SentencePiece reserves for itself: NUL ends its strings, U+2581 stands for a space, U+2585 for the unknown.
# In training a line with one is lost; they cut lines instead. (Tabs are reserved too, unless they are symbols of their
# own, below.)
RESERVED = re.compile("[\0\u2581\u2585]")
SPACE_MARK = "\u2581"
SURROGATES = re.compile("[\ud800-\udfff]")
TAB_RUNS = ("\t", "\t\t", "\t\t\t", "\t\t\t\t")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The vocabulary and how it is learned."""

    vocab_size: int = 4096
    """A multiple of 128, which keeps the output layer's matrix product on its fast path."""
    split_by_script: bool = True
    """False lets pieces mix letters, digits' neighbours and punctuation, as in `self.` or `):`; denser on code."""
    split_by_whitespace: bool = True
    """False lets pieces span words, as in `in the`; denser still, and slower to learn."""
    max_piece_characters: int = 16
    character_coverage: float = 0.99995
    """Characters beyond this share of the text are spelled in bytes."""
    training_bytes: int = 50_000_000
    """At most about this much text is learned from, chosen by hash from all of it."""
    seed: int = 0
    """Which sample, when there is more text than training_bytes."""
    mask_piece: bool = field(default=False, metadata={"absent_at_default": True})
    """A control piece `<mask>`; an objective that hides with it sets this."""
    sentinel_pieces: int = field(default=0, metadata={"absent_at_default": True})
    """Control pieces `<extra_id_0>` …; span denoising takes 100 where this is 0."""

    def __post_init__(self) -> None:
        if self.vocab_size % 128 or self.vocab_size < 384:
            near = max(384, round(self.vocab_size / 128) * 128)
            raise DataError(
                f"tokenizer.vocab_size = {self.vocab_size}: must be a multiple of 128 and at least 384 "
                f"(8 control pieces and 256 bytes come first). Try {near}."
            )
        if self.sentinel_pieces < 0 or self.vocab_size < 384 + self.sentinel_pieces:
            raise DataError(
                f"tokenizer.sentinel_pieces = {self.sentinel_pieces} with tokenizer.vocab_size = {self.vocab_size}: they "
                "are part of the vocabulary and leave room for 384 pieces at least. Try tokenizer.vocab_size="
                f"{max(512, -(-(384 + self.sentinel_pieces) // 128) * 128)}."
            )
        if not 0.9 <= self.character_coverage <= 1:
            raise DataError(f"tokenizer.character_coverage = {self.character_coverage}: must lie between 0.9 and 1.")
        if not 1 <= self.max_piece_characters <= 512:
            raise DataError(
                f"tokenizer.max_piece_characters = {self.max_piece_characters}: must lie between 1 and 512."
            )
        if self.training_bytes < 1:
            raise DataError(f"tokenizer.training_bytes = {self.training_bytes}: must be at least 1.")

    @property
    def more_control_pieces(self) -> tuple[str, ...]:
        """Those behind the eight that every tokenizer has, in the order of their ids."""
        sentinels = (SENTINEL.format(number) for number in reversed(range(self.sentinel_pieces)))
        return (*((MASK,) if self.mask_piece else ()), *sentinels)


class Tokenizer:
    """A trained vocabulary. Load with `Tokenizer.load`; safe to pickle and to share between threads."""

    def __init__(self, model: bytes, chat_template: str) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.chat_template = chat_template
        self.vocab_size: int = self._pieces.vocab_size()
        ends = (number for number in range(len(CONTROL_PIECES), self.vocab_size) if not self._pieces.is_control(number))
        self.control_pieces = tuple(self.piece(number) for number in range(next(ends, self.vocab_size)))
        self.control_ids = {piece: number for number, piece in enumerate(CONTROL_PIECES)}
        """Of the eight that a chat template may hold."""
        hiding = {piece: number for number, piece in enumerate(self.control_pieces)}
        self._mask_id, self._sentinel_id = hiding.get(MASK), hiding.get(SENTINEL.format(0))
        self.sentinels = sum(SENTINEL.format(number) in hiding for number in range(len(hiding)))
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = (self.control_ids[p] for p in (PAD, UNK, BOS, EOS))
        self.end_id = self.control_ids[END]
        self._model = model
        self._space_mark_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what `train_tokenizer` wrote. Raises DataError when the folder holds no tokenizer, or a foreign one."""
        try:
            model = (Path(folder) / MODEL_FILE).read_bytes()
            tokenizer = cls(model, (Path(folder) / TEMPLATE_FILE).read_text(encoding="utf-8"))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{folder} holds no tokenizer ({error}). It needs {MODEL_FILE} and {TEMPLATE_FILE}."
            ) from error
        first = tuple(tokenizer.piece(number) for number in range(len(CONTROL_PIECES)))
        if first != CONTROL_PIECES:
            raise DataError(
                f"{folder}: the tokenizer begins with {first}; this program's begin with {CONTROL_PIECES}. Train one "
                "with it."
            )
        return tokenizer

    def require_mask_id(self) -> int:
        """The id of `<mask>`. Raises DataError for a tokenizer without one."""
        if self._mask_id is None:
            raise DataError(f"The tokenizer has no {MASK}: train one with tokenizer.mask_piece=true.")
        return self._mask_id

    def require_sentinel_id(self) -> int:
        """The id of `<extra_id_0>`; the next ones count down. Raises DataError for a tokenizer without sentinels."""
        if self._sentinel_id is None:
            raise DataError("The tokenizer has no sentinels: train one with tokenizer.sentinel_pieces=100.")
        return self._sentinel_id

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, str]]:
        return type(self), (self._model, self.chat_template)

    def encode(self, text: str) -> list[int]:
        """Return a text's ids, without `<s>` or `</s>`; control pieces spelled out in it are plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. One call is faster than many."""
        try:
            if not any(SPACE_MARK in text for text in texts):
                batch: list[list[int]] = self._pieces.encode(list(texts))
                return batch
            return [self._encode_around_space_marks(text) for text in texts]
        except (RuntimeError, TypeError) as error:
            if any(SURROGATES.search(text) for text in texts):
                message = "A text holds half a surrogate pair, which UTF-8 cannot. Decode it with errors='replace'."
                raise DataError(message) from error
            raise

    def _encode_around_space_marks(self, text: str) -> list[int]:
        """SentencePiece would read U+2581 as a space; spelled in bytes it comes back as what it was."""
        first, *rest = text.split(SPACE_MARK)
        ids: list[int] = self._pieces.encode(first)
        for part in rest:
            ids += self._space_mark_ids
            ids += self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int], *, show_control: bool = False) -> str:
        """Return the text of ids. Control pieces are left out, or written as in `<|user|>` with `show_control`.

        Ids that end within a character give U+FFFD in its place.
        """
        if not show_control:
            return self._decode_text([number for number in ids if number >= len(self.control_pieces)])
        parts, start = [], 0
        for at, number in enumerate(ids):
            if number < len(self.control_pieces):
                parts += [self._decode_text(ids[start:at]), self.control_pieces[number]]
                start = at + 1
        return "".join([*parts, self._decode_text(ids[start:])])

    def _decode_text(self, ids: Sequence[int]) -> str:
        return str(self._pieces.decode([int(number) for number in ids]))

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
    """The files that `Tokenizer.load` reads."""
    return [folder / MODEL_FILE, folder / TEMPLATE_FILE]


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings, out_dir: Path) -> dict[str, Any]:
    """Learn a vocabulary and write it with the chat template to `out_dir`; equal texts give equal bytes.

    Returns vocab_size, training bytes, lines split, and bytes per token on the text learned from. Raises DataError when
    the text is too small for the vocabulary, or the vocabulary too small for the text's characters.
    """
    counts: Counter[str] = Counter()
    sample = _sample(_training_lines(texts, counts), settings, counts)
    if not sample:
        raise DataError(
            "There is no text to train a tokenizer on: the corpus is empty. Name files with text in corpus.paths."
        )
    model = _train(sample, settings)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / MODEL_FILE).write_bytes(model)
    (out_dir / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer = Tokenizer(model, CHAT_TEMPLATE)
    probe = sample[:: max(1, len(sample) // 1000)]
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(probe))
    statistics = {
        "vocab_size": tokenizer.vocab_size,
        "training_bytes": counts["training_bytes"],
        "text_bytes": counts["text_bytes"],
        "lines_split": counts["lines_split"],
        "bytes_per_token": round(sum(len(text.encode("utf-8")) for text in probe) / max(tokens, 1), 4),
    }
    (out_dir / STATISTICS_FILE).write_text(json.dumps(statistics, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return statistics


def _train(sample: list[str], settings: TokenizerSettings) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            split_by_unicode_script=settings.split_by_script,
            split_by_whitespace=settings.split_by_whitespace,
            max_sentencepiece_length=settings.max_piece_characters,
            character_coverage=settings.character_coverage,
            max_sentence_length=MAX_LINE_BYTES,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            control_symbols=[SYSTEM, USER, ASSISTANT, END, *settings.more_control_pieces],
            user_defined_symbols=list(TAB_RUNS),
            num_threads=1,  # the number is written into the model, so it would change the artifact's bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), settings) from error
    return model.getvalue()


def _training_error(message: str, settings: TokenizerSettings) -> DataError:
    """SentencePiece's two complaints about the user's numbers, with the remedy."""
    too_large = re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", message)
    if too_large:
        most = int(too_large[1]) // 128 * 128
        remedy = f"Set tokenizer.vocab_size={most}, or give more text." if most >= 384 else "Give more text."
        return DataError(
            f"The corpus is too small for tokenizer.vocab_size = {settings.vocab_size}: it holds only {too_large[1]} "
            f"distinct pieces. {remedy}"
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small:
        least = -(-int(too_small[1]) // 128) * 128
        return DataError(
            f"tokenizer.vocab_size = {settings.vocab_size} cannot hold the corpus's characters: {too_small[1]} pieces "
            "are needed before any "
            f"is learned. Set tokenizer.vocab_size to more than {least}, or lower tokenizer.character_coverage."
        )
    return DataError(f"SentencePiece could not learn a vocabulary from this corpus: {message}")


def _training_lines(texts: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    """Cut texts into stretches of whole lines, so that newlines are learned; lines above MAX_LINE_BYTES are split."""
    for text in texts:
        counts["text_bytes"] += len(text.encode("utf-8"))
        for part in RESERVED.split(text):
            raw = part.encode("utf-8")
            start, inside_line = 0, False
            while start < len(raw):
                end = start + MAX_LINE_BYTES
                if end < len(raw):
                    line_end = raw.rfind(b"\n", start, end) + 1
                    if line_end:
                        end, inside_line = line_end, False
                    else:
                        counts["lines_split"] += not inside_line
                        inside_line = True
                        while raw[end] & 0xC0 == 0x80:  # within a character: back to its first byte
                            end -= 1
                yield raw[start:end].decode("utf-8")
                start = end


def _sample(lines: Iterable[str], settings: TokenizerSettings, counts: Counter[str]) -> list[str]:
    """Keep about `training_bytes` of lines, those of lowest hash, in their order; memory: twice that."""
    kept: list[tuple[int, int, int, str]] = []
    held = 0
    for number, line in enumerate(lines):
        raw = line.encode("utf-8")
        kept.append((zlib.crc32(raw, settings.seed), number, len(raw), line))
        held += len(raw)
        if held > 2 * settings.training_bytes:
            kept, held = _lowest(kept, settings.training_bytes)
    if held > settings.training_bytes:
        kept, held = _lowest(kept, settings.training_bytes)
    counts["training_bytes"] = held
    return [line for _, _, _, line in sorted(kept, key=lambda entry: entry[1])]


def _lowest(entries: list[tuple[int, int, int, str]], most_bytes: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """The entries of lowest hash that fit into `most_bytes`, at least one, and their bytes."""
    kept: list[tuple[int, int, int, str]] = []
    held = 0
    for entry in sorted(entries):
        if kept and held + entry[2] > most_bytes:
            break
        kept.append(entry)
        held += entry[2]
    return kept, held
