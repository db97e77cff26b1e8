"""Conversations for fine-tuning, from the documents' own functions and docstrings or from the user's files."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from conf.refusal import NO_VALUE, Refusal, refuse_below
from conf.refusal import field as key_of
from data.text.decontaminate import is_held_out
from data.text.document import Document, read_documents
from data.text.left_out import conversations_left_out
from data.text.readers import (
    SURROGATES,
    ReaderSettings,
    ReadLog,
    read_json_lines,
    refuse_unreadable,
    without_surrogates,
)
from data.text.sources import CONVERSATIONS, SourceFile, list_files
from data.tokenizers.chat import check_messages

Task = Literal["write", "document", "explain"]
PATHS = "finetune.data.paths"
"""What a person calls `InstructionSettings.paths`."""
MAX_COUNTED = 100_000
"""Conversations read at most by `count_train_conversations`: seconds."""

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class InstructionSettings:
    """Where conversations come from."""

    kind: Literal["functions", "files"] = "functions"
    """functions: from the Python functions with docstrings in the corpus. files: .jsonl of the user's, a line each,
    as {"messages": [{"role", "content"}, …]} or {"prompt", "completion"}."""
    paths: tuple[str, ...] = field(default=(), metadata={"execution": True, "path": True})
    """Folders, files or globs of .jsonl (or .jsonl.gz, .jsonl.zst), for kind files."""
    tasks: tuple[Task, ...] = ("write", "document", "explain")
    """write: the code from its description. document: the docstring from the code. explain: what a function does."""
    max_characters: int = 1400
    """A longer conversation made from a function is left out, and counted; about 400 tokens."""
    max_conversations: int | None = None
    """At most this many train and, in proportion, held-out conversations, chosen by hash; null keeps all."""
    held_out_fraction: float = 0.05
    """Share of the user's conversations kept for evaluation. Those made from functions follow their document."""
    reader: ReaderSettings = field(default_factory=ReaderSettings)
    """How files of conversations are read."""

    def __post_init__(self) -> None:
        if self.kind == "functions" and not self.tasks:
            remedy = f"set '{key_of('tasks')}=[write,document,explain]' or some of them"
            raise Refusal("tasks", [], "no conversations are made without a task", remedy)
        if not 0 < self.held_out_fraction < 1:
            raise Refusal(
                "held_out_fraction",
                self.held_out_fraction,
                "must lie between 0 and 1",
                f"set {key_of('held_out_fraction')}=0.05",
            )
        refuse_below(self, 1, "max_conversations")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages and where they come from: `position` is the line of `source`, from 1, of the function or record."""

    messages: tuple[dict[str, str], ...]
    source: str
    position: int

    @cached_property
    def id(self) -> str:
        """First 32 hex digits of the SHA-256 of the messages."""
        return hashlib.sha256(json.dumps(self.messages, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def answers(self) -> frozenset[str]:
        """What the assistant says."""
        return frozenset(message["content"] for message in self.messages if message["role"] == "assistant")


def instruction_files(settings: InstructionSettings, skipped: Counter[str] | None = None) -> list[SourceFile]:
    """Return the user's .jsonl files in name order; none for kind functions. What lies beside them and is not read is
    counted in `skipped`, as `list_files` does. Raises Refusal for any other readable file."""
    if settings.kind == "functions":
        return []
    if not settings.paths:
        raise Refusal(PATHS, [], "there are no conversations", f"set it to .jsonl files, as in '{PATHS}=[chats.jsonl]'")
    files = list_files(settings.paths, skipped, key=PATHS, readable=f"{CONVERSATIONS}, a conversation a line")
    for file in files:
        if file.format != "jsonl":
            rule = f"conversations are read from {CONVERSATIONS} files only"
            raise Refusal(file.path, NO_VALUE, rule, f"name those in {PATHS}")
    return files


def count_train_conversations(settings: InstructionSettings, limit: int) -> int:
    """How many of the user's conversations will be trained on; counts `limit` of them at most, writes nothing.

    Reads through the reader of the step itself, and of long files only the beginning. Raises Refusal for files that
    `build_instructions` would refuse, as far as they were read.
    """
    log, skipped = ReadLog.new(), Counter[str]()
    files = instruction_files(settings, skipped)
    conversations: list[Conversation] = []
    ids: set[str] = set()
    for conversation in (c for file in files for c in read_conversations(file, settings.reader, log)):
        conversations.append(conversation)
        if not is_held_out(conversation.id, settings.held_out_fraction):
            ids.add(conversation.id)
        if len(ids) > limit or len(conversations) >= MAX_COUNTED:
            return min(limit, settings.max_conversations or limit)
    counts: Counter[str] = Counter({key: count for key, count in log.counts.items() if count})
    train, held_out = _split(conversations, settings, counts)
    if not train or not held_out:
        reasons = conversations_left_out({**counts, "malformed": log.malformed, "skipped_files": skipped})
        raise _too_few(settings, len(train), len(held_out), reasons)
    return min(len(train), limit, settings.max_conversations or limit)


def build_instructions(settings: InstructionSettings, corpus_dirs: Sequence[Path], out_dir: Path) -> dict[str, Any]:
    """Write train.jsonl and heldout.jsonl to `out_dir` and return counts.

    Each line is {"id", "source", "position", "messages"}. `corpus_dirs` hold the corpus's train/ and heldout/, for kind
    functions. Raises Refusal when either part would be empty.
    """
    counts: Counter[str] = Counter()
    malformed: list[str] = []
    skipped: Counter[str] = Counter()
    if settings.kind == "functions":
        train = [
            c
            for folder in corpus_dirs
            for c in function_conversations(read_documents(folder / "train"), settings, counts)
        ]
        held_out = [
            c
            for folder in corpus_dirs
            for c in function_conversations(read_documents(folder / "heldout"), settings, counts)
        ]
        held_out = _distinct(held_out, frozenset(), frozenset(), counts)
        # A docstring or a body may be shared by several functions.
        held_answers = frozenset(a for c in held_out for a in c.answers)
        train = _distinct(train, frozenset(c.id for c in held_out), held_answers, counts)
    else:
        log = ReadLog.new()
        files = instruction_files(settings, skipped)
        everything = [c for file in files for c in read_conversations(file, settings.reader, log)]
        counts.update({key: count for key, count in log.counts.items() if count})
        malformed = log.malformed
        train, held_out = _split(everything, settings, counts)
    if not train or not held_out:
        reasons = conversations_left_out({**counts, "malformed": malformed, "skipped_files": skipped})
        raise _too_few(settings, len(train), len(held_out), reasons)
    if settings.max_conversations is not None and len(train) > settings.max_conversations:
        before = len(train) + len(held_out)
        held_out = _lowest(held_out, max(1, len(held_out) * settings.max_conversations // len(train)))
        train = _lowest(train, settings.max_conversations)
        counts["conversations_beyond_most"] = before - len(train) - len(held_out)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, conversations in (("train", train), ("heldout", held_out)):
        _write(out_dir / f"{name}.jsonl", conversations)
    return {
        "train_conversations": len(train),
        "heldout_conversations": len(held_out),
        **dict(sorted(counts.items())),
        "malformed": malformed,
        "skipped_files": dict(sorted(skipped.items())),
    }


def load_conversations(path: Path) -> list[Conversation]:
    """Read a train.jsonl or heldout.jsonl that `build_instructions` wrote."""
    try:
        # At LF alone: a message may hold the other characters that str.splitlines breaks lines at.
        records = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (OSError, ValueError) as error:
        rule = f"is not a conversation file of the instructions step ({error})"
        raise Refusal(path, NO_VALUE, rule, "run that step again") from error
    return [Conversation(messages=tuple(r["messages"]), source=r["source"], position=r["position"]) for r in records]


def read_conversations(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[Conversation]:
    """Yield the conversations of one .jsonl; other lines count as malformed, and past the limit raise Refusal."""
    log.counts["files"] += 1
    for number, record in _records(file, settings, log):
        messages = record.get("messages")
        if messages is None and "prompt" in record and "completion" in record:
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        try:
            if messages is None:
                fields = ", ".join(map(str, record)) or "none"
                raise Refusal("record", NO_VALUE, f"neither messages nor prompt and completion (fields here: {fields})")
            checked = [
                {"role": str(m["role"]), "content": without_surrogates(str(m["content"]), log)}
                for m in check_messages(messages)
            ]
            if not any(m["role"] == "assistant" and m["content"].strip() for m in checked):
                rule = "no assistant message with text, so there is nothing to learn"
                raise Refusal("messages", NO_VALUE, rule)
        except Refusal as refusal:
            log.note_malformed(file, number, str(refusal), settings.max_malformed_lines_per_file)
            continue
        yield Conversation(messages=tuple(checked), source=file.name, position=number)


def _records(file: SourceFile, settings: ReaderSettings, log: ReadLog) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a file. Raises Refusal for one that cannot be opened or decompressed."""
    with refuse_unreadable(file, f"leave it out of {PATHS}"):
        yield from read_json_lines(file, settings, log)


def function_conversations(
    documents: Iterable[Document], settings: InstructionSettings, counts: Counter[str]
) -> Iterator[Conversation]:
    """Yield conversations about each function with a docstring, in the documents' order; what is left out, counted."""
    for document in documents:
        if not document.source.removesuffix(".gz").removesuffix(".zst").endswith(".py"):
            counts["documents_not_python"] += 1
            continue
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            # Also the pydoc topics, and the pieces of a file that was cut.
            counts["documents_not_python"] += 1
            continue
        lines = document.text.split("\n")
        for qualified_name, function in _functions(tree, ""):
            try:
                yield from _about_function(document, lines, qualified_name, function, settings, counts)
            except (ValueError, RecursionError):  # it unparses to an integer of too many digits, or nests too deep
                counts["functions_not_separable"] += 1


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    """Functions of a module and methods of its classes, by qualified name; functions inside functions are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FunctionNode):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")


def _about_function(
    document: Document,
    lines: list[str],
    qualified_name: str,
    function: FunctionNode,
    settings: InstructionSettings,
    counts: Counter[str],
) -> Iterator[Conversation]:
    docstring = ast.get_docstring(function, clean=False)
    if docstring is None or len(function.body) < 2 or not docstring.strip():
        counts["functions_without_docstring_or_body"] += 1
        return
    description, surrogates = SURROGATES.subn("\ufffd", inspect.cleandoc(docstring).strip())  # a string may spell them
    if surrogates:
        counts["invalid_utf8_bytes"] += surrogates
    code = _code_without_docstring(lines, function)
    if code is None:
        counts["functions_not_separable"] += 1
        return
    for task in settings.tasks:
        question, answer = _question_and_answer(task, qualified_name, function, description, code)
        if len(question) + len(answer) > settings.max_characters:
            counts["conversations_too_long"] += 1
            continue
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        yield Conversation(messages=messages, source=document.source, position=function.lineno)


def _question_and_answer(
    task: Task, qualified_name: str, function: FunctionNode, description: str, code: str
) -> tuple[str, str]:
    kind = "method" if "." in qualified_name else "function"
    if task == "write":
        return f"Write the Python {kind} `{qualified_name}({ast.unparse(function.args)})`.\n\n{description}", code
    if task == "document":
        return f"Write the docstring of this Python {kind}.\n\n{code}", description
    first_paragraph = description.split("\n\n")[0]
    return f"What does the Python {kind} `{qualified_name}({ast.unparse(function.args)})` do?", first_paragraph


def _code_without_docstring(lines: list[str], function: FunctionNode) -> str | None:
    """Return the function's source, dedented, without its docstring; None where that would be another function."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    doc, following = function.body[:2]
    if doc.end_lineno is None or following.lineno <= doc.end_lineno or doc.lineno == function.lineno:
        return None
    body = "\n".join(lines[doc.end_lineno : function.end_lineno]).lstrip("\n").split("\n")
    indent = " " * function.col_offset
    code = "\n".join(line.removeprefix(indent) for line in [*lines[first - 1 : doc.lineno - 1], *body])
    try:
        parsed = ast.parse(code).body[0]
    except (SyntaxError, ValueError):
        return None
    if not any(mark in code for mark in ('"""', "'''", "\\\n")):
        return code
    # A string of several lines that is indented with the code is another string once the code is dedented.
    del function.body[0]
    same = ast.dump(parsed) == ast.dump(function)
    function.body.insert(0, doc)
    return code if same else None


def _split(
    everything: list[Conversation], settings: InstructionSettings, counts: Counter[str]
) -> tuple[list[Conversation], list[Conversation]]:
    """The user's conversations to train on and held out, each once. Their answers may be shared by design: yes, no."""
    train = [c for c in everything if not is_held_out(c.id, settings.held_out_fraction)]
    held_out = [c for c in everything if is_held_out(c.id, settings.held_out_fraction)]
    if not held_out and len({c.id for c in train}) > 1:
        lowest = min(c.id for c in train)
        held_out, train = [c for c in train if c.id == lowest], [c for c in train if c.id != lowest]
    held_out = _distinct(held_out, frozenset(), frozenset(), counts)
    return _distinct(train, frozenset(c.id for c in held_out), frozenset(), counts), held_out


def _distinct(
    conversations: list[Conversation], held_ids: frozenset[str], held_answers: frozenset[str], counts: Counter[str]
) -> list[Conversation]:
    """Drop repeats, and whatever gives an answer that is held out."""
    seen: set[str] = set(held_ids)
    kept = []
    for conversation in conversations:
        if conversation.id in seen:
            counts["conversations_repeated"] += 1
        elif conversation.answers & held_answers:
            counts["conversations_with_held_out_answer"] += 1
        else:
            kept.append(conversation)
        seen.add(conversation.id)
    return kept


def _lowest(conversations: list[Conversation], count: int) -> list[Conversation]:
    """The `count` conversations of lowest id, in their order."""
    chosen = set(sorted(conversation.id for conversation in conversations)[:count])
    return [conversation for conversation in conversations if conversation.id in chosen]


def _too_few(settings: InstructionSettings, train: int, held_out: int, left_out: Mapping[str, int]) -> Refusal:
    reasons = "; ".join(f"{times:,} {reason}" for reason, times in left_out.items())
    counted = f"{train} conversation(s) to train on and {held_out} held out; each needs at least 1"
    counted += f" (left out: {reasons})" if reasons else ""
    if settings.kind == "files":
        return Refusal(PATHS, list(settings.paths), f"the files give {counted}", "give more conversations")
    return Refusal(
        "finetune.data.kind",
        settings.kind,
        f"the corpus's functions with docstrings give {counted}",
        f"use a corpus with more Python, your own conversations (finetune.data.kind=files '{PATHS}=[chats.jsonl]'), or none "
        "(finetune=none)",
    )


def _write(path: Path, conversations: list[Conversation]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for c in conversations:
            record = {"id": c.id, "source": c.source, "position": c.position, "messages": c.messages}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
