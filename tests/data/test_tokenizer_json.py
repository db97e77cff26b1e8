"""The exported tokenizer gives the same ids and the same text in transformers, whatever the text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data.chat import encode_chat
from data.tokenizer import Tokenizer
from data.tokenizer_json import export_tokenizer
from data.tokenizer_training import TokenizerSettings, train_tokenizer

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
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id, exported.unk_token_id) == (2, 3, 0, 1)
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
