"""What the runner tells while it works, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened to a step. Sent from several threads, one at a time."""

    kind: Literal["cached", "waiting", "started", "progress", "said", "finished", "failed"]
    step: str
    digest: str
    label: str = ""
    """progress: what is counted."""
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    line: str = ""
    """said, waiting, failed: for the person watching. progress: what else there is to tell."""
    seconds: float = 0.0
    """finished: all attempts together."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """finished, cached: what the step returned."""


State = Literal["cached", "made", "to make", "unfinished", "running", "not needed", "damaged"]
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Where one step stands."""

    name: str
    kind: str
    digest: str
    state: State
    """unfinished: an interrupted attempt's work is kept and will be continued; not needed: nothing asks for it."""
    seconds: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    """Of the artifact, or of the kept work."""
    bytes: int | None = None
    sealed: bool = True
    """False: its manifest was written before manifests were sealed."""
