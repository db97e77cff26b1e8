"""The tokenizer as Hugging Face files, for transformers, vLLM and the rest: same pieces, same merges, same ids.

One that came with weights from outside leaves with the files it came in, byte by byte. For this program's own they are
written: pieces with real spaces, not U+2581, so no decoder has to swap them and U+2581 in a text survives.

Text is text there, too. `<unk>` is no added token, as encoding never needs it: a corpus that spells it (WikiText) is read as
here. The chat template breaks whatever could be a control piece of a message with a noncharacter after each `<`, which
the normalizer takes out again once control pieces have been looked for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from data.tokenizers.base import MASK, TEMPLATE_FILE
from data.tokenizers.huggingface import HuggingFaceTokenizer
from data.tokenizers.sentencepiece import (
    BOS,
    BREAKER,
    BROKEN_MESSAGES,
    EOS,
    PAD,
    SPACE_MARK,
    TAB_RUNS,
    UNK,
    SentencePieceTokenizer,
    Tokenizer,
    tokenizer_files,
)


def export_tokenizer(
    tokenizer_dir: Path, out_dir: Path, *, max_tokens: int | None = None, left_padded: bool = True
) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja to `out_dir`, beside
    the tokenizer's own files; for a tokenizer from outside, its files and the chat template that was used.

    left_padded: for decoders, which continue what stands last.

    `AutoTokenizer.from_pretrained(out_dir)` then gives Tokenizer.encode's ids, with `<s>` before them unless
    add_special_tokens=False, and encode_chat's for messages. Two differences remain: outside of messages transformers
    reads control pieces but `<unk>` as such unless split_special_tokens=True, and its decoder keeps them unless
    skip_special_tokens=True.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_files(tokenizer_dir):
        shutil.copyfile(file, out_dir / file.name)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        if not (isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.brings_template):
            (out_dir / TEMPLATE_FILE).write_text(tokenizer.chat_template, encoding="utf-8")
        return
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    if MASK in tokenizer.control_pieces:
        special["mask_token"] = MASK
    additional = [piece for piece in tokenizer.control_pieces if piece not in (UNK, *special.values())]
    chat_template = BROKEN_MESSAGES + tokenizer.chat_template
    (out_dir / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": additional,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens if max_tokens is not None else int(1e30),
        "padding_side": "left" if left_padded else "right",
        "chat_template": chat_template,
    }
    _write(out_dir / "tokenizer.json", tokenizer_json(tokenizer))
    _write(out_dir / "tokenizer_config.json", config)
    _write(out_dir / "special_tokens_map.json", {**special, "additional_special_tokens": additional})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the content of tokenizer.json: BPE over the whole text with byte fallback, merges by falling score."""
    pieces = [piece.replace(SPACE_MARK, " ") for piece, _ in tokenizer.vocabulary()]
    bos_first = {"SpecialToken": {"id": BOS, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(number, piece, special=True) for number, piece in enumerate(tokenizer.control_pieces) if piece != UNK
        ]
        + [_added(pieces.index(run), run, special=False) for run in TAB_RUNS],
        "normalizer": {"type": "Replace", "pattern": {"Regex": f"(?<={BREAKER[0]}){BREAKER[1]}"}, "content": ""},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos_first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos_id], "tokens": [BOS]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": _merges(tokenizer),
        },
    }


def _added(number: int, piece: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": piece, **flags, "special": special}


def _merges(tokenizer: SentencePieceTokenizer) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first; equal scores by the left part's length.

    SentencePiece merges whatever pair gives the best piece, however that piece was made when it was learned.
    """
    scores = {
        piece: score for number, (piece, score) in enumerate(tokenizer.vocabulary()) if tokenizer.is_plain(number)
    }
    merges = [
        (-score, cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left.replace(SPACE_MARK, " "), right.replace(SPACE_MARK, " ")) for _, _, left, right in sorted(merges)]
