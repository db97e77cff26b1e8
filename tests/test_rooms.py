"""The structure holds: who may import whom, no cycles, the doors, and docs/map.md."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipelines", "model", "data", "conf", "cluster")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

FORBIDDEN: dict[str, set[str]] = {
    "model": {"data", "pipelines", "cluster", "ray", "deepspeed", "hydra", "omegaconf", "wandb", "yaml"},
    "data": {"model", "pipelines", "cluster", "ray", "deepspeed", "hydra", "omegaconf", "wandb"},
    "cluster": {"model", "data", "pipelines", "torch", "deepspeed", "hydra", "omegaconf"},
    "pipelines/engine": {"torch", "model", "data", "deepspeed", "hydra", "omegaconf", "ray", "cluster", "wandb"},
    "pipelines/training": {"ray", "hydra", "omegaconf", "deepspeed", "cluster"},
    "pipelines/stages": {"hydra", "omegaconf", "cluster", "deepspeed", "ray", "wandb"},
    "pipelines/evaluation": {"hydra", "omegaconf", "cluster", "deepspeed", "ray", "wandb"},
    "pipelines/inference": {"hydra", "omegaconf", "cluster", "deepspeed", "ray", "wandb"},
    "pipelines/console": {"torch", "model", "data", "ray", "deepspeed", "hydra", "omegaconf", "wandb", "cluster"},
    "pipelines": {"torch", "ray", "deepspeed", "hydra", "omegaconf", "wandb", "cluster"},  # the files beside the rooms
}
DOORS = {
    "pipelines/engine/backends/ray_backend.py": {"ray"},
    "pipelines/engine/backends/ray_train.py": {"ray"},
    "pipelines/engine/backends/ray_private.py": {"ray"},
    "pipelines/training/zero.py": {"deepspeed"},
    "pipelines/settings/compose.py": {"hydra", "omegaconf"},
    "pipelines/settings/overrides.py": {"hydra"},
    "pipelines/settings/hydra_private.py": {"hydra"},
    "pipelines/verbs/torchrun.py": {"torch"},  # process groups, no tensors
    "pipelines/verbs/commands.py": {"cluster"},
    "pipelines/verbs/travel.py": {"cluster"},  # names of its settings, for annotations
}
"""The one file of a room that may import what the rest of it may not."""

LIBRARIES = {
    "model": {"torch", "safetensors"},
    "data": {"numpy", "pyarrow", "sentencepiece", "tokenizers", "jinja2", "torch"},
    "cluster": {"yaml", "ray", "requests"},
    "pipelines/engine": {"fsspec", "ray", "grpc"},
}
"""What the rooms with a list of their own may import beside the standard library."""

READ_BY_TRAINING = {
    "pipelines/training/job.py": {
        "data.tasks.denoising",
        "data.tasks.objectives",
        "data.mixture",
        "data.order",
        "data.rows.shard_set",
    },
}
"""Beside data.batch and data.loader: where a job's plain values become dataclasses."""

INSIDE_PIPELINES = {
    "pipelines/engine": {"pipelines.engine"},
    # A job arrives as plain data, and a checkpoint's state is sealed as a shard's marker is.
    "pipelines/training": {"pipelines.training", "pipelines.engine.store.sealed"},
    "pipelines/stages": {
        *("pipelines.stages", "pipelines.training", "pipelines.evaluation", "pipelines.inference"),
        *("pipelines.console.charts", "pipelines.engine.step"),
    },
    "pipelines/evaluation": {
        *("pipelines.evaluation", "pipelines.inference", "pipelines.engine.step"),
        "pipelines.training.settings",  # tracking
    },
    "pipelines/inference": {"pipelines.inference", "pipelines.engine.step"},
    "pipelines/console": {"pipelines.console", "pipelines.engine"},
}


def imports(path: Path, *, run: bool = False) -> set[str]:
    """Dotted names of every module a file imports, inside functions too; with `run`, not those for annotations only."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if run:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT).as_posix()
    return next((room for room in sorted(FORBIDDEN, key=len, reverse=True) if relative.startswith(room + "/")), "conf")


@pytest.mark.parametrize("path", [p for p in SOURCES if any(p.is_relative_to(ROOT / r) for r in FORBIDDEN)], ids=str)
def test_a_room_imports_only_what_it_may_know(path: Path) -> None:
    room, relative = room_of(path), path.relative_to(ROOT).as_posix()
    names = imports(path)
    forbidden = FORBIDDEN[room] - DOORS.get(relative, set())
    assert not {name for name in names if name.split(".")[0] in forbidden}
    allowed = INSIDE_PIPELINES.get(room)
    if allowed is not None:
        inside = {name for name in names if name.startswith("pipelines.")}
        strangers = {
            n for n in inside if not any(n == a or n.startswith(a + ".") for a in allowed) and n not in allowed
        }
        parents = {".".join(a.split(".")[:-1]) for a in allowed}
        assert not strangers - parents


@pytest.mark.parametrize("room", LIBRARIES)
def test_a_room_with_a_list_of_libraries_imports_no_other(room: str) -> None:
    found = {name.split(".")[0] for path in SOURCES if room_of(path) == room for name in imports(path)}
    assert found - set(ROOMS) - set(sys.stdlib_module_names) - {""} <= LIBRARIES[room]


def test_training_knows_of_data_its_batches_and_its_loader() -> None:
    for path in (ROOT / "pipelines/training").rglob("*.py"):
        allowed = {"data.batch", "data.loader"} | READ_BY_TRAINING.get(path.relative_to(ROOT).as_posix(), set())
        read = {name for name in imports(path) if module_file(name) and name.startswith("data.")}
        assert read <= allowed, path


def test_no_text_is_split_at_anything_but_line_ends() -> None:
    """`str.splitlines` breaks at U+2028, U+2029, U+0085, form feeds …, which a line of jsonl may hold as they are."""
    callers = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    ]
    assert not callers, 'use .split("\\n")'


OUTSIDE = {"os", "pathlib", "io", "shutil", "tempfile", "subprocess", "socket", "glob", "fsspec", "safetensors"}
CALLS = {"open", "torch.load", "torch.save"}


@pytest.mark.parametrize("path", sorted((ROOT / "model").rglob("*.py")), ids=str)
def test_the_model_touches_no_files_and_no_environment_but_in_interop(path: Path) -> None:
    if path.is_relative_to(ROOT / "model/interop"):
        return
    assert not {name.split(".")[0] for name in imports(path)} & OUTSIDE
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not called & CALLS


def test_torch_enters_data_only_through_batches() -> None:
    users = {p.relative_to(ROOT / "data").as_posix() for p in (ROOT / "data").rglob("*.py") if "torch" in imports(p)}
    assert users <= {"batch.py", "loader.py"}


def module_file(name: str) -> Path | None:
    base = ROOT / name.replace(".", "/")
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def edges() -> dict[Path, set[Path]]:
    """What each file imports when it runs; names that only annotations need are no dependency."""
    return {path: {f for name in imports(path, run=True) if (f := module_file(name)) and f != path} for path in SOURCES}


def test_no_module_imports_itself_in_a_circle() -> None:
    graph, done, on_path = edges(), set[Path](), list[Path]()

    def visit(path: Path) -> None:
        assert path not in on_path, "circle: " + " → ".join(p.name for p in [*on_path[on_path.index(path) :], path])
        if path in done:
            return
        on_path.append(path)
        for other in sorted(graph.get(path, ())):
            visit(other)
        on_path.pop()
        done.add(path)

    for path in SOURCES:
        visit(path)


def test_the_map_has_every_source_file_in_under_eight_words() -> None:
    readme = (ROOT / "docs/map.md").read_text()
    for path in SOURCES:
        if path.name == "__init__.py":
            continue
        line = re.search(rf"^\s*{re.escape(path.relative_to(ROOT).as_posix())}\s+(.+)$", readme, re.MULTILINE)
        assert line, f"{path.relative_to(ROOT)} is missing from docs/map.md"
        assert len(line.group(1).split()) < 8, line.group(0)


def test_files_stay_readable_in_one_sitting() -> None:
    long = {p.relative_to(ROOT).as_posix(): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    assert not long, f"look for the part that has its own name in {long}"
