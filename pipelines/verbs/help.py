"""`athanor run --help`: experiments, groups and every setting with its default and meaning, read from `conf` and the
dataclasses. `python -m pipelines.verbs.help > docs/reference.md` writes the reference page."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conf.described import described
from conf.typed import arms, field_types
from pipelines.settings.compose import plain
from pipelines.settings.derive import Settings
from pipelines.settings.overrides import CONF_DIR, groups, options
from pipelines.settings.schema import SET_ELSEWHERE

NOT_TAUGHT = ("experiment", "hydra")
MEANING_COLUMN = 44  # of a setting's line, unless the setting is longer


def settings_help(overrides: Sequence[str] = ()) -> str:
    """The text below a verb's options. Where `overrides` choose an experiment, its values stand in place of defaults."""
    chosen = any(word.startswith("experiment=") for word in overrides)
    values = dict(_flat(plain(overrides), "")) if chosen else {}
    lines = ["experiments"]
    lines += [f"  experiment={name:<12} {first_comment(name)}" for name in options("experiment")]
    lines += ["", "groups: GROUP=OPTION"]
    lines += [f"  {group:<11} {', '.join(options(group))}" for group in groups() if group not in NOT_TAUGHT]
    lines += [
        "",
        "settings: KEY=VALUE   (* changes where or how fast, never what is made)",
        "          with the values of this command"
        if chosen
        else "          with defaults; name an experiment before --help and its values are shown",
        "          pretrain.init_from=DIR: a Hugging Face folder to begin with; what lies in it counts, not where it lies",
    ]
    lines += [f"  {line}" for line in keys(Settings, "", values, execution=False)]
    lines += [
        "",
        "lists: \"corpus.paths=['a/*.txt',b]\"   nothing: null   sweep: run -m optim.lr=1e-3,3e-3 model=tiny,demo",
    ]
    return "\n".join(lines)


def cluster_help(overrides: Sequence[str] = ()) -> str:
    """The settings of each kind of cluster, as conf/cluster says them."""
    files = (CONF_DIR / "cluster" / f"{name}.yaml" for name in options("cluster"))
    told = [file.read_text(encoding="utf-8").strip().replace("\nkind: ", "\ncluster=") for file in files]
    asks = "A Ray cluster that asks for a token (RAY_AUTH_MODE=token) takes RAY_AUTH_TOKEN_PATH from this shell."
    ends = (
        "Exit code 75 of a run: a machine, or Ray itself, was lost and did not come back within compute.wait_seconds.\n"
        "The same command goes on; Slurm's script queues itself again."
    )
    return "\n\n".join(["clusters: cluster=KIND KEY=VALUE …, then -- and the command", *told, asks, ends])


def first_comment(experiment: str) -> str:
    """What an experiment's file says of itself in its first line of prose."""
    for line in (CONF_DIR / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").split("\n"):
        if line.startswith("# ") and "@package" not in line:
            return line[2:]
    return ""


def keys(
    cls: type, prefix: str, values: Mapping[str, Any], *, execution: bool, above: tuple[type, ...] = ()
) -> Iterator[str]:
    """One line for each key under a dataclass: its name, its value in `values` or its default, and when it applies.

    above: the dataclasses that this one is part of; a field of one of these types is told in one line.
    """
    types = field_types(cls)
    for field in dataclasses.fields(cls):
        name, aside = f"{prefix}{field.name}", execution or bool(field.metadata.get("execution"))
        hint = types[field.name]
        inner: list[Any] = [arm for arm in _arms(hint) if dataclasses.is_dataclass(arm)]
        if name in SET_ELSEWHERE:
            continue
        if any(arm in (*above, cls) for arm in inner):
            yield f"{name} (another {inner[0].__name__}){_shown(field, name, values)}"
            continue
        if typing.get_origin(hint) in (dict, tuple) and inner:
            yield f"{name}{'.NAME' if typing.get_origin(hint) is dict else ''} (each a {inner[0].__name__})"
        elif not inner:
            key, meaning = f"{name}{'*' if aside else ''}{_shown(field, name, values)}", described(cls).get(field.name)
            yield f"{key:<{MEANING_COLUMN}}  {meaning}" if meaning else key
        for arm in inner if typing.get_origin(hint) not in (dict, tuple) else []:
            kind = typing.get_args(field_types(arm)["kind"])[0] if len(inner) > 1 else None
            if kind is not None and values.get(f"{name}.kind", kind) != kind:
                continue  # another kind is chosen
            when = f"   (with {name}.kind={kind})" if kind is not None else ""
            yield from (
                line if "   (with " in line or line.startswith(f"{name}.kind") else line + when
                for line in keys(arm, name + ".", values, execution=aside, above=(*above, cls))
            )


def _arms(hint: Any) -> list[Any]:
    """Every type within a type, those of lists and mappings too."""
    found = arms(hint)
    return found if found != [hint] else [inner for arm in typing.get_args(hint) for inner in _arms(arm)] or [hint]


def _flat(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(field: dataclasses.Field[Any], name: str, values: Mapping[str, Any]) -> str:
    value = values.get(name, field.default)
    if value is dataclasses.MISSING:
        return ""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f" = {shown}"


def reference() -> str:
    """Every setting, its default and meaning, as a page."""
    lines = [
        "# Settings",
        "",
        "Written by `python -m pipelines.verbs.help > docs/reference.md`; a test says when it is stale.",
        "",
    ]
    lines += [
        "`*`: changes where or how fast, never what is made. Experiments and groups choose other values.",
        "",
        "```",
    ]
    return "\n".join([*lines, *keys(Settings, "", {}, execution=False), "```"]) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
