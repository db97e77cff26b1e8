"""Task files: the YAML of lm-evaluation-harness, read and checked without importing it.

    tasks = read_tasks(("capitals", "grammar"), ("my-tasks",))
    tasks.tasks["capitals"].config       # as passed to the harness: includes merged, data paths absolute
    tasks.groups["grammar"].members      # a group's tasks and groups, in order
    tasks.files                          # every file that the tasks read, for the digest

A name is a file's (`NAME.yaml`), or the value of `task`, `group` or `tag` in any file of the folders, as in the harness.
Every form of its guide is supported: `include`, groups (nested, inline, with overrides), tags, one data file or one per
split, globs. What needs a network or runs code is refused with a remedy.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from conf.refusal import NO_VALUE, Refusal
from pipelines.evaluation.task_schema import (
    CODE,
    FIELDS,
    GROUP_FIELDS,
    check_averages,
    check_fields,
    check_task,
    data_files_of,
    refuse,
)

TASKS = Path(__file__).parents[2] / "conf" / "evaluate" / "tasks"


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """One task: its configuration in the harness's schema, and the file to edit."""

    name: str
    path: Path
    config: dict[str, Any]
    made_from: str | None
    """How its examples are made from held-out documents; None for a task with its own data."""

    @property
    def split(self) -> str:
        """The split that is evaluated."""
        return str(self.config.get("test_split") or self.config["validation_split"])


@dataclass(frozen=True, kw_only=True)
class GroupFile:
    """One group: `config` with its alias and averaged metrics, `members` the names of its tasks and groups."""

    name: str
    path: Path
    config: dict[str, Any]
    members: tuple[str, ...]


@dataclass(kw_only=True)
class TaskSet:
    """The requested tasks, including those of groups."""

    names: tuple[str, ...]
    """Requested names in order; a tag is replaced by its tasks."""
    tasks: dict[str, TaskFile] = field(default_factory=dict)
    groups: dict[str, GroupFile] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def leaves(self, group: str) -> list[str]:
        """Names of every task in a group and in the groups inside it."""
        found: list[str] = []
        for member in self.groups[group].members:
            found += self.leaves(member) if member in self.groups else [member]
        return found

    def has_foreign(self) -> bool:
        """Whether any of them does not come with this program."""
        paths = [task.path for task in self.tasks.values()] + [group.path for group in self.groups.values()]
        return any(path.parent != TASKS for path in paths)


def read_tasks(names: Sequence[str], folders: Sequence[str]) -> TaskSet:
    """Tasks by name from the user's folders, then from conf/evaluate/tasks. Raises Refusal for what cannot be run."""
    return _Reader([*(Path(folder).expanduser() for folder in folders), TASKS]).read(names)


class _Reader:
    """Reads names from folders, accumulating a TaskSet."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._set = TaskSet(names=())

    def read(self, names: Sequence[str]) -> TaskSet:
        requested: list[str] = []
        for name in names:
            requested += [added for added in self._add(name, {}, ()) if added not in requested]
        self._set.names = tuple(requested)
        self._set.files = list(dict.fromkeys(self._set.files))
        return self._set

    def _add(self, name: str, overrides: Mapping[str, Any], above: tuple[str, ...]) -> list[str]:
        """Add the task, the group or the tag's tasks called `name`, with a group's overrides on top; the added names."""
        if name in above:
            raise Refusal("evaluate.tasks", name, f"this group contains itself, by way of {' → '.join(above)}")
        path = self._file(name)
        if path is not None:
            config, files = _load(path)
            self._set.files += files
            if "group" in config:
                return [self._group(name, path, config, overrides, above)]
            return [self._task(name, path, {**config, **overrides})]
        tagged = self._index.tags.get(name)
        if tagged is None:
            self._refuse_unknown(name)
        return [added for member in tagged for added in self._add(member, overrides, above)]

    def _file(self, name: str) -> Path | None:
        for folder in self._folders:
            if (folder / f"{name}.yaml").is_file():
                return folder / f"{name}.yaml"
        return self._index.names.get(name)

    @functools.cached_property
    def _index(self) -> _Index:
        return _Index.of(self._folders)

    def _refuse_unknown(self, name: str) -> NoReturn:
        known = sorted(self._index.names.keys() | self._index.tags.keys() | {p.stem for p in TASKS.glob("*.yaml")})
        near = difflib.get_close_matches(name, known, n=1)
        unread = "".join(f" {path} could not be read: {why}" for path, why in self._index.unread.items())
        unread += "".join(f" evaluate.task_folders: {f} is no folder." for f in self._folders if not f.is_dir())
        raise Refusal(
            "evaluate.tasks",
            name,
            f"no task has this name{f', did you mean {near[0]!r}?' if near else '.'} A task is a harness YAML file in "
            "conf/evaluate/tasks or in one of evaluate.task_folders, named by its file or by its task, group or tag field; "
            f"there are {', '.join(known)}",
            "a task that comes with the harness needs a network: put its YAML and its data into a folder and add "
            f"'evaluate.task_folders=[DIR]'.{unread}",
        )

    def _task(self, name: str, path: Path, config: dict[str, Any]) -> str:
        config = {key: value for key, value in config.items() if value is not None}
        check_fields(path, config, FIELDS)
        maker = config.pop("made_from", None)
        config = check_task(path, {**config, "task": name}, maker)
        if maker is None:
            by_split = data_files_of(path, config)
            self._set.files += [Path(file) for files in by_split.values() for file in files]
            config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": by_split}
        task = TaskFile(name=name, path=path, config=config, made_from=maker)
        if self._set.tasks.setdefault(name, task) != task:
            raise Refusal(
                "evaluate.tasks",
                name,
                f"requested twice with different settings, last by {path}",
                "give one of them another name (include: its file, and another task:)",
            )
        return name

    def _group(
        self, name: str, path: Path, config: dict[str, Any], overrides: Mapping[str, Any], above: tuple[str, ...]
    ) -> str:
        own = {key: value for key, value in config.items() if key in GROUP_FIELDS and value is not None}
        for_members = {**{key: value for key, value in config.items() if key not in GROUP_FIELDS}, **overrides}
        check_fields(path, own, GROUP_FIELDS)
        check_fields(path, for_members, FIELDS)
        if isinstance(own.get("task"), str) and "dataset_path" in config:
            refuse(
                path,
                "group",
                "beside a dataset it is the old spelling of tag",
                "write tag: instead",
                value=own["group"],
            )
        listed = own.get("task") or []
        members: list[str] = []
        for member in [listed] if isinstance(listed, str) else listed:
            members += self._member(name, path, member, for_members, (*above, name))
        if not members:
            refuse(path, "task", "a group names its tasks in a list; this one has none")
        if len(set(members)) < len(members):
            twice = next(member for member in members if members.count(member) > 1)
            refuse(path, "task", f"stands twice in the group {name!r}", "name each task once", value=twice)
        averaged = own.get("aggregate_metric_list") or []
        shown: dict[str, Any] = {key: own[key] for key in ("group_alias", "metadata") if key in own}
        shown["aggregate_metric_list"] = check_averages(path, [averaged] if isinstance(averaged, dict) else averaged)
        self._set.groups[name] = GroupFile(
            name=name, path=path, config={"group": name, **shown}, members=tuple(members)
        )
        return name

    def _member(
        self, group: str, path: Path, member: Any, overrides: Mapping[str, Any], above: tuple[str, ...]
    ) -> list[str]:
        """Add one entry of a group's `task` list: a name, a name with overrides, or an inline task or group."""
        if isinstance(member, str):
            return self._add(member, overrides, above)
        if not isinstance(member, dict) or not isinstance(member.get("group") or member.get("task"), str):
            remedy = "write a name, or a mapping with task: or group:"
            refuse(path, "task", "no member of a group", remedy, value=member)
        if "group" in member:
            name = member["group"]
            if self._exists(name):
                return self._add(name, {**overrides, **{k: v for k, v in member.items() if k != "group"}}, above)
            return [self._group(f"{group}::{name}", path, member, overrides, above)]
        name = member["task"]
        changed = {**overrides, **{key: value for key, value in member.items() if key != "task"}}
        if self._exists(name):
            return self._add(name, changed, above)
        return [self._task(f"{group}::{name}", path, changed)]

    def _exists(self, name: str) -> bool:
        return self._file(name) is not None or name in self._index.tags


@dataclass(kw_only=True)
class _Index:
    """Task and group names and tags in some folders' files, and the files that could not be read."""

    names: dict[str, Path] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folders: Sequence[Path]) -> _Index:
        """The index of every task file below the folders; what cannot be read is kept with its reason."""
        index = cls()
        for path in (path for folder in folders for path in _yaml_files(folder)):
            try:
                config, _ = _load(path)
            except Refusal as refusal:
                index.unread[path] = str(refusal)
                continue
            name = config.get("group") if "group" in config else config.get("task")
            if not isinstance(name, str):
                continue  # a file that others include
            index.names.setdefault(name, path)
            tags = config.get("tag") or [] if "group" not in config else []
            for tag in [tags] if isinstance(tags, str) else tags:
                index.tags.setdefault(str(tag), []).append(name)
        return index


def _yaml_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else ():
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts):
            yield path


def _load(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """A file's configuration merged over its includes, and every file read."""
    import yaml

    if path.resolve() in above:
        refuse(path, "include", f"the file includes itself, by way of {' → '.join(str(file) for file in above)}")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(
            path, NO_VALUE, f"this task file cannot be read ({error})", "give a harness YAML file in UTF-8"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        shown = " ".join(str(error).split())
        raise Refusal(path, NO_VALUE, f"this task file is not plain YAML ({shown})") from error
    if not isinstance(config, dict):
        what = "is empty" if config is None else f"holds a {type(config).__name__}"
        raise Refusal(path, NO_VALUE, f"the file {what}; a task is a mapping, beginning with task: and dataset_path:")
    if isinstance(data := config.get("dataset_kwargs"), dict) and data.get("data_files"):
        config["dataset_kwargs"] = {**data, "data_files": _beside(path, data["data_files"])}
    included = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    files = [path]
    for name in [included] if isinstance(included, str) else included:
        other = path.parent / str(name)
        if not other.is_file():
            refuse(path, "include", "there is no such file beside it", value=name)
        config_there, files_there = _load(other, (*above, path.resolve()))
        config_there.pop("task_list", None)
        merged.update(config_there)
        files += files_there
    return {**merged, **config}, files


@functools.cache
def _loader() -> Any:
    """A safe YAML loader that refuses `!function` with its line."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def no_function(loader: Any, node: Any) -> NoReturn:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: !function {node.value} {CODE}")

    Loader.add_constructor("!function", no_function)
    return Loader


def _beside(path: Path, names: Any) -> Any:
    """Paths of data, relative ones resolved against the file that contains them, whoever includes it."""
    if isinstance(names, dict):
        return {split: _beside(path, of) for split, of in names.items()}
    if isinstance(names, list):
        return [_beside(path, name) for name in names]
    return (
        str(path.absolute().parent / Path(names).expanduser())
        if isinstance(names, str) and "://" not in names
        else names
    )
