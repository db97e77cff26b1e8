"""From steps to digests: what each step of a graph is made from, inputs before the steps that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.identity import identity
from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.files import FileHashes, relative_names
from pipelines.engine.fingerprint import digest
from pipelines.engine.step import Artifact, Step
from pipelines.engine.waiting import working


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """A step with everything that enters its digest."""

    step: Step
    digest: str
    identity: dict[str, Any]
    """The payload that was hashed: step, version, settings, inputs' digests, digests of file sets."""
    sources: dict[str, list[list[str]]]
    """{file set: [[name, sha256], ...]}, sorted by name."""
    inputs: dict[str, Node]

    @property
    def name(self) -> str:
        """The step's name."""
        return self.step.name


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The targets, and every node they need: each digest once, inputs and what comes first before what waits for them."""

    targets: list[Node]
    nodes: list[Node]
    after: dict[str, list[Node]]
    """Node digest to the nodes of this graph that it waits for without using them (`Step.after`)."""


def resolve(targets: Sequence[Step], hashes: FileHashes) -> Graph:
    """Digests of the targets and of every step they need. Raises Refusal for what has none."""
    by_step: dict[Step, Node] = {}
    by_digest: dict[str, Node] = {}
    here = _needed(targets)

    def visit(step: Step) -> Node:
        for first in step.after:
            if first in here:
                visit(first)
        if step not in by_step:
            inputs = {name: visit(source) for name, source in step.sources.items()}
            node = node_of(step, inputs, hashes)
            by_step[step] = by_digest.setdefault(node.digest, node)
        return by_step[step]

    wanted = [visit(target) for target in targets]
    nodes = list(by_digest.values())
    after = {node.digest: [by_step[step] for step in node.step.after if step in here] for node in nodes}
    return Graph(targets=wanted, nodes=nodes, after=after)


def _needed(targets: Sequence[Step]) -> set[Step]:
    """The targets and every step they need."""
    needed: set[Step] = set()
    waiting = list(targets)
    while waiting:
        step = waiting.pop()
        if step not in needed:
            needed.add(step)
            waiting += step.sources.values()
    return needed


def node_of(step: Step, inputs: dict[str, Node], hashes: FileHashes) -> Node:
    """A step with its input nodes. Raises Refusal for what has no digest."""
    if not step.name or step.name.startswith(".") or "/" in step.name:
        raise Refusal(
            "step", step.name, "a step's name is a folder of the store: not empty, without a slash or a dot in front"
        )
    sources = {name: _source(step.name, paths, hashes) for name, paths in step.files.items()}
    payload = {
        "step": step.name,
        "version": step.version,
        "settings": identity(step.settings, step.name),
        "inputs": {name: node.digest for name, node in inputs.items()},
        "files": {name: digest(entries) for name, entries in sources.items()},
    }
    return Node(step=step, digest=digest(payload), identity=payload, sources=sources, inputs=inputs)


def check(step: Step, there: Mapping[str, Artifact]) -> None:
    """Run a step's early checks, which raise what its stage would refuse later. there: its inputs that exist, by key."""
    with working(f"{step.name}: what it would refuse later is tried now"):
        if step.check is not None:
            step.check()
        check_inputs(step, there)


def check_inputs(step: Step, there: Mapping[str, Artifact]) -> None:
    """Raise what the step's stage would refuse of these inputs."""
    if step.check_inputs is not None:
        step.check_inputs(step.only(there).grouped(there))


def check_sources(node: Node, hashes: FileHashes) -> None:
    """Raise Refusal if a file from outside is no longer what the node's digest says it was made from."""
    for file_set, paths in node.step.files.items():
        now = _source(node.name, paths, hashes)
        if now != node.sources[file_set]:
            before = {tuple(entry) for entry in node.sources[file_set]}
            changed = sorted({entry[0] for entry in before ^ {tuple(entry) for entry in now}})
            raise Refusal(
                node.name,
                NO_VALUE,
                f"a file of {file_set} changed while the step was reading it ({', '.join(changed[:3])})",
                "run again: what depends on it is made from the files as they are then",
            )


def _source(step: str, paths: tuple[Path, ...], hashes: FileHashes) -> list[list[str]]:
    with working(f"{step}: its {len(paths):,} files are looked at, and hashed where they are new") as how_far:
        pairs: Mapping[str, str] = dict(zip(relative_names(paths), hashes.of(_counted(paths, how_far)), strict=True))
    return [[name, sha256] for name, sha256 in sorted(pairs.items())]


def _counted(paths: tuple[Path, ...], how_far: Callable[[str], None]) -> Iterator[Path]:
    for number, path in enumerate(paths, start=1):
        if number % 1000 == 0 or number == len(paths):
            how_far(f"{number:,} looked at")
        yield path
