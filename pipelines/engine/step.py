"""What a stage author needs: Step, Artifact, Inputs, Context. Everything else in the engine serves these four.

    def run(settings, inputs, out_dir, ctx) -> dict      # a stage: writes files under out_dir, returns its metrics
        inputs["rows"]["books"], inputs.one("tokenizer")    # artifacts, in the groups that the graph gave them

A step's identity is what it is made from: its name and ``version``, the identity fields of its settings, the digests of
its inputs and the contents of its files. Where and how fast it runs never enters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from pipelines.engine.store.listed import listed

__all__ = ["Artifact", "Context", "Groups", "Inputs", "StageFn", "Step"]


class Context(Protocol):
    """What the engine does for a running stage."""

    @property
    def scratch(self) -> Path:
        """A folder for the stage's own notes, which survives kills on this machine and is never published."""
        ...

    @property
    def url(self) -> str:
        """Where what is in out_dir will be when the step is published: `Artifact.url` to be."""
        ...

    def map_shards(
        self,
        fn: Callable[[Any, Path], dict[str, Any]],
        payloads: Mapping[str, Any],
        *,
        label: str = "shards",
        cpus: float = 1,
        gpus: float = 0,
        scratch: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """Run ``fn(payload, out_dir)`` once per shard, in worker processes, and return {name: its result}.

        ``fn`` is a module-level function that writes files under the folder it is given (they appear in the stage's
        out_dir, same relative paths, when it returns) and returns a JSON-able dict. A finished shard is never
        redone after a kill. Other shard names than a killed attempt had under this label: Refusal. With ``scratch``
        the files appear in ctx.scratch instead: intermediate results that are not published.
        """
        ...

    def call(self, fn: Callable[..., Any], *args: Any, cpus: float = 1, gpus: float = 0) -> Any:
        """Run ``fn(*args)`` in one worker process and return its (small) result."""
        ...

    def gang(
        self,
        fn: Callable[[dict[str, Any]], Any],
        config: dict[str, Any],
        *,
        workers: int,
        cpus_per_worker: float = 1,
        gpus_per_worker: float = 0,
        backend: str = "gloo",
        max_failures: int = 3,
        while_waiting: Callable[[], None] | None = None,
    ) -> Any:
        """Run ``fn(config)`` in ``workers`` processes at once and return rank 0's (JSON-able) result.

        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set. The torch process group is
        already there under Ray and not under the local backend: initialize it unless ``dist.is_initialized()``. When
        a process dies, all are started again (at most ``max_failures`` times) and ``fn`` continues from what it finds.
        ``while_waiting`` is called about once a second in the driver, to turn files the ranks write into progress.
        """
        ...

    def keep(self, relpath: str) -> None:
        """Make out_dir/relpath durable now, so that another machine could continue; its absence is kept as well.

        Call it in the driver, for a gang from ``while_waiting``. With a store on a local or shared disk it only forces
        the files to the disk.
        """
        ...

    def progress(self, label: str, done: float, total: float | None, unit: str = "", note: str = "") -> None:
        """Tell the display how far this stage is. `label` stays the same from call to call; `note` may change."""
        ...

    def log(self, line: str) -> None:
        """One line for the person watching."""
        ...

    def still_holds(self) -> None:
        """Raise Refusal if another process has taken this step over; cheap, call it before costly writes."""
        ...


Groups = Mapping[str, Mapping[str, "Step"]]
"""Group → name in the group → step."""
StageFn = Callable[[Any, "Inputs", Path, Context], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One node of the graph. Identity: name, version, settings, inputs, files. The rest is execution."""

    name: str
    """What people see; names a folder of the store."""
    kind: str
    """What code asks for: steps of one kind make the same sort of artifact."""
    run: StageFn
    version: int
    """Raised by whoever changes what the stage makes."""
    settings: Any
    inputs: Groups = field(default_factory=dict)
    """Group → name in the group → step. Only the steps' digests are hashed, each under its `key`."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """GROUP/NAME → the key under which an input is hashed and listed in manifests, where that is not its step's name."""
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """Sets of files from outside the graph. They enter by content and by name relative to the set's common folder."""
    volatile: tuple[str, ...] = ()
    """Glob patterns (relative to out_dir) of files that may differ between equal runs: logs, timings."""
    self_checking: tuple[str, ...] = ()
    """Glob patterns of files whose readers check every byte they use: not hashed again before another step uses them."""
    rechecked: tuple[str, ...] = ()
    """Glob patterns of GROUP/NAME/FILE: files of inputs whose every byte is compared with its checksum before the step
    begins, whatever hash of them is remembered. For what leaves the store."""
    resumes: bool = False
    """True: the stage finds in out_dir whatever a killed attempt left. False: it finds finished shards only."""
    despite: Callable[[Mapping[str, str]], Any] | None = None
    """None: the step needs every input. Otherwise it is made from the available ones after others failed, as another
    artifact with the settings that this returns for {missing input: reason}."""
    check: Callable[[], None] | None = None
    """Raises what the stage would otherwise refuse only after the steps before it; called before anything runs, for
    steps that are not cached."""
    check_inputs: Callable[[Inputs], None] | None = None
    """Raises what the stage would refuse of its inputs. Called with those that are there: before anything runs, and as
    soon as another is published; after a refusal nothing more is started."""
    after: tuple[Step, ...] = ()
    """Steps that come first where the same run makes them, though this one uses nothing of theirs: what they, or checks of
    what they make, refuse is refused before this one costs hours. Not made where one of them failed. Never hashed."""
    cpus: float = 1
    gpus: float = 0
    """What the step uses altogether while it runs; steps whose sum fits run side by side."""

    @property
    def sources(self) -> dict[str, Step]:
        """Every input by its key."""
        return {self._key(group, name): step for group, steps in self.inputs.items() for name, step in steps.items()}

    def only(self, keys: Collection[str]) -> Step:
        """The same step with these inputs alone."""
        kept = {
            group: {name: step for name, step in steps.items() if self._key(group, name) in keys}
            for group, steps in self.inputs.items()
        }
        return replace(self, inputs=kept)

    def grouped(self, artifacts: Mapping[str, Artifact]) -> Inputs:
        """Artifacts by key as the stage receives them."""
        return Inputs(
            {
                group: {name: artifacts[self._key(group, name)] for name in steps}
                for group, steps in self.inputs.items()
            },
            artifacts,
        )

    def rechecked_files(self, key: str) -> tuple[str, ...]:
        """Patterns of `rechecked` for the files of one input."""
        places = [f"{g}/{name}" for g, steps in self.inputs.items() for name in steps if self._key(g, name) == key]
        patterns = [pattern.split("/", 2) for pattern in self.rechecked]
        return tuple(
            file for group, name, file in patterns for place in places if fnmatchcase(place, f"{group}/{name}")
        )

    def _key(self, group: str, name: str) -> str:
        return self.keys.get(f"{group}/{name}", self.inputs[group][name].name)


class Inputs(Mapping[str, Mapping[str, "Artifact"]]):
    """What a stage is made from: groups of artifacts by name. A group that the graph filled with nothing is empty."""

    def __init__(
        self, groups: Mapping[str, Mapping[str, Artifact]], by_key: Mapping[str, Artifact] | None = None
    ) -> None:
        self._groups = {group: dict(artifacts) for group, artifacts in groups.items() if artifacts}
        every = (artifact for artifacts in self._groups.values() for artifact in artifacts.values())
        self.by_key = dict(by_key) if by_key is not None else {artifact.step: artifact for artifact in every}
        """Every artifact by the key that manifests list it under, its step's name where none is given."""

    def __getitem__(self, group: str) -> Mapping[str, Artifact]:
        return self._groups.get(group, {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def one(self, group: str) -> Artifact:
        """The only artifact of a group."""
        (artifact,) = self[group].values()
        return artifact

    def first(self, group: str) -> Artifact | None:
        """The first artifact of a group, or None where it is empty."""
        return next(iter(self[group].values()), None)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A published output: immutable files under ``path``, with the manifest that says what they are made from."""

    step: str
    digest: str
    """Of what it was made from (64 hex characters)."""
    url: str
    """Where it is published: a local folder or an object store's prefix."""
    manifest: dict[str, Any]

    @property
    def path(self) -> Path:
        """A local folder with the files of the manifest and no others; downloaded once per machine, verified, when the
        store is remote."""
        if "://" not in self.url:
            return listed(Path(self.url), self.manifest)
        from pipelines.engine.store.objects import fetch  # fsspec is slow to import, and only remote artifacts need it

        return fetch(self.url, self.manifest)

    @property
    def content_digest(self) -> str:
        """sha256 over (path, sha256) of the files that are not volatile: equal runs have equal content."""
        return str(self.manifest["content_digest"])

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage returned."""
        return dict(self.manifest["metrics"])
