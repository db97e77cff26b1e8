"""`athanor run -m`: one trial per combination through Hydra's launchers, then one table sorted by the metric.

    athanor run -m experiment=demo optim.lr=1e-3,3e-3 model=tiny,demo
    athanor run -m experiment=demo optim.lr=1e-3,3e-3 hydra/launcher=ray

Trials write into the same store, so they share every step that does not differ, and a sweep run again only does what is
missing. The table reads the artifacts and not what the launcher returned, so it is right after any interruption.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import console
from pipelines.engine import runner
from pipelines.engine.store import open_store
from pipelines.graph import build
from pipelines.settings import CONF_DIR, Settings, compose, hydra_overrides, typed
from pipelines.verbs import execute

METRICS = (("evaluate", "bits_per_byte"), ("pretrain", "loss"))
"""(step, figure) a sweep is sorted by: the first that a trial has; smaller is better."""


def sweep(overrides: Sequence[str]) -> int:
    """Run every combination of the overrides and print the table. Returns 1 when a trial failed, else 0."""
    import hydra

    words = hydra_overrides(overrides)
    folder = sweep_folder(words)
    sys.argv = [
        "athanor",
        "--multirun",
        *words,
        f"hydra.sweep.dir={folder}",
        "hydra.job.chdir=false",
        "hydra.output_subdir=.hydra",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(trial)()
    rows = [row(overrides_of) for overrides_of in trials(folder)]
    show(rows, folder)
    return 0 if rows and all(metric is not None for metric, *_ in rows) else 1


def trial(config: Any) -> float | None:
    """One trial, in this process or in a worker of Hydra's Ray launcher. Returns the metric; None when it failed."""
    from omegaconf import OmegaConf

    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        settings = typed(plain)
        execute(settings, list(build(settings).values()))
    except Exception as error:
        # One bad combination must not end the sweep; the table shows it as failed.
        words = str(error) if hasattr(error, "exit_code") else traceback.format_exc()
        sys.stderr.write(f"athanor: this trial failed: {words}\n")
        return None
    return figure(settings)[0]


def sweep_folder(words: Sequence[str]) -> Path:
    """Where Hydra notes a sweep's trials: the same words, the same folder."""
    digest = hashlib.sha256("\0".join(sorted(words)).encode()).hexdigest()[:12]
    return Path("multirun").absolute() / digest


def trials(folder: Path) -> list[list[str]]:
    """The overrides of each trial, as Hydra wrote them down."""
    import yaml

    files = sorted(folder.glob("*/.hydra/overrides.yaml"), key=lambda path: int(path.parts[-3]))
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]


def figure(settings: Settings) -> tuple[float | None, str]:
    """(metric, its name) of a configuration from its artifacts; (None, '') where they are not there."""
    reports = {r.name: r for r in runner.plan(list(build(settings).values()), store=open_store(settings.store))}
    for step, name in METRICS:
        if step in reports and (value := reports[step].metrics.get(name)) is not None:
            return float(value), name
    return None, ""


def row(words: Sequence[str]) -> tuple[float | None, str, list[str]]:
    """(metric, its name, overrides) of one trial."""
    try:
        value, name = figure(compose(words))
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        value, name = None, ""
    return value, name, [word.lstrip("+") for word in words]


def show(rows: Sequence[tuple[float | None, str, list[str]]], folder: Path) -> None:
    """The trials, best first, with only the overrides in which they differ."""
    same = set.intersection(*(set(words) for _, _, words in rows)) if rows else set()
    ordered = sorted(rows, key=lambda row: (row[0] is None, row[0] or 0.0))
    name = next((name for _, name, _ in rows if name), "metric")
    cells = [
        (str(place), f"{value:.4f}" if value is not None else "failed", " ".join(w for w in words if w not in same))
        for place, (value, _, words) in enumerate(ordered, start=1)
    ]
    out = console.console()
    out.print()
    out.print(console.table(None, ("", name, "overrides"), cells, right=(name,)))
    out.print(f"\ntrials: {folder}", markup=False)
