"""The scores of an evaluation at Weights & Biases: a run of its own, in the group of the trainings that it judges.

    track_scores(settings.tracking, figures, inputs, out_dir, ctx)

Its config is that of the trainings, so that a sweep's runs can be sorted by a score and set against any setting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.engine.step import Artifact, Context
from pipelines.training.settings import TrackingSettings

MODELS = ("pretrain", "finetune")
VOLATILE = ("logs/*",)
"""What tracking leaves in the artifact; it stays out of the content digest."""


def track_scores(
    settings: TrackingSettings,
    figures: Mapping[str, float],
    inputs: Mapping[str, Artifact],
    out_dir: Path,
    ctx: Context,
) -> None:
    """Send `figures` and what they were measured on. Raises TrainingError where Weights & Biases does not start."""
    from pipelines.training.metrics import wandb_run

    models = {name: inputs[name] for name in MODELS if name in inputs}
    digest = ctx.url.rstrip("/").rpartition("/")[2]
    config = {name: _training(artifact) for name, artifact in models.items()}
    with wandb_run(
        settings, run_id=f"evaluate-{digest[:16]}", folder=out_dir / "logs", label="evaluate", config=config
    ) as run:
        if run is not None:
            run.summary(figures)
            used = {name: artifact.url for name, artifact in models.items()}
            run.lineage(ctx.url, inputs=used, digests={name: artifact.digest for name, artifact in inputs.items()})


def _training(artifact: Artifact) -> dict[str, Any]:
    """What a training was told, nothing where the weights came from outside."""
    path = artifact.path / "run.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: told[name] for name in ("train", "model", "order", "mixture") if name in told}
