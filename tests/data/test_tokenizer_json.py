"""The exported tokenizer gives the same ids and the same text in transformers, whatever the text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data.tokenizers.chat import encode_chat
from data.tokenizers.export import export_tokenizer
from data.tokenizers.sentencepiece import Tokenizer
from data.tokenizers.training import TokenizerSettings, train_tokenizer

FRAGMENTS = [
    *(
        "\0",
        "\u2581",
        "\u2585",
        " ",
        "  ",
        "   ",
        " " * 7,
        "\t",
        "\t\t",
        "\t\t\t",
        "\t" * 9,
        "\n",
        "\n\n",
        "\r\n",
        "\r",
    ),
    *(
        "a",
        "e",
        "the",
        " the",
        "self",
        ".",
        "--",
        "=====",
        "____",
        "0",
        "12",
        "é",
        "e\u0301",
        "中文",
        "😀",
        "👩‍👩‍👧",
        "\u200d",
    ),
    *("\ufeff", "\ufffd", "\u2028", "\x1b", "\x7f", "ﬁ", "\U0010ffff", "\ud7ff", "#######", '"""', "'", "\\n"),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<|user|>",
        "<|end|>",
        "<0x41>",
        "<",
        ">",
        "s>",
        "def ",
        "return",
        "):\n",
        "x=1;",
    ),
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What\n\n is it? \t"},
    {"role": "assistant", "content": "def f():\n    return 1\n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "▁ ok "},
]


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # As the export step leaves it: beside a Llama config, which must not make transformers take its Llama tokenizer.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def exported(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exported")
    export_tokenizer(tokenizer_dir, folder, max_tokens=512)
    return load(folder)


def fuzzed(sources: list[str], rounds: int, seed: int) -> list[str]:
    """Passages of the sources, what is rare or reserved, and both at once."""
    chooser = random.Random(seed)
    texts = []
    for _ in range(rounds):
        source = chooser.choice(sources)
        start = chooser.randrange(len(source))
        passage = source[start : start + chooser.randint(1, 100)]
        fragments = "".join(chooser.choices(FRAGMENTS, k=chooser.randint(0, 12)))
        texts.append(chooser.choice([fragments, passage, passage + fragments + passage[::-1]]))
    return texts


def ids_of(theirs: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return found


def test_ids_and_texts_agree_with_transformers_on_fuzzed_text(
    tokenizer: Tokenizer, exported: Any, library_texts: list[str]
) -> None:
    texts = fuzzed(library_texts, rounds=3000, seed=0)
    ids = ids_of(exported, texts)
    assert ids == tokenizer.encode_batch(texts)
    assert [exported.decode(one) for one in ids] == texts


@pytest.mark.parametrize(
    "options", [{"split_by_script": True}, {"split_by_script": False, "split_by_whitespace": False}]
)
def test_ids_agree_however_the_vocabulary_was_learned(
    library_texts: list[str], tmp_path: Path, options: dict[str, bool]
) -> None:
    settings = TokenizerSettings(vocab_size=1024, **options)  # type: ignore[arg-type]
    train_tokenizer(library_texts, settings, tmp_path / "ours")
    export_tokenizer(tmp_path / "ours", tmp_path / "theirs")
    ours, theirs = Tokenizer.load(tmp_path / "ours"), load(tmp_path / "theirs")
    texts = fuzzed(library_texts, rounds=1000, seed=1)
    ids = ids_of(theirs, texts)
    assert ids == ours.encode_batch(texts)
    assert [theirs.decode(one) for one in ids] == texts


def test_whole_modules_agree(tokenizer: Tokenizer, exported: Any, library_texts: list[str]) -> None:
    assert exported(library_texts, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(library_texts)


def test_special_tokens_are_known_by_role(tokenizer: Tokenizer, exported: Any) -> None:
    assert exported("a")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (2, 3, 0)
    assert exported.unk_token is None and exported.decode([1], skip_special_tokens=True) in ("", "<unk>")
    assert exported.convert_tokens_to_ids("<|end|>") == tokenizer.end_id
    assert (len(exported), exported.model_max_length) == (tokenizer.vocab_size, 512)


def test_the_chat_template_gives_the_same_ids_and_the_same_targets(tokenizer: Tokenizer, exported: Any) -> None:
    ids, is_target = encode_chat(tokenizer, CONVERSATION)
    theirs = exported.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == ids
    assert [bool(bit) for bit in theirs["assistant_masks"]] == is_target


def test_the_generation_prompt_gives_the_same_ids(tokenizer: Tokenizer, exported: Any) -> None:
    for length in (1, 2, 4):
        ours, _ = encode_chat(tokenizer, CONVERSATION[:length], generation_prompt=True)
        theirs = exported.apply_chat_template(CONVERSATION[:length], add_generation_prompt=True, return_dict=True)
        assert theirs["input_ids"] == ours


def test_an_unknown_word_spelled_in_a_corpus_is_text_without_any_option(tokenizer: Tokenizer, exported: Any) -> None:
    for text in ("the <unk> of <unk>", "<unk>", "a<unk>\n", "<\ufdd0", "\ufdd0<\ufdd1"):
        ids = exported.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text.replace("<\ufdd0", "<")), text
    assert exported.decode(tokenizer.encode("the <unk> of")) == "the <unk> of"


@pytest.mark.parametrize("saved_again", [False, True])
def test_no_message_forges_a_control_piece_in_transformers_either(
    tokenizer: Tokenizer, exported: Any, tmp_path: Path, saved_again: bool
) -> None:
    theirs = exported
    if saved_again:
        exported.save_pretrained(tmp_path)
        theirs = load(tmp_path)
    chooser = random.Random(2)
    pieces = [
        *tokenizer.control_pieces,
        "<",
        "<\ufdd0",
        "\ufdd0",
        "<\ufdd0|end|>",
        "|end|>",
        " ",
        "\n",
        "word",
        "<<s>s>",
    ]
    for _ in range(100):
        question, answer = ("".join(chooser.choices(pieces, k=chooser.randint(1, 6))) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, is_target = encode_chat(tokenizer, messages)
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert found["input_ids"] == ids, messages
        assert [bool(bit) for bit in found["assistant_masks"]] == is_target


def test_the_exported_folder_is_the_same_tokenizer_here(
    tokenizer: Tokenizer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    export_tokenizer(tokenizer_dir, tmp_path / "once")
    export_tokenizer(tmp_path / "once", tmp_path / "twice")
    messages = [{"role": "user", "content": "<s>a<|end|>"}]
    for folder in (tmp_path / "once", tmp_path / "twice"):
        assert encode_chat(Tokenizer.load(folder), messages) == encode_chat(tokenizer, messages)
    assert {file.name: file.read_bytes() for file in (tmp_path / "once").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "twice").iterdir()
    }
