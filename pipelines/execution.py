"""Steps run and found: what every verb that touches artifacts begins with."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from conf.refusal import NO_VALUE, Refusal
from pipelines.console import display as console
from pipelines.engine import runner
from pipelines.engine.backends.base import Backend
from pipelines.engine.backends.local_backend import LocalBackend, Preload
from pipelines.engine.backends.ray_backend import RayBackend
from pipelines.engine.events import StepReport
from pipelines.engine.step import Step
from pipelines.engine.store.manifest import is_sealed
from pipelines.engine.store.open import open_store
from pipelines.settings.derive import Settings
from pipelines.training.preload import ENVIRONMENT, modules, take_threads


def execute(settings: Settings, targets: Sequence[Step], *, quiet: bool = False) -> list[StepReport]:
    """Run the steps that `targets` need. SIGTERM is taken as Ctrl-C: a clean stop with all work kept.

    Raises Refusal before anything runs for a batch or a window that a step among them would refuse.
    """
    settings.check_sizes(_needed(targets))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with console.Display() as display:
        backend = make_backend(settings)
        try:
            on_event = (lambda event: None) if quiet else display.event
            return runner.run(targets, store=open_store(settings.store), backend=backend, on_event=on_event)
        finally:
            backend.close()


def _needed(targets: Sequence[Step]) -> set[str]:
    """Names of the targets and of every step they depend on."""
    return {target.name for target in targets}.union(*(_needed(list(target.sources.values())) for target in targets))


def make_backend(settings: Settings) -> Backend:
    """Ray, or its local twin; nothing is started before the first step that is not cached."""
    if settings.compute.backend == "local":
        return LocalBackend(preload=Preload(modules=modules(), environment=ENVIRONMENT, begin=take_threads))
    return RayBackend(address=settings.compute.address, wait_seconds=settings.compute.wait_seconds)


def get_step(steps: dict[str, Step], name: str) -> Step:
    """The step of that name, or Refusal with the names there are."""
    if name not in steps:
        raise Refusal("step", name, "this experiment has no such step", f"its steps are {', '.join(steps)}")
    return steps[name]


def require_artifact(settings: Settings, step: Step, overrides: Sequence[str], rechecked: tuple[str, ...] = ()) -> Path:
    """The local folder of a step's artifact, or Refusal that says by which command to make it."""
    folder = find_artifact(settings, step, rechecked)
    if folder is None:
        raise Refusal(
            f"step {step.name} of experiment {settings.experiment}",
            NO_VALUE,
            f"it is not in the store {settings.store}",
            f"make it first: athanor run {shlex.join(overrides)} --until {step.name}",
        )
    return folder


def find_artifact(settings: Settings, step: Step, rechecked: tuple[str, ...] = ()) -> Path | None:
    """Local folder of a step's artifact, or None. Raises Refusal for a damaged one.

    `rechecked`: patterns of files that are hashed now, whatever is remembered of them.
    """
    store = open_store(settings.store)
    digest = next(report.digest for report in runner.plan([step], store=store) if report.name == step.name)
    artifact = store.find(step.name, digest)
    if artifact is None:
        return None
    store.verify(artifact, step.self_checking, rechecked)
    lines = [f"{artifact.url}/{path}: no part of that artifact, left out" for path in store.unlisted(artifact)]
    if not is_sealed(artifact.manifest):
        lines.append(runner.unsealed_line([artifact.url], store.url))
    for line in lines:
        sys.stderr.write(f"[{line}]\n")
    return artifact.path
