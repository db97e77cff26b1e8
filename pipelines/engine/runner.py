"""Walk a graph of steps: skip what is there, take leases, run what is missing side by side, publish.

A step's body runs in a thread of the driver and hands heavy work to the backend. So one process holds the leases, hears
Ctrl-C and tells the display, and the same code path serves a laptop, a cluster and a debugger.
"""

from __future__ import annotations

import contextlib
import queue
import shlex
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from conf.typed import to_plain
from pipelines.engine.backends.base import Backend
from pipelines.engine.backends.machines import Resources
from pipelines.engine.context import CancelledError, RunContext, run_stage
from pipelines.engine.events import Event, OnEvent, State, StepReport
from pipelines.engine.files import FileHashes
from pipelines.engine.resolve import Graph, Node, check, check_inputs, check_sources, node_of, resolve
from pipelines.engine.secrets import refuse_secrets, without_secrets
from pipelines.engine.step import Artifact, Step
from pipelines.engine.store import manifest as manifests
from pipelines.engine.store.lease import Held, Lease, LeaseLostError
from pipelines.engine.store.open import Store, storage_errors
from pipelines.engine.store.work import Work

LEASE_POLL_SECONDS = 0.5  # at a lease that somebody else holds
CANCEL_SECONDS = 25.0  # for running steps to notice an interruption


def run(
    targets: Sequence[Step], *, store: Store, backend: Backend, on_event: OnEvent = lambda event: None
) -> list[StepReport]:
    """Make the targets and whatever they lack, and report on every step they depend on, inputs first.

    A failed step cancels only the steps that need its output; a step with `despite` is made from its remaining inputs. Then
    the first error is raised. On Ctrl-C leases are released, work is kept, and KeyboardInterrupt is re-raised.
    """
    with storage_errors(store):
        return _Run(targets, store, backend, on_event).all()


def plan(targets: Sequence[Step], *, store: Store, checked: bool = False) -> list[StepReport]:
    """What ``run`` would find and make; runs nothing. With `checked` it raises what ``run`` would refuse at its start."""
    with storage_errors(store):
        graph = resolve(targets, FileHashes(store.file_hashes))
        needed = _needed(graph, store)
        reports = [_report(node, store, needed=node.digest in needed) for node in graph.nodes]
        for node, report in zip(graph.nodes, reports, strict=True):
            if checked and report.state in ("to make", "unfinished"):
                inputs = {key: store.find(source.name, source.digest) for key, source in node.inputs.items()}
                check(node.step, {key: artifact for key, artifact in inputs.items() if artifact is not None})
        return reports


def status(targets: Sequence[Step], *, store: Store) -> list[StepReport]:
    """As ``plan``; steps some process is working on now are "running", those with files gone or cut short "damaged"."""
    reports = plan(targets, store=store)
    with storage_errors(store):
        return [_checked(report, store) for report in reports]


def _needed(graph: Graph, store: Store) -> set[str]:
    """Digests of what must be there: the targets, and the inputs of whatever has to be made."""
    needed = {node.digest for node in graph.targets}
    for node in reversed(graph.nodes):
        if node.digest in needed and store.find(node.name, node.digest) is None:
            needed |= {source.digest for source in node.inputs.values()}
    return needed


def _report(node: Node, store: Store, *, needed: bool) -> StepReport:
    artifact = store.find(node.name, node.digest)
    if artifact is not None:
        return StepReport(
            name=artifact.step,
            kind=node.step.kind,
            digest=artifact.digest,
            state="cached",
            seconds=artifact.manifest["seconds"],
            metrics=artifact.metrics,
            path=artifact.url,
            sealed=manifests.is_sealed(artifact.manifest),
            bytes=sum(entry["bytes"] for entry in artifact.manifest["files"].values()),
        )
    kept = store.unfinished(node.name, node.digest)
    state: State = "not needed" if not needed else "unfinished" if kept else "to make"
    return StepReport(
        name=node.name, kind=node.step.kind, digest=node.digest, state=state, path=kept, metrics=_last_failure(kept)
    )


def _last_failure(kept: str | None) -> dict[str, Any]:
    """Error of a step's last attempt, read from its work folder, as the `warnings` of its metrics."""
    failure = None if kept is None or "://" in kept else Work(root=Path(kept)).failure
    if failure is None or not failure.is_file():
        return {}
    return {"warnings": [f"the last attempt ended: {failure.read_text(encoding='utf-8').strip()}"]}


def _checked(report: StepReport, store: Store) -> StepReport:
    artifact = store.find(report.name, report.digest)
    if artifact is None:
        return report if store.holder(report.name, report.digest) is None else replace(report, state="running")
    try:
        store.check(artifact)
    except Refusal:
        return replace(report, state="damaged")
    return report


def _ends_the_run(failure: BaseException | None) -> bool:
    """Whether nothing more is started after an error: an interruption, or an error with an exit code of its own (a lost
    machine)."""
    return failure is not None and (
        not isinstance(failure, Exception) or getattr(failure, "exit_code", None) not in (None, 1, Refusal.exit_code)
    )


class _Run:
    """One call of ``run``: which nodes are done, which are running, what they use."""

    def __init__(self, targets: Sequence[Step], store: Store, backend: Backend, on_event: OnEvent) -> None:
        self._hashes = FileHashes(store.file_hashes)
        graph = resolve(targets, self._hashes)
        self._nodes, self._after, self._store, self._backend = graph.nodes, graph.after, store, backend
        self._on_event, self._event_lock = on_event, threading.Lock()
        self._artifacts: dict[str, Artifact] = {}
        self._lost: dict[str, str] = {}
        """Node digest to why it is not made in this run: its own error, or that of an input."""
        self._partial: dict[str, list[str]] = {}
        """Node digest to the inputs it is made without."""
        self._made: set[str] = set()
        self._needed = _needed(graph, store)
        self._running: dict[str, tuple[Node, threading.Thread]] = {}
        self._leases: dict[str, Lease] = {}
        self._ended: queue.Queue[tuple[Node, Artifact | BaseException]] = queue.Queue()
        self._cancelled = threading.Event()

    def all(self) -> list[StepReport]:
        """Make what is missing, in parallel where resources allow; the first error is raised at the end."""
        waiting = [node for node in self._nodes if node.digest in self._needed and not self._is_cached(node)]
        if unsealed := self._unsealed():
            self._send(self._nodes[-1], "said", line=unsealed_line(unsealed, self._store.url))
        error: BaseException | None = None
        there = self._backend.resources() if waiting else Resources(cpus=0, gpus=0)
        for node in waiting:
            self._check_claim(node, there)
            # Execution settings too: they enter no manifest, but a stage writes and logs what it is configured with.
            written = [node.identity, to_plain(node.step.settings)]
            refuse_secrets(written, f"the settings of {node.name}")
        for node in waiting:
            check(node.step, self._inputs_there(node))
        if any(node.step.resumes for node in waiting):  # as trainings do
            self._backend.expect_gang()
        try:
            while self._running or waiting:
                for node in self._startable(waiting, there):
                    waiting.remove(node)
                    self._launch(node)
                failure = self._next_end()
                refusal = self._refused_inputs(waiting)
                error = error or failure or refusal
                waiting = [] if refusal is not None or _ends_the_run(failure) else self._makeable(waiting)
        except BaseException:
            self._abandon()
            raise
        if error is not None:
            raise error
        return [self._final_report(node) for node in self._nodes]

    def _is_cached(self, node: Node) -> bool:
        artifact = self._store.find(node.name, node.digest)
        if artifact is None:
            return False
        self._store.check(artifact)
        self._artifacts[node.digest] = artifact
        self._send(node, "cached", metrics=artifact.metrics)
        return True

    def _unsealed(self) -> list[str]:
        """URLs of artifacts without a seal, needed or not: the table at the end shows the figures of all."""
        found = (self._artifacts.get(n.digest) or self._store.find(n.name, n.digest) for n in self._nodes)
        return [a.url for a in found if a is not None and not manifests.is_sealed(a.manifest)]

    def _check_claim(self, node: Node, there: Resources) -> None:
        for kind, claim, total in (("GPU", node.step.gpus, there.gpus), ("CPU", node.step.cpus, there.cpus)):
            if claim > total:
                raise Refusal(
                    node.name,
                    NO_VALUE,
                    f"asks for {claim:g} {kind}s where there are {total:g}",
                    "ask for fewer workers, or run on a larger machine or cluster",
                )

    def _startable(self, waiting: list[Node], there: Resources) -> list[Node]:
        """Nodes whose inputs are there, whose claims fit beside what runs and that wait for no other, in graph order."""
        free_cpus = there.cpus - sum(node.step.cpus for node, _ in self._running.values())
        free_gpus = there.gpus - sum(node.step.gpus for node, _ in self._running.values())
        chosen = []
        for node in waiting:
            ready = all(source.digest in self._artifacts for source in node.inputs.values())
            firsts = self._after.get(node.digest, ())
            ready = ready and not any(first in waiting or first.digest in self._running for first in firsts)
            if ready and node.step.cpus <= free_cpus and node.step.gpus <= free_gpus:
                chosen.append(node)
                free_cpus, free_gpus = free_cpus - node.step.cpus, free_gpus - node.step.gpus
        return chosen

    def _makeable(self, waiting: list[Node]) -> list[Node]:
        """Nodes that can still be made: without failed inputs, or, where the step has `despite`, from the others."""
        kept: list[Node] = []
        for node in waiting:  # in topological order
            lost = {
                name: self._lost[source.digest] for name, source in node.inputs.items() if source.digest in self._lost
            }
            there = {name: source for name, source in node.inputs.items() if source.digest in self._artifacts}
            failed = [first.name for first in self._after.get(node.digest, ()) if first.digest in self._lost]
            if failed:
                self._lost[node.digest] = f"not made: it comes after {' and '.join(failed)}, which failed"
                self._send(node, "said", line=self._lost[node.digest])
            elif not lost or (node.step.despite is not None and len(lost) + len(there) < len(node.inputs)):
                kept.append(node)
            elif node.step.despite is None or not there:
                needs = " and ".join(lost)
                self._lost[node.digest] = f"not made: it needs {needs}"
                self._send(
                    node, "said", line=f"not made: it needs {needs}, which {'are' if len(lost) > 1 else 'is'} not there"
                )
            else:
                settings = node.step.despite(without_secrets(lost))
                partial = node_of(replace(node.step.only(there), settings=settings), there, self._hashes)
                self._partial[partial.digest] = list(lost)
                kept.append(partial)
        return kept

    def _refused_inputs(self, waiting: list[Node]) -> Refusal | None:
        """What a waiting step refuses of its inputs as far as they are there."""
        for node in waiting:
            try:
                check_inputs(node.step, self._inputs_there(node))
            except Refusal as refusal:
                self._send(node, "failed", line=str(refusal))
                return refusal
        return None

    def _inputs_there(self, node: Node) -> dict[str, Artifact]:
        """The node's inputs that are made, by key."""
        artifacts = self._artifacts
        return {key: artifacts[source.digest] for key, source in node.inputs.items() if source.digest in artifacts}

    def _launch(self, node: Node) -> None:
        def body() -> None:
            try:
                with storage_errors(self._store):
                    self._ended.put((node, self._make(node)))
            except BaseException as error:
                self._ended.put((node, error))

        thread = threading.Thread(target=body, name=node.name, daemon=True)
        self._running[node.digest] = (node, thread)
        thread.start()

    def _next_end(self) -> BaseException | None:
        """Wait for a step to end (in short waits, so that Ctrl-C gets through); its error, if it failed."""
        while True:
            try:
                node, outcome = self._ended.get(timeout=0.2)
            except queue.Empty:
                continue
            del self._running[node.digest]
            if isinstance(outcome, Artifact):
                self._artifacts[node.digest] = outcome
                if node.digest in self._partial:
                    self._send(
                        node, "said", line=f"made without {', '.join(self._partial[node.digest])}: {outcome.url}"
                    )
                return None
            self._send(node, "failed", line=str(outcome))
            name = "" if hasattr(outcome, "exit_code") else f"{type(outcome).__name__}: "
            self._lost[node.digest] = f"{name}{outcome}"
            return outcome

    def _make(self, node: Node) -> Artifact:
        """The node's artifact: made here, or by whoever holds its lease."""
        has_logged = False
        while True:
            artifact = self._store.find(node.name, node.digest)
            if artifact is not None:
                self._send(node, "cached", metrics=artifact.metrics)
                return artifact
            lease = self._store.acquire(node.name, node.digest)
            if isinstance(lease, Lease):
                self._leases[node.digest] = lease
                try:
                    return self._build_while_held(node, lease)
                except LeaseLostError as error:
                    self._send(node, "said", line=str(error))
                finally:
                    lease.release()
            elif isinstance(lease, Held):
                if not has_logged:
                    line = (
                        f"{lease.owner} is making it; waiting for its result, or until nothing is heard of it for "
                        f"{self._store.ttl_seconds:.0f} s"
                    )
                    self._send(node, "waiting", line=line)
                has_logged = True
                if self._cancelled.wait(LEASE_POLL_SECONDS):
                    raise CancelledError

    def _build_while_held(self, node: Node, lease: Lease) -> Artifact:
        try:
            return self._build(node, lease)
        except Exception:
            lease.look()  # the work folder moves to whoever takes over: then any error is only the echo of that
            raise

    def _build(self, node: Node, lease: Lease) -> Artifact:
        self._send(node, "started")
        started = manifests.now()
        work = self._store.open_work(lease, node.name, node.digest, resumes=node.step.resumes)
        for line in work.notes:
            self._send(node, "said", line=line)
        context = RunContext(
            step=node.name,
            digest=node.digest,
            work=work,
            store=self._store,
            lease=lease,
            backend=self._backend,
            on_event=self._emit,
            is_cancelled=self._cancelled.is_set,
        )
        inputs = {name: self._artifacts[source.digest] for name, source in node.inputs.items()}
        for name, source in node.inputs.items():
            self._verify(node, name, source, inputs[name])
        try:
            metrics = run_stage(context, node.step.run, node.step.settings, node.step.grouped(inputs))
        except Exception as error:
            with contextlib.suppress(OSError):  # another process may own the folder now, or the disk is full
                work.failure.write_text(f"{error}\n", encoding="utf-8")
            raise
        context.still_holds()
        check_sources(node, self._hashes)
        manifest = {
            "step": node.name,
            "digest": node.digest,
            "identity": node.identity,
            "inputs": {name: _lineage(artifact) for name, artifact in inputs.items()},
            "sources": node.sources,
            "volatile": list(node.step.volatile),
            "metrics": without_secrets(metrics),
            "started": started,
            **manifests.provenance(),
        }
        artifact = self._store.publish(lease, work, manifest)
        self._made.add(node.digest)
        self._send(node, "finished", seconds=artifact.manifest["seconds"], metrics=artifact.metrics)
        return artifact

    def _verify(self, node: Node, name: str, source: Node, artifact: Artifact) -> None:
        """Raise Refusal for a damaged input; artifacts made in this run are verified only if `rechecked`."""
        rechecked = node.step.rechecked_files(name)
        if rechecked or source.digest not in self._made:
            self._store.verify(artifact, source.step.self_checking, rechecked)
        unlisted_files = self._store.unlisted(artifact)
        if unlisted_files:
            more = f" and {len(unlisted_files) - 1} more" if len(unlisted_files) > 1 else ""
            self._send(
                node, "said", line=f"{artifact.url}/{unlisted_files[0]}{more}: no part of that artifact, left out"
            )

    def _abandon(self) -> None:
        """After Ctrl-C: let running steps notice, then give their leases back so that the next run starts at once."""
        self._cancelled.set()
        for node, _ in self._running.values():
            if node.step.resumes:
                self._send(node, "said", line="saving before it leaves; Ctrl-C again leaves at once")
        deadline = time.monotonic() + CANCEL_SECONDS
        for _, thread in self._running.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for lease in self._leases.values():
            lease.release()

    def _final_report(self, node: Node) -> StepReport:
        report = _report(node, self._store, needed=False)
        if report.state == "cached":
            self._store.tidy(node.name, node.digest)
        return replace(report, state="made") if node.digest in self._made else report

    def _send(self, node: Node, kind: Any, **more: Any) -> None:
        self._emit(Event(kind=kind, step=node.name, digest=node.digest, **more))

    def _emit(self, event: Event) -> None:
        with self._event_lock:
            self._on_event(event)


def unsealed_line(urls: Sequence[str], store: str) -> str:
    """Line to log about artifacts whose manifests have no seal."""
    more = f" and {len(urls) - 1} more" if len(urls) > 1 else ""
    return (
        f"{urls[0]}{more}: published before manifests were sealed, so a change to the manifest would not be noticed; "
        f"athanor verify --seal store={shlex.quote(store)} checks every file and seals them"
    )


def _lineage(artifact: Artifact) -> dict[str, str]:
    return {"step": artifact.step, "digest": artifact.digest, "content_digest": artifact.content_digest}
