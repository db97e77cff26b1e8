"""The processes of one run: who I am, where I compute, and the few numbers ranks tell each other."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from conf.refusal import Refusal
from pipelines.training.settings import TrainSettings

MPI = ("OMPI_", "PMIX_", "PMI_", "MV2_")
"""Set by an mpirun in whose shell the run was started: DeepSpeed would compare its ranks with ours, and fail."""


@dataclass(frozen=True)
class Ranks:
    """One process of `world_size`, as launched by Ray, torchrun or nobody."""

    rank: int
    world_size: int
    device: torch.device
    threads: int
    counts_group: dist.ProcessGroup | None = None
    """Group for CPU tensors; None where there is nobody to talk to, or where the default group takes them."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[n] on the CPU in every rank -> [world_size, n] in rank order, the same everywhere."""
        if self.world_size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values, group=self.counts_group)
        return torch.stack(rows)

    def gather_objects(self, value: object) -> list[object]:
        """Any picklable value of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.counts_group)
        return values

    def agree(self, refusal: Refusal | None) -> None:
        """Raise in every rank what one of them refuses, so that none is left waiting."""
        for refused in self.gather_objects(refusal):
            if isinstance(refused, Refusal):
                raise refused

    def total(self, value: int) -> int:
        """Sum over ranks."""
        return int(self.gather(torch.tensor([value], dtype=torch.int64)).sum())

    def wait(self) -> None:
        """Until every rank has come here."""
        self.total(0)


def join(settings: TrainSettings) -> Ranks:
    """Take this process's place among the ranks: device, threads, process group.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_*, as torchrun and Ray Train set them; without them
    this is a run of one process. A process group that is there already is used. Raises Refusal for a GPU asked
    for where there is none.
    """
    for name in [name for name in os.environ if name.startswith(MPI)]:
        del os.environ[name]
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    device = _device(settings.device, local_rank)
    threads = _take_threads(settings.threads, local_world_size)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if world_size == 1:
            dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, rank=rank, world_size=world_size)
    # DeepSpeed reads these even where a process group exists.
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank)):
        os.environ.setdefault(name, str(value))
    os.environ["LOCAL_SIZE"] = str(local_world_size)
    # Ray starts an nccl group that takes no CPU tensors; every rank comes here, so each can make the second group.
    counts_group = (
        dist.new_group(backend="gloo") if world_size > 1 and "gloo" not in str(dist.get_backend_config()) else None
    )
    return Ranks(rank, world_size, device, threads, counts_group)


def leave(code: int = 0) -> NoReturn:
    """End this process, a rank whose work is done: leave the process group, then exit at once.

    The group's threads drop the tensors of the last collective some time after it returned, and need the interpreter for
    it. A rank that ended meanwhile was seen to abort ("terminate called without an active exception"), and whoever
    launched it then calls a finished run failed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _device(wanted: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise Refusal(
            "compute.device",
            wanted,
            "this process sees no GPU (torch.cuda.is_available() is false)",
            "run where there is one, install a CUDA build of torch, or use compute.device=cpu",
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    # Ray shows each worker its own GPU only, torchrun shows all of them.
    device = torch.device("cuda", local_rank if local_rank < torch.cuda.device_count() else 0)
    torch.cuda.set_device(device)
    # A resumed run is to repeat every bit, and some GPU kernels add in whatever order threads finish.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def _take_threads(wanted: int | None, local_world_size: int) -> int:
    if wanted is None and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = wanted or max(1, cores // local_world_size)
    torch.set_num_threads(threads)
    return threads
