"""Tokenizers as other models have them, trained small: their files lie as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WORDS = "([^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+)"


def _bytes(special: Sequence[str], texts: Sequence[str], split: bool = False) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, steps]) if split else steps
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(list(special))
    return made


def gpt2(texts: Sequence[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """One piece begins and ends texts; no template, no padding."""
    return _bytes(["<|endoftext|>"], texts), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def qwen(texts: Sequence[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """No beginning, ChatML, a normalizer, and pieces that are added but not special."""
    made = _bytes(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], texts, split=True)
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return made, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}


def llama3(texts: Sequence[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A template that trims; no padding."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    named = {"bos_token": names[0], "eos_token": names[4], "chat_template": LLAMA_3}
    return _bytes(names, texts, split=True), named


def llama2(texts: Sequence[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Metaspace with byte fallback; control pieces are in the vocabulary; the template knows no system message."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=8)
    made.train_from_iterator([text[:2000] for text in texts], trainer)
    content = json.loads(made.to_str())  # bytes are pieces of the vocabulary, and no control pieces
    content["added_tokens"] = content["added_tokens"][:3]
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    return made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA_2}


def bert(texts: Sequence[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Lower case, WordPiece, what it does not know is lost; [CLS] and [SEP] stand around a text."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return made, {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}


def t5(texts: Sequence[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Unigram, whose vocabulary spells its control pieces; sentinels, highest first."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    sentinels = [f"<extra_id_{number}>" for number in range(20)]
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(sentinels[::-1])
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": sentinels}
    return made, named


KINDS: dict[str, Callable[[Sequence[str]], tuple[tokenizers.Tokenizer, dict[str, Any]]]] = {
    made.__name__: made for made in (gpt2, qwen, llama3, llama2, bert, t5)
}


def save(kind: str, texts: Sequence[str], folder: Path) -> Path:
    """Train a tokenizer and write it as transformers does."""
    from transformers import PreTrainedTokenizerFast

    made, named = KINDS[kind](texts)
    template = named.pop("chat_template", None)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, **named)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder
