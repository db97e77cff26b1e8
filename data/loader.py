"""Batches for one rank: an order, read ahead in a thread, whose whole state is the number of rows consumed."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.refusal import NO_VALUE, Refusal
from data.batch import Batch, collate, row_hashes
from data.mixture import MixtureSettings
from data.order import Order, OrderSettings, SourceShape
from data.rows.shard_set import ShardSet, gather
from data.tasks.objectives import NextToken, Objective

LOCATED_ROWS = 2048  # rows the order is asked for at once: a call costs the same for one as for hundreds
TOKENS_AT_ONCE = 32_768  # what is turned into tensors together, so that the arrays stay in the cache


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One rank's part of one global batch.

    micro_batches  what forward takes, `micro_batch_rows` rows each
    row_hashes     one per row of this rank; `combine_digest` of all ranks' hashes (or sums of them) is the batch digest
    first_row      the global row this step begins with
    rows, tokens   of the whole step, all ranks together
    target_count   targets that are not ignored, this rank
    data_seconds   how long the caller waited for it
    """

    micro_batches: list[Batch]
    row_hashes: npt.NDArray[np.uint64]
    first_row: int
    rows: int
    tokens: int
    target_count: int
    data_seconds: float = 0.0


class Loader:
    """An endless iterator of StepBatch. Close it, or use it as a context manager, to end its thread early."""

    def __init__(
        self,
        shard_sets: Mapping[str, ShardSet],
        *,
        order: Order,
        rows_per_step: int,
        micro_batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
        objective: Objective | None = None,
        start_row: int = 0,
        prefetch_steps: int = 2,
    ) -> None:
        """Raises Refusal where the rows cannot be shared out evenly, or are fewer than one step takes."""
        check_division(rows_per_step, world_size=world_size, micro_batch_rows=micro_batch_rows)
        if not 0 <= rank < world_size:
            raise Refusal("rank", rank, f"must lie between 0 and world_size - 1 = {world_size - 1}")
        _check_size(shard_sets, rows_per_step)
        self.rows_consumed = start_row
        self._reader = StepReader(
            shard_sets=shard_sets,
            order=order,
            objective=objective or NextToken(),
            rows_per_step=rows_per_step,
            micro_batch_rows=micro_batch_rows,
            rank=rank,
            world_size=world_size,
        )
        self._prefetch_steps = prefetch_steps
        self._ready: queue.Queue[StepBatch | BaseException] | None = None
        self._stop = threading.Event()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        """The next step. Raises what reading raised, such as Refusal for a corrupted block."""
        began = time.perf_counter()
        if self._ready is None:
            self._ready = self._start()
        step = self._ready.get()
        if isinstance(step, BaseException):
            self._ready = None
            raise step
        self.rows_consumed = step.first_row + step.rows
        return replace(step, data_seconds=time.perf_counter() - began)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on: the rows consumed, and a digest of what they were rows of."""
        return {"rows_consumed": self.rows_consumed, "digest": self._reader.digest()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after `state`. Raises Refusal where it was taken over other shards or another order."""
        digest = self._reader.digest()
        if state["digest"] != digest:
            raise Refusal(
                "saved position",
                NO_VALUE,
                f"is of other data: its digest is {state['digest']}, and these shards in this order have {digest}",
                "give the shards, mixture and seed the run began with, or begin a new run",
            )
        self.close()
        self.rows_consumed = int(state["rows_consumed"])

    def close(self) -> None:
        """End the thread. The loader may be used again and goes on where it was."""
        self._stop.set()
        self._stop, self._ready = threading.Event(), None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> queue.Queue[StepBatch | BaseException]:
        ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=self._prefetch_steps)
        # The thread holds no reference to the loader, so dropping the loader ends the thread.
        weakref.finalize(self, self._stop.set)
        threading.Thread(
            target=_read_ahead,
            args=(self._reader.steps(self.rows_consumed), ready, self._stop),
            name="athanor-loader",
            daemon=True,
        ).start()
        return ready


def open_loader(
    directories: Mapping[str, Path],
    *,
    rows_per_step: int,
    micro_batch_rows: int,
    rank: int = 0,
    world_size: int = 1,
    order: OrderSettings | None = None,
    mixture: MixtureSettings | None = None,
    start_row: int = 0,
) -> Loader:
    """A loader over shard folders by source name. Picklable arguments only, so every rank can call it for itself."""
    shard_sets = {name: ShardSet.open(path) for name, path in directories.items()}
    return Loader(
        shard_sets,
        order=order_over(shard_sets, order=order, mixture=mixture),
        rows_per_step=rows_per_step,
        micro_batch_rows=micro_batch_rows,
        rank=rank,
        world_size=world_size,
        start_row=start_row,
    )


def order_over(
    shard_sets: Mapping[str, ShardSet], *, order: OrderSettings | None = None, mixture: MixtureSettings | None = None
) -> Order:
    """The order of a run over these sources. Raises Refusal where their rows differ in length."""
    lengths = {name: shards.seq_len for name, shards in shard_sets.items()}
    if len(set(lengths.values())) != 1:
        rule = f"the sources have rows of different seq_len: {lengths}"
        raise Refusal("shards", NO_VALUE, rule, "write all with the same seq_len")
    shapes = {
        name: SourceShape(rows=shards.rows, rows_per_block=shards.rows_per_block) for name, shards in shard_sets.items()
    }
    return Order(shapes, seq_len=next(iter(lengths.values())), settings=order, mixture=mixture)


@dataclass(frozen=True, kw_only=True)
class StepReader:
    """The function from a step's first row to this rank's part of it."""

    shard_sets: Mapping[str, ShardSet]
    order: Order
    objective: Objective
    rows_per_step: int
    micro_batch_rows: int
    rank: int
    world_size: int

    def steps(self, first_row: int) -> Iterator[StepBatch]:
        """The steps from global row `first_row` on, without end."""
        rows_per_rank = self.rows_per_step // self.world_size
        at_once = max(1, LOCATED_ROWS // rows_per_rank)
        step_rows = np.arange(self.rank, self.rows_per_step, self.world_size)
        while True:
            firsts = first_row + self.rows_per_step * np.arange(at_once)
            rows = (firsts[:, None] + step_rows).reshape(-1)
            located = self.order.locate(rows)
            for i in range(at_once):
                mine = slice(i * rows_per_rank, (i + 1) * rows_per_rank)
                yield self._read(int(firsts[i]), rows[mine], located.source[mine], located.row[mine])
            first_row += at_once * self.rows_per_step

    def digest(self) -> str:
        """Changes with the shards, the order and the objective; not with ranks, micro-batches or step size."""
        parts = [self.order.digest, repr(self.objective), *(shards.digest for shards in self.shard_sets.values())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _read(
        self,
        first_row: int,
        global_rows: npt.NDArray[np.int64],
        source: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> StepBatch:
        shard_sets = list(self.shard_sets.values())
        seq_len = shard_sets[0].seq_len
        group = self.micro_batch_rows * max(1, TOKENS_AT_ONCE // (seq_len * self.micro_batch_rows))
        micro_batches: list[Batch] = []
        hashes = []
        target_count = 0
        for start in range(0, len(rows), group):
            part = slice(start, start + group)
            examples = self.objective(gather(shard_sets, source[part], rows[part]), global_rows[part])
            hashes.append(row_hashes(examples, global_rows[part]))
            target_count += int(np.count_nonzero(examples.targets_RT >= 0))
            for row in range(0, len(examples.tokens_RT), self.micro_batch_rows):
                micro_batches.append(collate(examples, row, row + self.micro_batch_rows))
        return StepBatch(
            micro_batches=micro_batches,
            row_hashes=np.concatenate(hashes),
            first_row=first_row,
            rows=self.rows_per_step,
            tokens=self.rows_per_step * seq_len,
            target_count=target_count,
        )


def check_division(rows_per_step: int, *, world_size: int, micro_batch_rows: int) -> None:
    """Raise Refusal unless a step's rows share out evenly over ranks and micro-batches."""
    unit = world_size * micro_batch_rows
    if rows_per_step >= 1 and micro_batch_rows >= 1 and rows_per_step % unit == 0:
        return
    if rows_per_step < world_size:
        raise Refusal(
            "global batch",
            NO_VALUE,
            f"{rows_per_step} rows cannot feed {world_size} ranks, as each needs at least one",
            f"use at most {max(rows_per_step, 1)} ranks, or a global batch of at least {world_size} rows",
        )
    if micro_batch_rows < 1:
        raise Refusal("micro_batch_rows", micro_batch_rows, "must be at least 1")
    below, above = rows_per_step // unit * unit, -(-rows_per_step // unit) * unit
    nearest = " or ".join(str(rows) for rows in (below, above) if rows)
    per_rank = rows_per_step // world_size
    fitting = [str(m) for m in range(1, per_rank + 1) if rows_per_step % (world_size * m) == 0]
    other = f", or micro_batch_rows of {', '.join(fitting[-6:])}" if fitting else ""
    raise Refusal(
        "global batch",
        NO_VALUE,
        f"{rows_per_step} rows do not divide over world_size {world_size} x micro_batch_rows {micro_batch_rows} = {unit} "
        "rows",
        f"use a global batch of {nearest} rows (times seq_len in tokens){other}",
    )


def _check_size(shard_sets: Mapping[str, ShardSet], rows_per_step: int) -> None:
    rows = sum(shards.rows for shards in shard_sets.values())
    if rows < rows_per_step:
        seq_len = next(iter(shard_sets.values())).seq_len
        raise Refusal(
            "corpus",
            NO_VALUE,
            f"is too small for one batch: it packs into {rows} rows of {seq_len} tokens, and one global batch takes "
            f"{rows_per_step}",
            f"give more text, a shorter seq_len, or a global batch of at most {rows * seq_len} tokens",
        )


def _read_ahead(
    steps: Iterator[StepBatch], ready: queue.Queue[StepBatch | BaseException], stop: threading.Event
) -> None:
    item: StepBatch | BaseException
    while not stop.is_set():
        try:
            item = next(steps)
        except BaseException as error:  # handed to the caller's thread, whatever it is
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
