"""A model with experts trained by two ranks, under each stage that shares; `test_experts.py` compares what they leave.

python -m tests.training.expert_ranks SHARDS FOLDER
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from tests.training.conftest import MODEL, make_job

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


def ranks_run(rank: int, port: int, shards: Path, folder: Path) -> None:
    """One of two ranks, through all stages that share."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from pipelines.training.job import run_rank

    for stage in (1, 2, 3):
        # Two micro-batches on each rank, recomputed in stage 2.
        settings = {"zero": {"stage": stage}, "micro_batch_rows": 2, "recompute": stage == 2}
        run_rank(experts_job(make_job, shards, folder / f"z{stage}", **settings))
    torch.distributed.barrier()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        free_port = free.getsockname()[1]
    torch.multiprocessing.spawn(ranks_run, (free_port, Path(sys.argv[1]), Path(sys.argv[2])), nprocs=2)
