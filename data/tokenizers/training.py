"""Training the vocabulary: SentencePiece BPE with byte fallback, learned from a sample of the text.

train_tokenizer(texts, TokenizerSettings(vocab_size=4096), out_dir)       # equal texts give equal bytes
Tokenizer.load(out_dir)
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from conf.refusal import NO_VALUE, Refusal, refuse_below
from conf.refusal import field as key_of
from data.tokenizers.base import MASK, SENTINEL, TEMPLATE_FILE
from data.tokenizers.sentencepiece import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END,
    MODEL_FILE,
    PAD,
    SYSTEM,
    TAB_RUNS,
    USER,
    SentencePieceTokenizer,
)

STATISTICS_FILE = "statistics.json"
# SentencePiece leaves out, without a word, training lines longer than this.
MAX_LINE_BYTES = 4192
# Characters SentencePiece reserves for itself: NUL ends its strings, U+2581 stands for a space, U+2585 for the unknown.
# In training a line with one is lost; they cut lines instead. (Tabs are reserved too, unless they are symbols of their
# own.)
RESERVED = re.compile("[\0\u2581\u2585]")


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
    """Characters of the longest piece."""
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
            raise Refusal(
                "vocab_size",
                self.vocab_size,
                "must be a multiple of 128 and at least 384 (8 control pieces and 256 bytes come first)",
                f"set {key_of('vocab_size')}={near}",
            )
        if self.sentinel_pieces < 0 or self.vocab_size < 384 + self.sentinel_pieces:
            raise Refusal(
                "sentinel_pieces",
                self.sentinel_pieces,
                f"they are part of {key_of('vocab_size')} = {self.vocab_size} and leave room for 384 pieces at least",
                f"set {key_of('vocab_size')}={max(512, -(-(384 + self.sentinel_pieces) // 128) * 128)}",
            )
        for name, least, most in (("character_coverage", 0.9, 1), ("max_piece_characters", 1, 512)):
            if not least <= (value := getattr(self, name)) <= most:
                usual = getattr(type(self), name)
                raise Refusal(name, value, f"must lie between {least} and {most}", f"set {key_of(name)}={usual}")
        refuse_below(self, 1, "training_bytes")

    @property
    def more_control_pieces(self) -> tuple[str, ...]:
        """Those behind the eight that every tokenizer has, in the order of their ids."""
        sentinels = (SENTINEL.format(number) for number in reversed(range(self.sentinel_pieces)))
        return (*((MASK,) if self.mask_piece else ()), *sentinels)


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings, out_dir: Path) -> dict[str, Any]:
    """Learn a vocabulary and write it with the chat template to `out_dir`; equal texts give equal bytes.

    Returns vocab_size, training bytes, lines split, and bytes per token on the text learned from. Raises Refusal when
    the text is too small for the vocabulary, or the vocabulary too small for the text's characters.
    """
    counts: Counter[str] = Counter()
    sample = _sample(_training_lines(texts, counts), settings, counts)
    if not sample:
        raise Refusal(
            "corpus",
            NO_VALUE,
            "there is no text to train a tokenizer on: the corpus is empty",
            "name files with text in corpus.paths",
        )
    model = _train(sample, settings)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / MODEL_FILE).write_bytes(model)
    (out_dir / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer = SentencePieceTokenizer(model, CHAT_TEMPLATE)
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


def _training_error(message: str, settings: TokenizerSettings) -> Refusal:
    """SentencePiece's two complaints about the user's numbers, with the remedy."""
    too_large = re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", message)
    if too_large:
        most = int(too_large[1]) // 128 * 128
        least = -(-(384 + settings.sentinel_pieces) // 128) * 128
        remedy = (
            f"set tokenizer.vocab_size={most}, or give more text"
            if most >= least
            else f"the smallest vocabulary is tokenizer.vocab_size={least}, and this text does not fill it: give more text"
        )
        return Refusal(
            "tokenizer.vocab_size",
            settings.vocab_size,
            f"the corpus is too small for it: it holds only {too_large[1]} distinct pieces",
            remedy,
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small:
        # Below this SentencePiece learns nothing: as many pieces as are needed, and one at least besides.
        least = (int(too_small[1]) // 128 + 1) * 128
        return Refusal(
            "tokenizer.vocab_size",
            settings.vocab_size,
            f"cannot hold the corpus's characters: {too_small[1]} pieces are needed before any is learned",
            f"set tokenizer.vocab_size={least} or more, or lower tokenizer.character_coverage",
        )
    return Refusal("tokenizer", NO_VALUE, f"SentencePiece could not learn a vocabulary from this corpus: {message}")


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
