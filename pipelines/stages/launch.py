"""How training processes are started and watched. Execution only; nothing here enters a digest."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conf.refusal import Refusal, field
from pipelines.engine.step import Context
from pipelines.training.metrics import RUN_ID


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Where the work runs."""

    backend: Literal["ray", "local"] = "ray"
    """Who runs the steps: Ray, or processes of this machine without it."""
    address: str | None = None
    """Of a running Ray cluster ('auto' or 'host:6379'); null starts a Ray on this machine."""
    ranks: int = 1
    """Training processes; one per GPU where there are GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where this machine has an NVIDIA device, else cpu."""
    cpus_per_rank: int | None = None
    """null: this machine's cores divided by the ranks, at least 1."""
    wait_seconds: float = 600
    """Timeout for a lost machine to return or be replaced; then the run ends with exit code 75."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise Refusal("ranks", self.ranks, "training takes at least one process", f"use {field('ranks')}=1 or more")
        if not 0 <= self.wait_seconds < math.inf:
            raise Refusal("wait_seconds", self.wait_seconds, "must be 0 or more seconds")
        if self.cpus_per_rank is not None and self.cpus_per_rank < 1:
            raise Refusal("cpus_per_rank", self.cpus_per_rank, "a process takes at least one core, or null")

    @property
    def threads(self) -> int:
        """Cores of one rank."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.cpus_per_rank or max(1, cores // self.ranks)

    @property
    def cpus(self) -> int:
        """Cores of all ranks together."""
        return self.ranks * self.threads

    @property
    def gpus_per_rank(self) -> int:
        """1 where training is on GPUs."""
        on_gpu = self.device == "cuda" or (self.device == "auto" and Path("/dev/nvidia0").exists())
        return 1 if on_gpu else 0

    @property
    def gpus(self) -> int:
        """GPUs of all ranks together."""
        return self.ranks * self.gpus_per_rank


VOLATILE = ("metrics.jsonl", "logs/*", "ds_config.json", "run.json", "checkpoints/*")
"""What training writes that is true of one run only (timings, world size, paths); it stays out of the content digest."""


def train_in_ranks(job: dict[str, Any], compute: ComputeSettings, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Run a training job in `compute.ranks` processes, telling progress; returns rank 0's result.

    The job is also written to run.json, with which `torchrun -m pipelines.training run.json` does the same by hand.
    """
    from pipelines.training.job import run_rank

    job = {**job, "url": ctx.url}
    (out_dir / "run.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    watch = Watch(job, out_dir, ctx)
    result: dict[str, Any] = ctx.gang(
        run_rank,
        job,
        workers=compute.ranks,
        cpus_per_worker=compute.threads,
        gpus_per_worker=compute.gpus_per_rank,
        backend="nccl" if compute.gpus_per_rank else "gloo",
        while_waiting=watch.look,
    )
    watch.look()
    return result


class Watch:
    """Turns what the ranks write into progress, and makes new checkpoints durable."""

    def __init__(self, job: dict[str, Any], out_dir: Path, ctx: Context) -> None:
        self._total = int(job["train"]["total_tokens"])
        self._out_dir, self._ctx = out_dir, ctx
        self._inode, self._offset = 0, 0  # of metrics.jsonl: which file it was, and how far it has been read
        self._notes_told = len(self._notes())  # those of an interrupted attempt have been told
        self._kept: set[str] = set()

    def look(self) -> None:
        """Called about once a second."""
        for line in self._notes()[self._notes_told :]:
            self._notes_told += 1
            self._ctx.log(line)
        record = self._newest_record()
        if record is not None:
            mfu = f", {record['mfu']:.0%} MFU" if record.get("mfu") is not None else ""
            self._ctx.progress("trained", record["tokens"], self._total, "tokens", f"loss {record['loss']:.3f}{mfu}")
        for path in sorted((self._out_dir / "checkpoints").glob("step-*")):
            if path.name not in self._kept:
                self._kept.add(path.name)
                # The ranks thin out old checkpoints; one that goes while it is kept has a newer one in its place.
                with contextlib.suppress(FileNotFoundError):
                    self._ctx.keep(f"checkpoints/{path.name}")
                self._ctx.keep("metrics.jsonl")
                if (self._out_dir / "logs" / RUN_ID).exists():  # a resumed attempt elsewhere continues the same run
                    self._ctx.keep(f"logs/{RUN_ID}")

    def _notes(self) -> list[str]:
        path = self._out_dir / "logs" / "notes.txt"
        return (
            path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        )  # what follows is being written

    def _newest_record(self) -> dict[str, Any] | None:
        try:
            with (self._out_dir / "metrics.jsonl").open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # a resumed run cuts its record by a new file in the place of the old one
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return None
        if not whole:
            return None
        self._offset += len(whole) + 1
        newest: dict[str, Any] = json.loads(whole.rsplit(b"\n", 1)[-1])
        return newest
