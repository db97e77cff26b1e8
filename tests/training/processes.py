"""Several ranks of one machine, each a process of one thread; what scripts of the tests beside it run in."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from pipelines.training.preload import modules


def run_ranks(fn: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """`fn(*arguments)` in every rank, which finds RANK and the rest in its environment. Raises what a rank raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(list(modules()))  # a rank by itself imports for four seconds
    torch.multiprocessing.start_processes(
        _rank, (world_size, port, fn, arguments), nprocs=world_size, start_method="forkserver"
    )


def _rank(rank: int, world_size: int, port: int, fn: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ.update(OMPI_COMM_WORLD_LOCAL_RANK="7", PMI_RANK="7")  # of an mpirun in whose shell this was started
    torch.set_num_threads(1)
    from pipelines.training.ranks import leave

    fn(*arguments)
    torch.distributed.barrier()
    leave()
