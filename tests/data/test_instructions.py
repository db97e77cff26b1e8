"""Conversations for fine-tuning: functions as they are, split as their documents, or read with nothing lost unseen."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from conf.refusal import Refusal
from data.rows.instructions import (
    Conversation,
    InstructionSettings,
    build_instructions,
    function_conversations,
    instruction_files,
    load_conversations,
)
from data.text.document import Document, write_documents
from data.text.left_out import conversations_left_out
from data.text.readers import ReaderSettings
from data.tokenizers.sentencepiece import CHAT_TEMPLATE, Tokenizer
from pipelines.stages.instructions import encode

MODULE = '''
import os

@cache
def double(x: int, *, times=2) -> int:
    """Return x doubled.

    Any number will do.
    """

    return x * times


class Shelf:
    """A class docstring is no function's."""

    async def put(self, book):
        """Put a book."""
        if book:
            self.books.append("""two
lines""")

    def take(self):
        """Take a book."""
        return """indented
        with the code"""

    def bare(self):
        return 1


def only_a_docstring():
    """Nothing else."""


def one_line(): """Short."""; return 3
'''


def document(text: str, source: str = "lib/a.py") -> Document:
    return Document(text=text, source=source, position=0)


def corpus(root: Path, train: list[Document], held_out: list[Document]) -> Path:
    write_documents(root / "train/00000.parquet", train)
    write_documents(root / "heldout/00000.parquet", held_out)
    return root


def numbered(first: int, last: int, body: str = "") -> Document:
    code = "\n\n".join(f'def f{n}(x):\n    """Add {n}."""\n    return x + {n}{body}' for n in range(first, last))
    return document(code, f"lib/{first}.py")


def test_each_function_with_a_docstring_and_a_body_gives_one_conversation_per_task() -> None:
    counts: Counter[str] = Counter()
    made = list(function_conversations([document(MODULE)], InstructionSettings(), counts))
    pairs = [(c.messages[0]["content"], c.messages[1]["content"]) for c in made]
    code = "@cache\ndef double(x: int, *, times=2) -> int:\n    return x * times"
    description = "Return x doubled.\n\nAny number will do."
    assert pairs[:3] == [
        (f"Write the Python function `double(x: int, *, times=2)`.\n\n{description}", code),
        (f"Write the docstring of this Python function.\n\n{code}", description),
        ("What does the Python function `double(x: int, *, times=2)` do?", "Return x doubled."),
    ]
    assert [c.position for c in made] == [5, 5, 5, 17, 17, 17]
    assert MODULE.split("\n")[4].startswith("def double")
    assert counts == {"functions_without_docstring_or_body": 2, "functions_not_separable": 2}


def test_text_that_is_not_python_is_counted_not_parsed() -> None:
    counts: Counter[str] = Counter()
    documents = [
        document("prose", "a.txt"),
        document("def broken(:", "b.py"),
        document("x = '\0'", "c.py"),
        numbered(0, 1),
    ]
    assert len(list(function_conversations(documents, InstructionSettings(tasks=("write",)), counts))) == 1
    assert counts["documents_not_python"] == 3


def test_long_conversations_are_left_out_and_counted() -> None:
    counts: Counter[str] = Counter()
    settings = InstructionSettings(tasks=("write", "explain"), max_characters=200)
    long = numbered(0, 1, body=" + 1" * 100)
    assert [c.messages[1]["content"] for c in function_conversations([long], settings, counts)] == ["Add 0."]
    assert counts["conversations_too_long"] == 1


def test_conversations_follow_their_document_into_training_or_held_out(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus", [numbered(0, 20), numbered(18, 25)], [numbered(15, 19)])
    settings = InstructionSettings(tasks=("write",))
    metrics = build_instructions(settings, [folder], tmp_path / "out")
    train, held_out = (load_conversations(tmp_path / f"out/{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(held_out)) == (metrics["train_conversations"], metrics["heldout_conversations"]) == (21, 4)
    assert not {c.id for c in train} & {c.id for c in held_out}
    # f15 … f18 stand in training documents too (f18 in two of them), and f19 stands in two.
    assert metrics["conversations_repeated"] == 6
    assert {c.source for c in held_out} == {"lib/15.py"}


def test_an_answer_that_is_held_out_is_not_trained_on_under_another_question(tmp_path: Path) -> None:
    twin = document('def g(y):\n    """Add 1."""\n    return y', "lib/twin.py")
    folder = corpus(tmp_path / "corpus", [numbered(2, 5), twin], [numbered(1, 2)])
    metrics = build_instructions(InstructionSettings(tasks=("explain",)), [folder], tmp_path / "out")
    assert metrics["conversations_with_held_out_answer"] == 1
    assert "Add 1." not in (tmp_path / "out/train.jsonl").read_text(encoding="utf-8")


def test_a_smaller_set_is_part_of_a_larger_and_both_are_reproducible(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus", [numbered(0, 100)], [numbered(100, 120)])
    for name, most in (("all", None), ("ten", 10), ("again", 10)):
        build_instructions(InstructionSettings(tasks=("write",), max_conversations=most), [folder], tmp_path / name)
    everything, ten = (load_conversations(tmp_path / name / "train.jsonl") for name in ("all", "ten"))
    assert len(ten) == 10
    assert {c.id for c in ten} < {c.id for c in everything}
    assert len(load_conversations(tmp_path / "ten/heldout.jsonl")) == 2
    for part in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "ten" / part).read_bytes() == (tmp_path / "again" / part).read_bytes()


def write_lines(path: Path, lines: list[str]) -> InstructionSettings:
    path.write_text("\n".join(lines), encoding="utf-8")
    return InstructionSettings(kind="files", paths=(str(path),))


def test_messages_and_prompt_completion_are_read_from_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(50)]
    lines += [
        json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}], "id": 1})
    ]
    metrics = build_instructions(write_lines(tmp_path / "a.jsonl", lines), [], tmp_path / "out")
    train, held_out = (load_conversations(tmp_path / f"out/{name}.jsonl") for name in ("train", "heldout"))
    assert len(train) + len(held_out) == 51 == metrics["train_conversations"] + metrics["heldout_conversations"]
    assert held_out
    assert {c.position for c in [*train, *held_out]} == set(range(1, 52))


BAD_LINES = [
    ('{"prompt": "p"}', "neither messages nor prompt"),
    ('{"messages": []}', "non-empty list"),
    ('{"messages": [{"role": "user", "content": "q"}]}', "nothing to learn"),
    ('{"prompt": "p", "completion": ""}', "nothing to learn"),
    ('{"prompt": "p", "completion": " \\n"}', "nothing to learn"),
    ('{"prompt": "p", "completion": null}', "messages[1]"),
    ("not json", "not JSON"),
]


def test_malformed_conversations_are_counted_with_file_and_line_and_limited(tmp_path: Path) -> None:
    good = [json.dumps({"prompt": f"p{n}", "completion": "c"}) for n in range(30)]
    settings = write_lines(tmp_path / "a.jsonl", [*good, *(line for line, _ in BAD_LINES)])
    metrics = build_instructions(settings, [], tmp_path / "out")
    assert metrics["malformed_lines"] == len(BAD_LINES)
    for number, (place, (_, message)) in enumerate(zip(metrics["malformed"], BAD_LINES, strict=True), start=31):
        assert place.startswith(f"{tmp_path.name}/a.jsonl:{number}: ")
        assert message in place
    with pytest.raises(Refusal, match=r"a\.jsonl, line 11"):
        build_instructions(write_lines(tmp_path / "a.jsonl", ["{}"] * 20), [], tmp_path / "out")


def test_line_separators_within_a_message_end_no_line(tmp_path: Path) -> None:
    odd = "one\u2028two\u2029three\u0085four\x0b\x0c\x1c\x1d\x1efive\r\nsix"
    lines = [json.dumps({"prompt": f"p{n} {odd}", "completion": f"c {odd}"}, ensure_ascii=False) for n in range(30)]
    metrics = build_instructions(write_lines(tmp_path / "a.jsonl", lines), [], tmp_path / "out")
    assert metrics["train_conversations"] + metrics["heldout_conversations"] == 30
    both = [c for name in ("train", "heldout") for c in load_conversations(tmp_path / "out" / f"{name}.jsonl")]
    assert {c.messages[0]["content"] for c in both} == {f"p{n} {odd}" for n in range(30)}
    assert {c.position for c in both} == set(range(1, 31))


@pytest.mark.parametrize(
    "default",
    ["0x" + "f" * 5000, "-" * 900 + "1", "-" * 90_000 + "1", "a" + ".b" * 5000],
    ids=["an integer of too many digits", "nested", "nested past the parser", "a long chain"],
)
def test_a_function_that_python_cannot_write_again_is_counted(default: str) -> None:
    text = f"def f(x={default}):\n    'What f does.'\n    return 1\n"
    counts: Counter[str] = Counter()
    assert list(function_conversations([document(text, "a.py")], InstructionSettings(), counts)) == []
    assert counts["functions_not_separable"] + counts["documents_not_python"] == 1


def test_half_a_pair_in_a_docstring_is_replaced_and_counted() -> None:
    text = "def f(x):\n    'Half \\ud800 of a pair.'\n    return 1\n"
    counts: Counter[str] = Counter()
    made = list(function_conversations([document(text, "a.py")], InstructionSettings(tasks=("explain",)), counts))
    assert [c.answers for c in made] == [{"Half \ufffd of a pair."}]
    assert counts["invalid_utf8_bytes"] == 1


def test_what_is_left_out_of_conversations_is_told_by_reason(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{n % 30}", "completion": "c"}) for n in range(75)]
    (tmp_path / "in").mkdir()
    settings = write_lines(tmp_path / "in" / "a.jsonl", [*lines, "{broken"])
    (tmp_path / "in" / "x.json").write_text("[]")
    metrics = build_instructions(
        replace(settings, paths=(str(tmp_path / "in"),), max_conversations=20), [], tmp_path / "out"
    )
    told = conversations_left_out(metrics)
    assert told["repeats of other conversations"] == 45
    assert told["conversations beyond finetune.data.max_conversations"] == 10 - metrics["heldout_conversations"]
    assert told["files of other kinds (.json 1); readable are .jsonl (also .gz or .zst)"] == 1
    [malformed] = [reason for reason in told if "in/a.jsonl:76: not JSON" in reason]
    assert told[malformed] == 1
    with pytest.raises(Refusal, match=r"left out: 5 malformed lines or rows, the first: in/b\.jsonl:1"):
        build_instructions(write_lines(tmp_path / "in" / "b.jsonl", ["{}"] * 5), [], tmp_path / "none")


def test_half_a_pair_of_utf_16_is_replaced_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{n} \ud800", "completion": "c\udfff"}) for n in range(30)]
    metrics = build_instructions(write_lines(tmp_path / "a.jsonl", lines), [], tmp_path / "out")
    assert metrics["invalid_utf8_bytes"] == 60
    [first, *_] = load_conversations(tmp_path / "out" / "train.jsonl")
    assert first.answers == {"c\ufffd"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (InstructionSettings(kind="files"), "finetune\.data\.paths = \[\]"),
        (InstructionSettings(kind="files", paths=("a.txt",)), r"only\. Name those"),
        (InstructionSettings(kind="files", paths=("missing.jsonl",)), "does not exist"),
        (InstructionSettings(kind="files", paths=("one.jsonl",)), "Give more conversations"),
    ],
)
def test_what_gives_no_conversations_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: InstructionSettings, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "one.jsonl").write_text('{"prompt": "p", "completion": "c"}')
    with pytest.raises(Refusal, match=message):
        build_instructions(settings, [], tmp_path / "out")


def test_a_corpus_without_functions_is_refused_with_the_choices(tmp_path: Path) -> None:
    folder = corpus(tmp_path, [document("prose", "a.txt")], [document("more prose", "b.txt")])
    with pytest.raises(Refusal, match="kind=files"):
        build_instructions(InstructionSettings(), [folder], tmp_path / "out")
    assert instruction_files(InstructionSettings()) == []


def refusing(tokenizer: Tokenizer) -> Tokenizer:
    """A template that refuses a system message, as Gemma's does."""
    rebuild, (model, *_) = tokenizer.__reduce__()
    rule = "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
    return rebuild(model, rule + CHAT_TEMPLATE, "weights/chat_template.jinja")


def conversations(refused: int, others: int) -> list[Conversation]:
    asked = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    system = ({"role": "system", "content": "c"},)
    return [
        Conversation(
            messages=(*(system if number < refused else ()), *asked), source="chats.jsonl", position=number + 1
        )
        for number in range(refused + others)
    ]


def test_a_conversation_that_the_template_refuses_is_skipped_counted_and_named(tokenizer: Tokenizer) -> None:
    documents, refused = encode(refusing(tokenizer), conversations(1, 59), ReaderSettings())
    assert (len(documents), len(refused)) == (59, 1)
    assert refused[0].startswith(
        "chats.jsonl line 1: weights/chat_template.jinja: the chat template refuses this conversation: System role not supp"
    )
    [(line, count)] = conversations_left_out(
        {"conversations_refused": 1, "refused": refused, "malformed": [], "skipped_files": {}}
    ).items()
    assert line.startswith("conversations that the chat template refuses, the first: chats.jsonl line 1") and count == 1


def test_conversations_that_the_template_refuses_have_a_limit(tokenizer: Tokenizer) -> None:
    reader = ReaderSettings(max_malformed_lines_per_file=3)
    assert len(encode(refusing(tokenizer), conversations(3, 3), reader)[1]) == 3
    with pytest.raises(
        Refusal, match=r"chats.jsonl: 4 of its conversations are refused.*and 3 a file.*first: chats.jsonl line 1"
    ):
        encode(refusing(tokenizer), conversations(4, 30), reader)
    with pytest.raises(Refusal, match="the chat template refuses all"):
        encode(refusing(tokenizer), conversations(3, 0), reader)
