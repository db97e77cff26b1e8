"""A model with experts trained by two ranks, under each stage that shares and with experts shared out, and by four;
`test_experts.py` compares what they leave. FOLDER has a run of one process already, `alone`, with its checkpoints.

python -m tests.training.expert_ranks SHARDS FOLDER
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from tests.training.conftest import MODEL, make_job
from tests.training.processes import run_ranks

EXPERTS = {
    "kind": "moe",
    "n_experts": 4,
    "d_ff": 24,
    "shared_d_ff": 16,
    "router": {"jitter": 0.1, "second_by_chance": True},
    "balance": {"loss": 0.1, "z_loss": 0.01, "bias_rate": 0.002},
    "capacity": {"factor": 1.25},
}
"""Everything that could depend on how rows are shared out, at once."""

MOE = {**MODEL, "ffn": {"kind": "dense", "d_ff": 56}, "pattern": [{"every": 2, "first": 1, "ffn": EXPERTS}]}


def experts_job(make: Callable[..., dict[str, Any]], *args: Any, **settings: Any) -> dict[str, Any]:
    # An odd number of equal steps up or down never leaves a bias at nothing.
    return {**make(*args, steps=5, precision="fp32", **settings), "model": MOE}


def ranks_run(shards: Path, folder: Path) -> None:
    """One of two ranks, through all stages that share; or of four, where two hold all experts and two are their replica."""
    from pipelines.training.job import run_rank

    if os.environ["WORLD_SIZE"] == "4":
        zero = {"stage": 1, "expert_parallel": 2}
        run_rank(experts_job(make_job, shards, folder / "four", zero=zero, micro_batch_rows=1))
        return
    for stage in (1, 2, 3):
        # Two micro-batches on each rank, recomputed in stage 2.
        settings = {"zero": {"stage": stage}, "micro_batch_rows": 2, "recompute": stage == 2}
        run_rank(experts_job(make_job, shards, folder / f"z{stage}", **settings))
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16")):
        zero = {"stage": stage, "expert_parallel": 2}
        job = experts_job(make_job, shards, folder / f"e{stage}-{precision}", zero=zero, micro_batch_rows=2)
        job["train"] |= {"precision": precision, "recompute": stage == 2, "checkpoint": CHECKPOINTS}
        run_rank(job)
    for begin, zero in (("alone", {"stage": 0, "expert_parallel": 2}), ("e1-fp32", {"stage": 1})):
        if os.environ["RANK"] == "0":
            copied(folder / begin, folder / f"from-{begin}")
        torch.distributed.barrier()
        job = experts_job(make_job, shards, folder / f"from-{begin}", zero=zero, micro_batch_rows=2)
        run_rank({**job, "train": {**job["train"], "checkpoint": CHECKPOINTS}})


CHECKPOINTS = {"every_steps": 3, "every_seconds": None, "keep": 9, "keep_finished": True}


def copied(begin: Path, out: Path) -> None:
    """A run that has come as far as step 3 of another."""
    shutil.copytree(begin / "checkpoints" / "step-00000003", out / "checkpoints" / "step-00000003")
    rows = (begin / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:3]))


if __name__ == "__main__":
    for ranks in (2, 4):
        run_ranks(ranks_run, ranks, Path(sys.argv[1]), Path(sys.argv[2]))
