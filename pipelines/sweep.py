"""`athanor run -m`: one trial per combination through Hydra's launchers, then one table sorted by the metric.

    athanor run -m experiment=demo optim.lr=1e-3,3e-3 model=small,demo
    athanor run -m experiment=demo optim.lr=1e-3,3e-3 hydra/launcher=ray

Trials write into the same store, so they share every step that does not differ, and a sweep run again only does what is
missing. The table reads the artifacts, not the launcher's return values, so it is right after any kind of interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import console
from pipelines.settings import CONF_DIR, Settings, hydra_overrides, typed

METRICS = ("bits_per_byte", "final_loss")
"""What a sweep is sorted by: the first of these that a trial has; smaller is better."""


def sweep(overrides: Sequence[str]) -> int:
    """Run every combination of the overrides and print the table. Returns 1 when a trial failed, else 0."""
    import hydra

    words = hydra_overrides(overrides, sweep=True)
    sys.argv = ["athanor", "--multirun", *words]
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(trial)()
    return show(words)
