"""Conversations to ids through the tokenizer's one chat template, the same ids that transformers makes from it.

Control pieces spelled out in a message are replaced by stand-ins before the template is rendered. So the template's own
become control ids, whatever a message contains stays text (a user who types `<|end|>` ends nothing), and filters of the
template such as `trim` see the message.

What the assistant says is found in one of two ways. Where the template has `{% generation %}` blocks, they are it.
Elsewhere an answer begins where the generation prompt for the messages before it ends, and ends with the first control
piece behind it. A template whose prompt is not the beginning of the conversation is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from conf.refusal import NO_VALUE, Refusal
from data.tokenizers.chat_jinja import GENERATION_END, GENERATION_START
from data.tokenizers.chat_render import render, template_place

if TYPE_CHECKING:
    from data.tokenizers.sentencepiece import Tokenizer

# Private-use characters, which no template contains: stand-in number n, the ends of a generation block, the end of an
# answer's last word.
STAND_IN = "\ue000{}\ue001"
ANSWER_END = "\ue004"
OURS = "[\ue000-\ue004]"
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

ROLES = ("system", "user", "assistant")
Part = str | int
"""A text, or a control piece's id."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Return (ids, is_target) of a conversation; `is_target` marks the assistant's own tokens, its `<|end|>` included.

    With `generation_prompt` the ids end where the assistant is to begin. Raises Refusal for messages that are not a
    list of {"role", "content"} with known roles and text, and for a template that cannot be followed.
    """
    originals: list[str] = []
    marked = _marked(tokenizer, check_messages(messages), originals)
    rendered = render(tokenizer, marked, generation_prompt=generation_prompt)
    parts, marks = _parse(tokenizer, rendered, originals)
    if GENERATION_TAG.search(tokenizer.chat_template):
        answers = list(zip(marks[GENERATION_START], marks[GENERATION_END], strict=True))
    else:
        answers = _answers(tokenizer, marked, originals, rendered, parts, marks[ANSWER_END])
    ids, spans_N2 = tokenizer.encode_parts(parts)
    return ids, _targets(tokenizer, spans_N2, _flat(parts), answers).tolist()


SHORTEST = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def template_fault(tokenizer: Tokenizer) -> str | None:
    """What is wrong with a template that cannot even write a question and its answer."""
    try:
        encode_chat(tokenizer, SHORTEST)
    except Refusal as refusal:
        return str(refusal)
    return None


def answer_end(tokenizer: Tokenizer) -> int:
    """The control piece an answer ends with in this tokenizer's template; `eos_id` where it ends with text."""
    try:
        ids, is_target = encode_chat(tokenizer, SHORTEST)
    except Refusal:  # said when a conversation comes; whoever only packs documents need not know
        return tokenizer.eos_id
    control = set(tokenizer.control_ids.values())
    said = [number for number, target in zip(ids, is_target, strict=True) if target and number in control]
    return said[-1] if said else tokenizer.eos_id


def check_messages(messages: Any) -> Sequence[Mapping[str, Any]]:
    """Return `messages` if it is a conversation; raise Refusal saying what is wrong with it otherwise."""
    if not isinstance(messages, list | tuple) or not messages:
        raise Refusal("messages", messages, "a conversation is a non-empty list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise Refusal(f"messages[{number}]", message, 'a message is {"role": …, "content": text}')
        if message.get("role") not in ROLES:
            raise Refusal(f"messages[{number}].role", message.get("role"), f"known are {', '.join(ROLES)}")
    return messages


def _marked(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], originals: list[str]) -> list[dict[str, Any]]:
    """The messages with stand-ins for control pieces, and a mark behind the last word of each answer.

    Behind the word and not behind the content, so that a template may trim it.
    """

    def stand_in(found: re.Match[str]) -> str:
        originals.append(found[0])
        return STAND_IN.format(len(originals) - 1)

    forged = re.compile(f"{OURS}|{_any_of(tokenizer.control_pieces)}")
    marked = []
    for message in messages:
        content = forged.sub(stand_in, message["content"])
        if message["role"] == "assistant":
            words = content.rstrip()
            content = words + ANSWER_END + content[len(words) :]
        marked.append({**message, "content": content})
    return marked


def _parse(tokenizer: Tokenizer, rendered: str, originals: Sequence[str]) -> tuple[list[Part], dict[str, list[int]]]:
    """Texts and control ids by turns, and where each kind of mark stood; a control piece counts as one character."""
    parts: list[Part] = []
    marks: dict[str, list[int]] = {GENERATION_START: [], GENERATION_END: [], ANSWER_END: []}
    text, at = "", 0
    for piece in re.split(f"(\ue000[0-9]+\ue001|{OURS}|{_any_of(tokenizer.control_pieces)})", rendered):
        if piece in tokenizer.control_ids:
            parts += [text, tokenizer.control_ids[piece]] if text else [tokenizer.control_ids[piece]]
            text, at = "", at + len(text) + 1
        elif piece in marks:
            marks[piece].append(at + len(text))
        else:
            text += originals[int(piece[1:-1])] if piece.startswith("\ue000") else piece
    return [*parts, text] if text else parts, marks


@functools.lru_cache(maxsize=64)
def _any_of(pieces: tuple[str, ...]) -> str:
    """A pattern; the longest first, as one piece may begin with another."""
    return "|".join(map(re.escape, sorted(pieces, key=len, reverse=True)))


def _answers(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    originals: Sequence[str],
    rendered: str,
    parts: Sequence[Part],
    word_ends: Sequence[int],
) -> list[tuple[int, int]]:
    """Where each answer begins and ends, for a template that does not say."""
    speaks = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(word_ends) != len(speaks):
        raise _untold(tokenizer, "leaves out or repeats what an assistant says")
    flat = _flat(parts)
    answers = []
    for number, word_end in zip(speaks, word_ends, strict=True):
        prompt = render(tokenizer, messages[:number], generation_prompt=True)
        if not rendered.startswith(prompt):
            raise _untold(
                tokenizer,
                f"asks for message {number} with {prompt[-60:]!r}, and the conversation with that message in it does not go "
                "on from there",
            )
        begin = sum(len(part) if isinstance(part, str) else 1 for part in _parse(tokenizer, prompt, originals)[0])
        behind = _parse(tokenizer, render(tokenizer, messages[: number + 1], generation_prompt=False), originals)
        closing = _flat(behind[0])[behind[1][ANSWER_END][-1] :]
        end_piece = next((at + 1 for at, piece in enumerate(closing) if isinstance(piece, int)), len(closing))
        if flat[word_end : word_end + end_piece] != closing[:end_piece]:
            raise _untold(tokenizer, f"closes message {number} otherwise when more follows")
        answers.append((begin, word_end + end_piece))
    return answers


def _untold(tokenizer: Tokenizer, what: str) -> Refusal:
    """A template in which an answer's place cannot be told."""
    return Refusal(
        template_place(tokenizer),
        NO_VALUE,
        f"the chat template {what}, so what the assistant says cannot be told",
        "put {% generation %} … {% endgeneration %} around it in the template, as chat_template.jinja in the folder",
    )


def _flat(parts: Sequence[Part]) -> list[Part]:
    """Characters and control ids, one by one."""
    return [piece for part in parts for piece in (part if isinstance(part, str) else (part,))]


def _targets(
    tokenizer: Tokenizer, spans_N2: npt.NDArray[np.int64], flat: Sequence[Part], answers: Sequence[tuple[int, int]]
) -> Any:
    """Which tokens lie in an answer. A token on both sides of its beginning is the assistant's if white space is all that
    the answer has of it (`\\n` of the prompt melts with `\\n` of the answer); otherwise no prompt could end there."""
    begin_N, end_N = spans_N2[:, 0], spans_N2[:, 1]
    is_target_N = np.zeros(len(spans_N2), dtype=bool)
    for first, last in answers:
        inside_N = np.where(end_N > begin_N, (end_N > first) & (begin_N < last), (begin_N >= first) & (begin_N < last))
        for token in np.flatnonzero(inside_N & ((begin_N < first) | (end_N > last))):
            shared = flat[max(begin_N[token], first) : min(end_N[token], last)]
            if end_N[token] > last or not all(isinstance(piece, str) and piece.isspace() for piece in shared):
                raise Refusal(
                    template_place(tokenizer),
                    NO_VALUE,
                    "the chat template lets an answer begin or end in the middle of text, where a token could lie on both "
                    "sides, and here one does",
                    "put a control piece such as <|end|> there, or end the prompt with a word and begin the answer with "
                    "the space",
                )
        is_target_N |= inside_N
    return is_target_N
