"""Harness examples made from held-out documents, so that tasks need no download and nothing of them was trained on.

Each maker is a pure function of the documents and a seed. Documents are visited in turns (one example each, then a
second each, …), so that a long document does not become the whole task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data.text.document import Document

Example = dict[str, Any]
CONTEXT_LINES, CONTEXT_CHARACTERS = 8, 320
CHOICES = 4
LINE_CHARACTERS = range(16, 120)
DISTANCE_LINES = 8
_CLOSERS = re.compile(r"[)\]}]+:?$")
_PAIRS = {")": "(", "]": "[", "}": "{"}


def next_line(document: Document, rng: random.Random) -> Iterator[Example]:
    """Which of four lines comes next? The wrong ones are from elsewhere in the same document, indented like the right.

    Fields: context, choices, answer (index).
    """
    lines = _lines(document)
    usable = [i for i, line in enumerate(lines) if len(line) in LINE_CHARACTERS and len(line.strip()) >= 12]
    positions = [i for i in usable if i >= CONTEXT_LINES]
    rng.shuffle(positions)
    for position in positions:
        right = lines[position]
        indent = right[: len(right) - len(right.lstrip())]
        others = {lines[i].strip() for i in usable if abs(i - position) > DISTANCE_LINES} - {right.strip()}
        if len(others) >= CHOICES - 1:
            wrong = rng.sample(sorted(others), CHOICES - 1)
            choices = [indent + text for text in (right.strip(), *wrong)]
            order = rng.sample(range(CHOICES), CHOICES)
            yield {
                "context": _context(lines, position) + "\n",
                "choices": [choices[i] for i in order],
                "answer": order.index(0),
            }


def close_bracket(document: Document, rng: random.Random) -> Iterator[Example]:
    """Finish a line of code that only lacks its closing brackets (and the colon after them). Fields: prompt, answer.

    Lines whose last bracket opened and closed with nothing between are left out: `()` needs no memory.
    """
    lines = _lines(document)
    found = [(i, match) for i, line in enumerate(lines) if (match := _CLOSERS.search(line)) and _is_balanced(line)]
    rng.shuffle(found)
    for position, match in found:
        start = lines[position][: match.start()]
        if len(start.strip()) >= 8 and start[-1] not in "([{" and position >= 2:
            yield {"prompt": f"{_context(lines, position)}\n{start}", "answer": match.group()}


def rolling_text(document: Document, rng: random.Random) -> Iterator[Example]:
    """The document itself, for perplexity through the harness. Fields: text."""
    yield {"text": document.text}


MAKERS: Mapping[str, Callable[[Document, random.Random], Iterator[Example]]] = {
    "next_line": next_line,
    "close_bracket": close_bracket,
    "rolling_text": rolling_text,
}


def make_examples(maker: str, documents: Sequence[Document], *, limit: int, seed: int) -> list[Example]:
    """At most `limit` examples of a maker, taken round-robin from the documents; `document` is each example's."""
    streams = [(document, MAKERS[maker](document, _rng(seed, maker, document))) for document in documents]
    examples: list[Example] = []
    while streams and len(examples) < limit:
        remaining = []
        for document, stream in streams:
            if len(examples) < limit and (example := next(stream, None)) is not None:
                examples.append(example | {"document": document.id})
                remaining.append((document, stream))
        streams = remaining
    return examples


def _rng(seed: int, maker: str, document: Document) -> random.Random:
    return random.Random(f"{seed}:{maker}:{document.id}")


def _lines(document: Document) -> list[str]:
    """At line ends alone: a form feed or U+2028 stands within a line."""
    return document.text.replace("\r\n", "\n").split("\n")


def _context(lines: list[str], position: int) -> str:
    """The lines before `position`, as many whole ones as fit the context's limits."""
    kept: list[str] = []
    characters = 0
    for line in reversed(lines[max(0, position - CONTEXT_LINES) : position]):
        characters += len(line) + 1
        if kept and characters > CONTEXT_CHARACTERS:
            break
        kept.append(line)
    return "\n".join(reversed(kept))


def _is_balanced(line: str) -> bool:
    """Whether the line closes exactly the brackets it opens. Quotes are not looked at, so a few odd lines slip by."""
    open_brackets: list[str] = []
    for character in line:
        if character in "([{":
            open_brackets.append(character)
        elif character in _PAIRS and (not open_brackets or open_brackets.pop() != _PAIRS[character]):
            return False
    return not open_brackets
