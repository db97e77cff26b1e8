"""Send an evaluation's scores to Weights & Biases: figures and tables, in the runs of the trainings they belong to.

    track_scores(settings.tracking, figures, inputs, out_dir, ctx)

A training's run is found by the id that its artifact keeps, and resumed, so runs can be sorted by a score and plotted
against any setting. Without a tracked training (imported weights, or tracking off) the scores are a run of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.engine.step import Artifact, Context, Inputs
from pipelines.training.metrics import RUN_ID, RunName, Table, TrackingRefusal, wandb_run
from pipelines.training.settings import TrackingSettings

VOLATILE = ("logs/*",)
"""What tracking leaves in the artifact; it stays out of the content digest."""


def track_scores(
    settings: TrackingSettings,
    figures: Mapping[str, float],
    inputs: Inputs,
    out_dir: Path,
    ctx: Context,
) -> None:
    """Send `figures` and the tables below `out_dir`. A failure is logged, not raised: the scores are in the artifact too."""
    if settings.mode == "off":
        return
    models = inputs["model"]
    tracked = {name: artifact for name, artifact in models.items() if (artifact.path / "logs" / RUN_ID).exists()}
    config = {artifact.step: _training(artifact) for artifact in models.values()}
    digests = {key: artifact.digest for key, artifact in inputs.by_key.items()}
    try:
        for name, artifact in tracked.items():
            run_name = RunName.kept(artifact.path / "logs", label=artifact.step, url=artifact.url)
            own_config = {"evaluate": ctx.url, **config[artifact.step]}
            folder = out_dir / "logs" / artifact.step
            with wandb_run(settings, name=run_name, folder=folder, config=own_config, log=ctx.log) as run:
                if run is not None:
                    run.tables(tables(out_dir, name), step=int(artifact.metrics.get("steps", 0)) + 1)
                    shown = _without_later(figures, list(models), name)
                    run.summary({f"eval/{key}": value for key, value in shown.items()})
                    run.lineage(ctx.url, inputs={}, digests=digests)
        if not tracked:
            own = RunName.kept(out_dir / "logs", label="evaluate", url=ctx.url)
            with wandb_run(settings, name=own, folder=out_dir / "logs", config=config, log=ctx.log) as run:
                if run is not None:
                    run.tables({key: t for name in models for key, t in tables(out_dir, name).items()}, step=1)
                    run.summary({f"eval/{key}": value for key, value in figures.items() if value is not None})
                    used = {artifact.step: artifact.url for artifact in models.values()}
                    run.lineage(ctx.url, inputs=used, digests=digests)
    except TrackingRefusal as refusal:
        ctx.log(f"WARNING the scores are not at Weights & Biases: {refusal}")


def _without_later(figures: Mapping[str, Any], models: list[str], name: str) -> dict[str, Any]:
    """Figures for the run of one model: its own and those of the models before it, to compare."""
    later = tuple(f"{other}_" for other in models[models.index(name) + 1 :])
    return {
        key: value for key, value in figures.items() if isinstance(value, int | float) and not key.startswith(later)
    }


def tables(out_dir: Path, model: str) -> dict[str, Table]:
    """Tables of every scorer's scores and of the model's tasks and samples, from results.json and samples.json."""
    results, samples = (_read(out_dir / name) for name in ("results.json", "samples.json"))
    result: dict[str, Table] = {}
    shown = ("bits_per_byte", "perplexity")
    scores = [
        (name, figure, *_interval(score[figure]))
        for name, score in results.get("scores", {}).items()
        for figure in shown
        if isinstance(score, Mapping) and isinstance(score.get(figure), Mapping)
    ]
    if scores:
        result["eval/scores"] = Table(columns=("scorer", "figure", "value", "low", "high"), rows=tuple(scores))
    tasks = [
        (task, metric, *_interval(figure), figures.get("examples"))
        for task, figures in (results.get("tasks", {}).get(model) or {}).items()
        for metric, figure in figures.items()
        if isinstance(figure, Mapping) and "value" in figure
    ]
    if tasks:
        columns = ("task", "metric", "value", "low", "high", "examples")
        result["eval/tasks"] = Table(columns=columns, rows=tuple(tasks))
    rows = [(one["prompt"], one["text"], one["finish"]) for one in samples.get(model, [])]
    if rows:
        result["eval/samples"] = Table(columns=("prompt", "text", "ended by"), rows=tuple(rows))
    return result


def _interval(figure: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return figure["value"], figure.get("low"), figure.get("high")


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result


def _training(artifact: Artifact) -> dict[str, Any]:
    """Settings of a training; empty for imported weights."""
    record = _read(artifact.path / "run.json")
    return {name: record[name] for name in ("train", "model", "order", "mixture") if name in record}
