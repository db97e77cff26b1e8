"""Everything of Hydra that its documentation does not promise, in one place: a new version of Hydra may move any of it.

tests/settings/test_hydra_private.py looks each piece up in the installed Hydra and says which one is gone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def launch(overrides: Sequence[str], trial: Callable[[Any], T], config_dir: Path) -> list[T]:
    """What `trial` answered to each composed point of a sweep, in order, through Hydra's launcher."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    # Our conf/hydra/launcher/ray.yaml takes the name of the plugin's schema on purpose: it fills in that schema.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/ray' is validated against ConfigStore schema")
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("athanor", create_config_search_path(str(config_dir)))
    try:
        batches = hydra.multirun(config_name="config", task_function=trial, overrides=list(overrides))
    finally:
        GlobalHydra.instance().clear()
    return [job.return_value for batch in batches for job in batch]


def sweep_points(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each point of a sweep, in Hydra's own order. Raises HydraException for one without an end."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    [points] = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides(list(overrides)), max_batch_size=None
    )
    return [list(point) for point in points]
