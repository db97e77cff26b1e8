"""`athanor train`: the pretrain step in the processes torchrun started, for places where no Ray can be installed.

    torchrun --nproc-per-node=2 -m pipelines train experiment=text corpus.paths=[DIR]
    python -m pipelines train experiment=demo                        # one process

Rank 0 drives: it makes the inputs with the local backend, takes the lease, publishes. When the engine asks for a gang, the
ranks that are waiting are it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipelines.console import display as console
from pipelines.engine import runner
from pipelines.engine.backends.base import Log, Poll
from pipelines.engine.backends.gang import Gang
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.store.open import open_store
from pipelines.execution import get_step
from pipelines.graph import build
from pipelines.settings.derive import Settings
from pipelines.training.ranks import leave

INPUTS_MAY_TAKE = timedelta(days=2)  # how long the other ranks wait while rank 0 makes a large corpus


class TorchrunBackend(LocalBackend):
    """The local backend, whose gang is the processes that are there already."""

    def gang(self, gang: Gang, *, poll: Poll = lambda: None, log: Log = lambda line: None, again: bool = False) -> Any:
        """Run this process's own rank: torchrun has started the others."""
        dist.broadcast_object_list([gang.fn, gang.config], src=0, device=torch.device("cpu"))
        return gang.fn(gang.config)


def pretrain(settings: Settings) -> int:
    """Make the pretrain artifact; every rank calls this. Returns the exit code."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    settings = replace(settings, compute=replace(settings.compute, ranks=world_size))
    settings.check_sizes(["pretrain"])
    if world_size > 1:
        gloo_too = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(gloo_too, timeout=INPUTS_MAY_TAKE)
    if rank > 0:
        return _follow()
    step = get_step(build(settings), "pretrain")
    backend = TorchrunBackend() if world_size > 1 else LocalBackend(in_process=True)
    try:
        with console.Display() as display:
            reports = runner.run([step], store=open_store(settings.store), backend=backend, on_event=display.event)
    finally:
        if world_size > 1:
            dist.broadcast_object_list([None, None], src=0, device=torch.device("cpu"))
    out = console.console()
    out.print(console.summary(reports))
    if world_size > 1:
        leave()
    return 0


def _follow() -> int:
    """What ranks other than 0 do: each call of a gang that rank 0 makes, until it makes none."""
    while True:
        call: list[Any] = [None, None]
        dist.broadcast_object_list(call, src=0, device=torch.device("cpu"))
        if call[0] is None:
            leave()
        call[0](call[1])
