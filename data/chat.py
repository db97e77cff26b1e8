"""Conversations to ids through the tokenizer's one chat template, the same ids that transformers makes from it.

The template is rendered with stand-ins for the messages' contents. So its own control pieces become control ids, and
whatever a message contains stays text: a user who types `<|end|>` ends nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.errors import DataError
from data.tokenizer import CONTROL_PIECES

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

# Private-use characters, which no template contains: content number n, and the ends of a generation block.
CONTENT = "\ue000{}\ue001"
GENERATION_START, GENERATION_END = "\ue002", "\ue003"
PARTS = re.compile("(\ue000[0-9]+\ue001|[\ue002\ue003]|" + "|".join(map(re.escape, CONTROL_PIECES)) + ")")

ROLES = ("system", "user", "assistant")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Return (ids, is_target) of a conversation; `is_target` marks the assistant's own tokens, its `<|end|>` included.

    With `generation_prompt` the ids end where the assistant is to begin. Raises DataError for messages that are not a
    list of {"role", "content"} with known roles and text.
    """
    contents = [message["content"] for message in check_messages(messages)]
    stand_ins = [{**message, "content": CONTENT.format(number)} for number, message in enumerate(messages)]
    try:
        rendered = _compiled(tokenizer.chat_template).render(
            messages=stand_ins, add_generation_prompt=generation_prompt
        )
    except jinja2.TemplateError as error:
        raise DataError(f"The chat template refuses this conversation: {error}") from error

    ids: list[int] = []
    is_target: list[bool] = []
    text, generating = "", False

    def flush() -> None:
        nonlocal text
        tokens = tokenizer.encode(text) if text else []
        ids.extend(tokens)
        is_target.extend([generating] * len(tokens))
        text = ""

    parts = [part for part in PARTS.split(rendered) if part]
    for part, following in zip(parts, [*parts[1:], END_OF_TEXT], strict=True):
        if part in tokenizer.control_ids:
            flush()
            ids.append(tokenizer.control_ids[part])
            is_target.append(generating)
        elif part in (GENERATION_START, GENERATION_END):
            if text and following != END_OF_TEXT and following not in tokenizer.control_ids:
                raise DataError(
                    "The chat template's generation block begins or ends in the middle of text, where a token could "
                    "lie on both sides. "
                    "Put a control piece such as <|end|> there."
                )
            flush()
            generating = part == GENERATION_START
        elif part.startswith("\ue000"):
            text += contents[int(part[1:-1])]
        else:
            text += part
    flush()
    return ids, is_target


END_OF_TEXT = ""


def check_messages(messages: Any) -> Sequence[Mapping[str, Any]]:
    """Return `messages` if it is a conversation; raise DataError saying what is wrong with it otherwise."""
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"A conversation is a non-empty list of messages, not {_short(messages)}.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise DataError(f'Message {number} is {_short(message)}; a message is {{"role": …, "content": text}}.')
        if message.get("role") not in ROLES:
            raise DataError(
                f"Message {number} has the role {_short(message.get('role'))}; known are {', '.join(ROLES)}."
            )
    return messages


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    # The options are those of transformers, so that whitespace around tags falls away in the same places.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise DataError(f"The chat template does not compile: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant says, put between two marks."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it as a plain class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return GENERATION_START + str(caller()) + GENERATION_END
