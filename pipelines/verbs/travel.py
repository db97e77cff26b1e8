"""Prepare a command for a cluster: absolute paths, and ranks that fit its machines.

    command, lines = prepare_command(cluster_settings, ["run", "experiment=text", "corpus.paths=[books]"], parsed)

A misspelled setting is refused here instead of there; what exists only there (files, GPUs) is not checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from conf.refusal import NO_VALUE, Refusal, Shown
from pipelines.settings.compose import compose
from pipelines.settings.derive import Settings, corpus_key
from pipelines.settings.overrides import points_of

if TYPE_CHECKING:
    from cluster.command import Machines
    from cluster.submit import ClusterSettings

TRAINS = ("run", "train", "certify")
COMPOSES = (*TRAINS, "plan", "why", "status", "trace", "generate")
"""Verbs whose arguments are overrides of an experiment's settings."""


def prepare_command(
    cluster: ClusterSettings, command: Sequence[str], parsed: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """The command with added overrides, and lines to print. Raises Refusal for what would fail there."""
    verb, sweeps = command[0], getattr(parsed, "multirun", False)
    if verb == "generate" and parsed.source and "/" in parsed.source and not parsed.source.startswith(("/", "~")):
        raise Refusal("--from", Shown(parsed.source), "a relative path", "give an absolute one that the cluster sees")
    if verb not in COMPOSES or not parsed.overrides:
        return [*command], []
    points = points_of(parsed.overrides, Settings) if sweeps else [tuple(parsed.overrides)]
    added: list[str] = []
    lines: list[str] = []
    for settings in map(compose, points):
        _check_corpora(verb, settings)
        moved = moved_paths(settings, shared_disk=cluster.kind == "slurm" and not sweeps)
        machines = getattr(cluster, "machines", None)
        if sweeps:
            continue
        added += moved
        if verb in TRAINS and machines is not None:
            fitting, lines = fit_ranks(settings, machines, parsed.overrides, driver_has_gpus=cluster.kind == "slurm")
            added += fitting
    return [*command, *added], lines


def _check_corpora(verb: str, settings: Settings) -> None:
    if verb in TRAINS and settings.pretrains:
        for step, source in settings.corpora().items():
            if source.kind == "files" and not source.paths:
                key = f"{corpus_key(step)}.paths"
                raise Refusal(
                    key, [], "there is nothing to read", f"set '{key}=[DIR]', whose entries are folders, files or globs"
                )


def moved_paths(settings: Settings, *, shared_disk: bool) -> list[str]:
    """Overrides that make relative paths absolute where the machines share this one's disk; Refusal elsewhere."""
    added = []
    for key, value in paths_of(settings):
        if key == "store":  # the cluster's own rule
            continue
        relative = [path for path in value if not (path.startswith(("/", "~", "tag:")) or "://" in path)]
        if not relative:
            continue
        if not shared_disk:
            raise Refusal(
                key,
                Shown(relative[0]),
                "a relative path, which a job on another machine looks for in its own folder",
                f"give an absolute path that every machine of the cluster sees ({os.path.abspath(relative[0])} if it is "
                "there too), or a URL such as s3://bucket/prefix",
            )
        absolute = [_quoted(os.path.abspath(path) if path in relative else path) for path in value]
        added.append(f"{key}={absolute[0] if isinstance(value, _One) else '[' + ','.join(absolute) + ']'}")
    return added


class _One(tuple[str, ...]):
    """The value of a setting that is one path and not a list."""


def paths_of(value: Any, above: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """(dotted key, paths) of every field declared with `metadata={"path": True}`, at any depth."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from paths_of(item, f"{above}{name}.")
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return
    for field in dataclasses.fields(value):
        held, key = getattr(value, field.name), f"{above}{field.name}"
        if not field.metadata.get("path"):
            yield from paths_of(held, f"{key}.")
        elif held is not None:
            yield key, _One((held,)) if isinstance(held, str) else tuple(held)


def _quoted(path: str) -> str:
    """In Hydra's quotes, inside which only a quote and backslashes before one are special."""
    return "'" + path.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def fit_ranks(
    settings: Settings, machines: Machines, overrides: Sequence[str], *, driver_has_gpus: bool
) -> tuple[list[str], list[str]]:
    """Overrides that fit the ranks to the machines, and a line where some will be idle.

    Raises Refusal where GPUs would be idle without compute.ranks set, or where the ranks do not fit.
    """
    set_here = {word.lstrip("+").partition("=")[0] for word in overrides}
    ranks, gpus, device = settings.compute.ranks, machines.count * machines.gpus, settings.compute.device
    added, lines = [], []
    if gpus and device != "cpu":
        if ranks > gpus:
            raise Refusal(
                "compute.ranks",
                ranks,
                f"each rank takes a GPU, and {machines.settings} are {gpus}",
                f"set compute.ranks={gpus}, or ask for more",
            )
        if ranks < gpus and "compute.ranks" not in set_here:
            raise Refusal(
                machines.settings,
                NO_VALUE,
                f"{gpus} GPUs for a run of compute.ranks={ranks}, which takes one each: {gpus - ranks} would be idle",
                f"add compute.ranks={gpus} to the command, or ask for fewer GPUs",
            )
        if device == "auto" and not driver_has_gpus:  # `auto` is resolved on the head, which has none
            added.append("compute.device=cuda")
    idle = gpus if device == "cpu" else gpus - ranks
    if gpus and idle:
        why = "compute.device=cpu uses none" if device == "cpu" else f"compute.ranks={ranks} takes one each"
        lines.append(f"idle: {idle} of {gpus} GPUs ({why}).")
    elif not gpus and ranks < machines.count:
        lines.append(
            f"idle while training: {machines.count - ranks} of {machines.count} machines (compute.ranks={ranks}); "
            f"compute.ranks={machines.count} or more uses all."
        )
    on_one = math.ceil(ranks / machines.count) if not (gpus and device != "cpu") else min(ranks, machines.gpus)
    if settings.compute.cpus_per_rank is None and (machines.count > 1 or not driver_has_gpus):
        if on_one > machines.cpus:
            raise Refusal(
                "compute.ranks",
                ranks,
                f"{on_one} ranks on a machine of {machines.cpus} CPUs ({machines.settings})",
                "give every rank one at least",
            )
        added.append(f"compute.cpus_per_rank={machines.cpus // on_one}")
    return added, lines
