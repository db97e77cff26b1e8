"""Watch the training loss: warnings at once, and divergence, which ends a run.

    health = Health(uniform=math.log(vocab_size), warmup_steps=30, total_steps=1000)
    for step, loss in …:
        for warning in health.look(step, loss):    # each once

A run has *diverged* where its loss is not finite, far above where it began, or, once it has warmed up, above that of a
uniform guess. Losses are medians of a few steps, which one hard batch does not move.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

FEW_STEPS = 20
"""Fewer steps hardly train a model: Adam's averages span 10 to 20 updates."""
WINDOW = 10
"""Steps per median of losses; fewer in a short run."""
MEMORIZED = 0.01
"""Nats per target below which the training rows are memorized."""
ABOVE_UNIFORM = 0.2
"""Nats above a uniform guess that an untrained model's loss may be."""


@dataclass(frozen=True, kw_only=True)
class Warning:
    """One warning about a run. diverged: the run no longer learns."""

    step: int
    text: str
    diverged: bool = False


class Health:
    """The losses of one run so far."""

    def __init__(self, *, uniform: float | None, warmup_steps: int, total_steps: int) -> None:
        self._uniform, self._warmup_steps, self._total_steps = uniform, warmup_steps, total_steps
        self._losses: deque[float] = deque(maxlen=max(1, min(WINDOW, total_steps // 20)))
        self._first: float | None = None
        self._start: float | None = None
        self.warnings: list[Warning] = []
        """All of them, in order."""

    @property
    def diverged(self) -> Warning | None:
        """The warning that the run has diverged, if there was one."""
        return next((warning for warning in self.warnings if warning.diverged), None)

    def look(self, step: int, loss: float) -> list[Warning]:
        """Warnings new with the loss of a step."""
        self._losses.append(loss)
        full = len(self._losses) == self._losses.maxlen
        middle = statistics.median(self._losses) if math.isfinite(loss) else loss
        self._first = loss if self._first is None else self._first
        if full and self._start is None:
            # For a fresh model not a loss that its first updates may have raised.
            self._start = min(middle, max(self._first, self._uniform or 0.0)) if self._uniform else middle
        new = []
        if (problem := self._problem(step, middle, full)) and self.diverged is None:
            new.append(Warning(step=step, text=f"diverged in step {step:,}: {problem}", diverged=True))
        if full and middle < MEMORIZED and not any("memorized" in warning.text for warning in self.warnings):
            new.append(Warning(step=step, text=memorized(step, middle)))
        self.warnings += new
        return new

    def _problem(self, step: int, middle: float, full: bool) -> str | None:
        over = f", the median of {len(self._losses)} steps," if len(self._losses) > 1 else ""
        if not math.isfinite(middle):
            return f"the loss is {middle}"
        if not full or self._start is None:
            return None
        if middle > self._start + max(1.0, self._start / 2):
            return f"the loss{over} is {middle:.2f}, and it began at {self._start:.2f}"
        if self._uniform is None or middle <= self._uniform + ABOVE_UNIFORM:
            return None
        # A model may begin above a uniform guess, its weights being large; then it has until the middle of the run.
        began_above = self._start > self._uniform + ABOVE_UNIFORM
        patience = self._total_steps // 2 if began_above else self._warmup_steps + len(self._losses)
        if step <= max(patience, WINDOW):  # too few steps to judge
            return None
        return f"the loss{over} is {middle:.2f} after warmup, above the {self._uniform:.2f} of a uniform guess"


def memorized(step: int, loss: float) -> str:
    """Text of the warning about a training loss near zero."""
    return (
        f"training loss {loss:.4f} by step {step:,}: the training rows are memorized, which says nothing of other "
        "text; the held-out score does. Train for fewer epochs, or on more text"
    )


def few_steps(total_steps: int, tokens_per_step: int, remedy: str) -> str | None:
    """A warning about a run that is too short to learn, or None."""
    if total_steps >= FEW_STEPS:
        return None
    steps = "1 step" if total_steps == 1 else f"{total_steps} steps"
    return f"only {steps} of {tokens_per_step:,} tokens: below {FEW_STEPS} a model hardly changes. {remedy}"


def replay(rows: list[dict[str, Any]], health: Health) -> Health:
    """`health` after all rows of a `metrics.jsonl`; skipped updates are ignored."""
    for row in rows:
        if not row["skipped"]:
            health.look(row["step"], row["loss"])
    return health
