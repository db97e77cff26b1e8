"""Each piece of Hydra that hydra_private.py takes without a promise is there; where not, a sentence says which one moved."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import hydra
import pytest

from pipelines.settings import hydra_private


def piece(module: str, name: str, *parameters: str) -> Any:
    """An attribute of one of Hydra's modules that takes these parameters, or a failure with a sentence."""
    moved = f"Hydra {hydra.__version__} has no {module}.{name}({', '.join(parameters)}) any more: " + (
        "pipelines/settings/hydra_private.py needs another way to it"
    )
    found: Any = None
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        pytest.fail(moved, pytrace=False)
    if not set(parameters) <= set(inspect.signature(found).parameters):
        pytest.fail(moved, pytrace=False)
    return found


def test_the_class_that_runs_a_sweep_is_there() -> None:
    piece("hydra._internal.hydra", "Hydra.create_main_hydra2", "task_name", "config_search_path")
    piece("hydra._internal.hydra", "Hydra.multirun", "config_name", "task_function", "overrides")
    piece("hydra._internal.utils", "create_config_search_path", "search_path_dir")
    assert piece("hydra.core.global_hydra", "GlobalHydra").instance() is not None
    piece("hydra.version", "setbase", "ver")


def test_a_sweep_is_cut_into_points_in_hydras_order() -> None:
    piece("hydra._internal.core_plugins.basic_sweeper", "BasicSweeper.split_arguments", "overrides", "max_batch_size")
    assert hydra_private.sweep_points(["++a=1,2", "++b=x,y"]) == [
        ["++a=1", "++b=x"],
        ["++a=1", "++b=y"],
        ["++a=2", "++b=x"],
        ["++a=2", "++b=y"],
    ]
