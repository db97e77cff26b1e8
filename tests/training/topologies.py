"""Runs at one number of ranks after another, in processes of their own; `test_topologies.py` compares what they leave.

    python tests/training/topologies.py SHARDS FOLDER

Every run is 6 steps with a checkpoint after step 3. Its folder is named for how it was run, and for where it began:
`w2-z1-bf16` from nothing, `w2-z1-bf16-from-w1-z0-bf16` from step 3 of another run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from conftest import ROWS_PER_STEP, SEQ_LEN, make_job
from processes import run_ranks

STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")


def run_all(shards: Path, folder: Path) -> None:
    """All runs, under `folder`. Later world sizes begin from checkpoints of earlier ones."""
    for round_, world_size in enumerate((1, 2, 1)):
        run_ranks(_round, world_size, round_, shards, folder)


def _round(round_: int, shards: Path, folder: Path) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    if round_ == 0:
        _plain_loop(shards, folder / "plain.json")
    for precision in PRECISIONS:
        for stage in STAGES:
            if round_ < 2:
                _run(shards, folder, world_size, stage, precision)
                _run(shards, folder, world_size, stage, precision, begin=f"w{world_size}-z{stage}-{precision}")
            if round_ == 1 and precision == "fp32":
                _run(shards, folder, world_size, stage, precision, begin=f"w1-z0-{precision}")
            if round_ == 2 and precision == "fp32" and stage in (1, 3):
                _run(shards, folder, world_size, 0, precision, begin=f"w2-z{stage}-{precision}")


def _run(shards: Path, folder: Path, world_size: int, stage: int, precision: str, begin: str | None = None) -> None:
    from pipelines.training.job import run_rank

    name = f"w{world_size}-z{stage}-{precision}"
    out = folder / (name if begin is None else f"{name}-from-{begin}")
    if begin is not None and int(os.environ["RANK"]) == 0:
        shutil.copytree(folder / begin / "checkpoints" / "step-00000003", out / "checkpoints" / "step-00000003")
        # As if the process had been killed in step 6, after the row of step 5 was written.
        rows = (folder / begin / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(rows[:5]))
    checkpoint = {"every_steps": 3, "every_seconds": None, "keep": 9, "keep_finished": True}
    job = make_job(
        shards,
        out,
        precision=precision,
        # A bucket smaller than the embedding, so that gradients are reduced in several messages.
        zero={"stage": stage, "bucket_elements": 4000},
        micro_batch_rows=4 // world_size,
        checkpoint=checkpoint,
    )
    if world_size > 1 and begin is not None:
        torch.distributed.barrier()  # the checkpoint is there for the other rank too
    run_rank(job)


def _plain_loop(shards: Path, path: Path) -> None:
    """The same training in fp32 by plain PyTorch, whole batches at once: the oracle."""
    from conf.typed import from_plain
    from data.loader import open_loader
    from model.build import build_model
    from model.config import ModelConfig
    from model.init import no_weight_decay
    from pipelines.training.settings import AdamWSettings, ScheduleSettings

    job = make_job(shards, path.parent)
    model = build_model(from_plain(ModelConfig, job["model"]), seed=0)
    spared = no_weight_decay(model)
    named = dict(model.named_parameters())
    optim, schedule = AdamWSettings(lr=3e-3), ScheduleSettings()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in spared], "weight_decay": optim.weight_decay},
            {"params": [p for n, p in named.items() if n in spared], "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
    )
    rows: list[dict[str, Any]] = []
    with open_loader({"made": shards}, rows_per_step=ROWS_PER_STEP, micro_batch_rows=ROWS_PER_STEP) as loader:
        for step in range(6):
            f = schedule.final_fraction
            for group in optimizer.param_groups:
                # Warmup of 2 % of 6 steps is none; cosine over all 6.
                cosine = (1 + torch.cos(torch.tensor(torch.pi * step / 6, dtype=torch.float64)).item()) / 2
                group["lr"] = optim.lr * (f + (1 - f) * cosine)
            (batch,) = next(loader).micro_batches
            out = model(**batch)
            loss = out["loss_sum"] / (batch["targets_BT"] != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            rows.append({"loss": loss.item(), "grad_norm": norm.item(), "tokens": (step + 1) * ROWS_PER_STEP * SEQ_LEN})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), Path(sys.argv[2]))
