"""A chat template's Jinja as transformers reads it, within limits. Also a program: chat_render.py starts it.

Templates come with weights from outside and are programs. The sandbox keeps them from reaching out; it does not keep
`'x' * 10**10` from taking all memory, nor loops in loops from never ending. So one that is not ours is rendered by a
process with a limit on memory and on computing time, which the kernel keeps, whatever the template calls. Loop
iterations and macro calls are counted, so that most templates that never end are refused alike on every machine.

Imports nothing of ours: as a program it has to start fast, from any folder.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10
"""Of computing, for one conversation; usual templates take less than a thousandth."""
MEMORY_BYTES = 512 << 20
STEPS = 200_000
"""Loop iterations and macro calls."""
CHARACTERS, CHARACTERS_PER_CHARACTER = 1 << 20, 8
"""Limit on a template's output: a constant, plus so many for each character of its input."""

# The ends of a generation block (data/tokenizers/chat.py).
GENERATION_START, GENERATION_END = "\ue002", "\ue003"
TODAY = datetime.datetime(2024, 7, 26)
"""What `strftime_now` gives to a template that writes the date: equal conversations must give equal ids on any day. Llama's
templates write this day, too, where they are passed no date."""


class TemplateError(Exception):
    """A template that does not compile, refuses a conversation, fails at it, or exceeds a limit; the message says which."""


def render(template: str, context: Mapping[str, Any]) -> str:
    """The text of a conversation; context: the template's variables. Raises TemplateError, whatever goes wrong."""
    try:
        compiled = _compiled(template)
    except (Exception, RecursionError, MemoryError) as error:
        raise TemplateError(f"does not compile: {_describe(error)}") from error
    environment = compiled.environment
    assert isinstance(environment, _Environment)
    environment.steps_taken = 0
    max_characters = CHARACTERS + CHARACTERS_PER_CHARACTER * _characters(context)
    parts, written = [], 0
    try:
        for part in compiled.generate(**context):
            parts.append(part)
            written += len(part)
            if written > max_characters:
                raise _LimitError(f"it writes more than {max_characters:,} characters")
        return "".join(parts)
    except _LimitError as error:
        raise TemplateError(f"does not end within its limits: {error}") from error
    except jinja2.exceptions.TemplateError as error:
        raise TemplateError(f"refuses this conversation: {_describe(error)}") from error
    except MemoryError as error:
        raise TemplateError(
            f"does not end within its limits: it takes more than {MEMORY_BYTES >> 20} MiB of memory"
        ) from error
    except Exception as error:
        raise TemplateError(f"fails at this conversation: {_describe(error)}") from error


class _LimitError(Exception):
    """A limit of this file is reached."""


class _Environment(ImmutableSandboxedEnvironment):
    """Counts loop iterations and macro calls."""

    steps_taken = 0

    def count_step(self) -> str:
        """Called at the start of every loop or macro body; its return value is rendered, so it is empty."""
        self.steps_taken += 1
        if self.steps_taken > STEPS:
            raise _LimitError(f"it takes more than {STEPS:,} loop iterations")
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            step = jinja2.nodes.EnvironmentAttribute("count_step")
            call = jinja2.nodes.Call(step, [], [], None, None)
            node.body.insert(0, jinja2.nodes.ExprStmt(call).set_lineno(node.lineno))  # type: ignore[attr-defined]
        return tree


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    # The options are those of transformers, so that whitespace around tags falls away in the same places.
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


class _GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`: the assistant's text, put between two marks."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it as a plain class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return GENERATION_START + str(caller()) + GENERATION_END


def _describe(error: BaseException) -> str:
    """An error in one line: its type unless it is Jinja's own, its message, and the template's line."""
    text = str(error) or type(error).__name__
    kind = "" if isinstance(error, jinja2.exceptions.TemplateError) else f"{type(error).__name__}: "
    line = getattr(error, "lineno", None) if isinstance(error, jinja2.TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    shown = text if len(text) <= 300 else text[:297] + "..."
    return f"{kind}{shown}" + ("" if line is None else f" (line {line} of the template)")


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    parts: Iterator[Any] = iter(())
    if isinstance(value, Mapping):
        parts = iter(value.values())
    elif isinstance(value, list | tuple):
        parts = iter(value)
    return sum(map(_characters, parts))


def main() -> None:
    """Answer requests, a line of JSON each: {"template", "context", "seconds"} to {"text"} or {"failure"}."""
    with open("/proc/self/statm") as pages:
        address_space_bytes = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _limit(resource.RLIMIT_AS, address_space_bytes + MEMORY_BYTES)
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            # Past it the kernel ends the process.
            _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + request["seconds"])
            answer = {"text": render(request["template"], request["context"])}
        except TemplateError as failure:
            answer = {"failure": str(failure)}
        except MemoryError:
            answer = {
                "failure": f"does not end within its limits: {len(line):,} bytes of messages take too much memory"
            }
        sys.stdout.buffer.write(json.dumps(answer).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


def _limit(kind: int, value: int) -> None:
    """The soft limit, below whatever hard one the process was started under."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
