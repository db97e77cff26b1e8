"""Chat templates rendered: ours in this process, those from outside in a subprocess, which they alone can take down.

    text = render(tokenizer, messages, generation_prompt=False)     # Refusal names the template's file

One subprocess serves this process for its lifetime; a template that had to be stopped costs a new one (0.1 s).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from conf.refusal import NO_VALUE, Refusal
from data.tokenizers import chat_jinja
from data.tokenizers.chat_jinja import SECONDS, TemplateError

if TYPE_CHECKING:
    from data.tokenizers.base import Tokenizer

PATIENCE_SECONDS = 120.0
"""Wall-clock limit, for a subprocess that does not even compute; on a busy machine SECONDS of CPU time pass long before."""


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool) -> str:
    """A conversation as the tokenizer's template writes it. Raises Refusal, whatever the template does."""
    context = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": generation_prompt,
        **tokenizer.template_names,
    }
    try:
        if tokenizer.template_origin is None:
            return chat_jinja.render(tokenizer.chat_template, context)
        return _render_in_subprocess(tokenizer.chat_template, context)
    except TemplateError as failure:
        remedy = "repair it there, or put another one beside the tokenizer" if tokenizer.template_origin else ""
        raise Refusal(template_place(tokenizer), NO_VALUE, f"the chat template {failure}", remedy) from failure


def template_place(tokenizer: Tokenizer) -> str:
    """Where a refusal says that a tokenizer's chat template is."""
    return tokenizer.template_origin or "chat template"


def _render_in_subprocess(template: str, context: Mapping[str, Any]) -> str:
    global _process
    with _lock:
        if _process is None or _process.owner != os.getpid():  # a fork must not use its parent's pipes
            _process = _Process()
        try:
            answer = _process.request({"template": template, "context": context, "seconds": SECONDS})
        except BaseException:
            _process.end()
            _process = None
            raise
    if "failure" in answer:
        raise TemplateError(answer["failure"])
    return str(answer["text"])


class _Process:
    """data/tokenizers/chat_jinja.py as a program."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        command = [sys.executable, "-P", chat_jinja.__file__]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Response to one request. Raises TemplateError where the subprocess ended or had to be stopped."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None and stdout is not None
        sent = memoryview(json.dumps(message, default=str).encode("ascii") + b"\n")
        until, received = time.monotonic() + PATIENCE_SECONDS, bytearray()
        with contextlib.suppress(BrokenPipeError):  # reported below, from its exit status
            while sent:
                sent = sent[stdin.write(sent) :]
        while not received.endswith(b"\n"):
            if not select.select([stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TemplateError(f"does not end within its limits: no answer after {PATIENCE_SECONDS:.0f} s")
            part = os.read(stdout.fileno(), 1 << 20)
            if not part:
                raise TemplateError(self._exit_reason())
            received += part
        answer: dict[str, Any] = json.loads(received)
        return answer

    def _exit_reason(self) -> str:
        code = self._child.wait()
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"does not end within its limits: it computes for more than {SECONDS} s"
        return f"does not end within its limits: it took down the process that renders it (exit status {code})"

    def end(self) -> None:
        """Stop it, and wait until it has."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


_process: _Process | None = None
_lock = threading.Lock()


@atexit.register
def _close() -> None:
    if _process is not None and _process.owner == os.getpid():
        _process.end()
