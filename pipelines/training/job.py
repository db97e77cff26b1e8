"""A training job as plain data: what every rank is told, and how it becomes a model, a loader and a run.

    run_rank(json.loads(Path("run.json").read_text()))

The stage that writes the job knows the engine; a rank that reads it only needs torch and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.loader import Loader, open_loader
from data.mixture import MixtureSettings
from data.order import OrderSettings
from data.shard_set import ShardSet
from model.build import build_model
from model.config import ModelConfig
from model.costs import FLOP_FORMULA, train_flops_per_token
from model.interop import load_pretrained, save_pretrained
from pipelines.engine.typed import from_plain, to_plain
from pipelines.training.loop import Run, train
from pipelines.training.settings import BatchPlan, TrainSettings


def run_rank(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train as the job says, in this rank; the key figures, the same in every rank."""
    settings = from_plain(TrainSettings, job["train"], "train")
    order = from_plain(OrderSettings, job.get("order") or {}, "order")
    mixture = from_plain(MixtureSettings, job.get("mixture") or {}, "mixture")
    folders = {name: Path(folder) for name, folder in job["shards"].items()}
    first = ShardSet.open(next(iter(folders.values())))
    model, config = _model(job, settings)

    def loader(plan: BatchPlan, rank: int) -> Loader:
        return open_loader(
            folders,
            rows_per_step=plan.rows_per_step,
            micro_batch_rows=plan.micro_batch_rows,
            rank=rank,
            world_size=plan.world_size,
            order=order,
            mixture=mixture,
        )

    def save_model(state: dict[str, torch.Tensor], folder: Path) -> None:
        save_pretrained(state, config, folder)

    run = Run(
        out_dir=Path(job["out_dir"]),
        seq_len=first.seq_len,
        save_model=save_model,
        digests=job.get("digests") or {},
        run_id=job.get("run_id") or "local",
        label=job.get("label") or "train",
        flops_per_token=train_flops_per_token(config, first.seq_len, first.manifest["totals"]["mean_piece_tokens"]),
        flop_formula=FLOP_FORMULA,
        config={"train": to_plain(settings), "model": to_plain(config)},
    )
    return train(model=model, loader_factory=loader, settings=settings, run=run)


def _model(job: Mapping[str, Any], settings: TrainSettings) -> tuple[nn.Module, ModelConfig]:
    if job.get("init"):
        config, state = load_pretrained(Path(job["init"]))
        model = build_model(config, seed=settings.seed)
        model.load_state_dict(state)
        return model, config
    config = from_plain(ModelConfig, job["model"], "model")
    return build_model(config, seed=settings.seed), config
