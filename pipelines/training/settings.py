"""What a training run can be told: values and their rules, no tensor and no torch.

A field marked execution says where or how fast a run goes and never what comes out of it, so it enters no digest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from conf.refusal import Refusal, shown
from conf.refusal import field as key
from conf.typed import default_of

_EXECUTION: Any = {"execution": True}
Rate = float | Literal["auto"]
"""A peak learning rate, or `auto`: derived from the model by `training/rates.py` before anything is identified or run."""


@dataclass(frozen=True, kw_only=True)
class _AdamSettings:
    """What both optimizers take."""

    lr: Rate = 6e-4
    """Peak learning rate, which the schedule scales; auto: from the model's kind and width."""
    embedding_lr: Rate | None = None
    """The same for embeddings; null takes lr."""
    head_lr: Rate | None = None
    """The same for a head that is not tied to the embeddings; null takes lr."""
    beta1: float = 0.9
    """Decay of the mean of gradients, per step."""
    beta2: float = 0.95
    """Decay of the mean of their squares, per step."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    weight_decay: float = 0.1
    """Of matrices and heads, per step and learning rate; norms, biases and embeddings take none."""

    def __post_init__(self) -> None:
        _require(self, "lr", _is_rate(self.lr), "a learning rate above 0, or auto")
        for name in ("embedding_lr", "head_lr"):
            rate = getattr(self, name)
            _require(self, name, rate is None or _is_rate(rate), "a learning rate above 0, auto, or null for lr")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(self, name, 0 <= value < 1, "a fraction from 0 to below 1")
        _require(self, "eps", self.eps > 0, "above 0")
        _require(self, "weight_decay", self.weight_decay >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class AdamWSettings(_AdamSettings):
    """AdamW (Loshchilov & Hutter, 2019) for every parameter."""

    kind: Literal["adamw"] = "adamw"
    """AdamW for every parameter."""


@dataclass(frozen=True, kw_only=True)
class MuonSettings(_AdamSettings):
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW with the fields above for the rest.

    Updates are scaled as by Moonlight (2025). Only with ZeRO stage 0, where each rank sees whole matrices.
    """

    kind: Literal["muon"] = "muon"
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrix_lr: Rate = 2e-3
    """Peak learning rate of the matrices, in AdamW's units: updates are scaled to its usual root mean square."""
    expert_lr: Rate | None = field(default=None, metadata={"absent_at_default": True})
    """Of routers, experts and other weights of several axes that Muon does not take; null takes lr."""
    momentum: float = 0.95
    """Decay of the matrices' mean gradient, per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "matrix_lr", _is_rate(self.matrix_lr), "a learning rate above 0, or auto")
        rate = self.expert_lr
        _require(self, "expert_lr", rate is None or _is_rate(rate), "a learning rate above 0, auto, or null for lr")
        _require(self, "momentum", 0 <= self.momentum < 1, "a fraction from 0 to below 1")


OptimSettings = AdamWSettings | MuonSettings


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How the learning rate moves: up linearly, then along `shape` to `final_fraction` of the peak."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Course from the peak to the end; wsd: stable, then a linear tail."""
    warmup_fraction: float = 0.02
    """Share of all steps with a rising rate."""
    decay_fraction: float = 0.2
    """Share of all steps in the tail of wsd."""
    final_fraction: float = 0.1
    """Last learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
            value = getattr(self, name)
            _require(self, name, 0 <= value <= 1, "a fraction from 0 to 1")
        if self.shape == "wsd":
            both = self.warmup_fraction + self.decay_fraction
            rule = (
                f"at most 1 together with {key('decay_fraction')} = {self.decay_fraction}, as both are parts of the run"
            )
            left = math.floor(1e4 * (1 - self.decay_fraction)) / 1e4
            _require(self, "warmup_fraction", both <= 1, rule, f"set {key('warmup_fraction')}={left}")


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """What DeepSpeed's ranks share out."""

    stage: int = 0
    """What DeepSpeed's ranks share out: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    bucket_elements: int = 50_000_000
    """Elements reduced or gathered in one message."""
    expert_parallel: int = 1
    """Ranks that hold the experts of each layer together; 1: each rank holds all. In stages 0 to 2."""

    def __post_init__(self) -> None:
        _require(self, "stage", self.stage in (0, 1, 2, 3), "0, 1, 2 or 3")
        _require(self, "bucket_elements", self.bucket_elements > 0, "a count above 0")
        _require(self, "expert_parallel", self.expert_parallel >= 1, "a number of ranks, at least 1")
        if self.expert_parallel > 1 and self.stage == 3:
            raise Refusal(
                "expert_parallel",
                self.expert_parallel,
                f"with {key('stage')} = 3 DeepSpeed clips by the norm of what it holds itself, and shared-out experts are "
                "not among that",
                f"set {key('stage')}=2, or {key('expert_parallel')}=1",
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When a run saves itself: by steps or by time, whichever comes first."""

    every_steps: int | None = None
    """Steps between checkpoints; null: not by steps."""
    every_seconds: float | None = 300.0
    """Seconds between checkpoints; null: not by time."""
    keep: int = 2
    """Checkpoints that stay, the newest."""
    keep_finished: bool = False
    """Keep them after the weights are written (12 bytes a parameter each), to train on from there."""

    def __post_init__(self) -> None:
        _require(self, "keep", self.keep >= 1, "at least 1: a resumed run needs one")
        for name in ("every_steps", "every_seconds"):
            value = getattr(self, name)
            _require(self, name, value is None or value > 0, "above 0, or null for never")


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Weights & Biases beside `metrics.jsonl`, which is always written."""

    mode: Literal["auto", "online", "offline", "off"] = "off"
    """auto: online where a key is set (WANDB_API_KEY or wandb login), else offline; says which."""
    project: str = "athanor"
    """Project of the runs."""
    entity: str | None = None
    """Team or user; null: the key's own."""
    group: str | None = None
    """Group of the runs; null: the experiment."""
    name: str | None = None
    """Name of the run; null: experiment, step and digest."""
    tags: tuple[str, ...] = ()
    """Tags beside the experiment and the step."""
    about: dict[str, str] = field(default_factory=dict)
    """What else stands in the run's configuration."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run. Tokens are positions of packed rows: rows times seq_len."""

    total_tokens: int
    """Tokens (positions of packed rows) to train on, in whole global batches."""
    global_batch_tokens: int
    """Tokens of one optimizer step over all ranks; micro-batch and accumulation follow."""
    seed: int = 0
    """Seed of initial weights and dropout."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: fp32 weights, gradients and sums, matrix products in bf16."""
    saved_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the finished weights; checkpoints are fp32 always."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; null: not clipped."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """After a gradient with inf or NaN, which is never applied: stop, or skip and count it."""
    optim: OptimSettings = field(default_factory=AdamWSettings)
    """The optimizer."""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """The learning rate's course."""

    on_divergence: Literal["stop", "warn"] = field(default="stop", metadata=_EXECUTION)
    """Whether a run stops, saved, whose loss is above a uniform guess after warmup or far above its start."""
    zero: ZeroSettings = field(default_factory=ZeroSettings, metadata=_EXECUTION)
    """What ranks share out."""
    micro_batch_rows: int | None = field(default=None, metadata=_EXECUTION)
    """Rows of one forward pass on one rank; null: the most that divide and fit."""
    recompute: bool = field(default=False, metadata=_EXECUTION)
    """Forget activations inside blocks and compute them again: less memory, a third more work."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=_EXECUTION)
    """Where ranks compute."""
    threads: int | None = field(default=None, metadata=_EXECUTION)
    """Cores of one rank; null: shared out."""
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata=_EXECUTION)
    """torch.compile of blocks and loss; auto: where a C++ compiler exists and the run is long enough."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings, metadata=_EXECUTION)
    """When the run saves itself."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings, metadata=_EXECUTION)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        batch = self.global_batch_tokens
        _require(self, "global_batch_tokens", batch > 0, "above 0", "give a multiple of shards.seq_len")
        rule = f"at least one global batch, which is {batch:,} tokens ({key('global_batch_tokens')})"
        remedy = f"set {key('total_tokens')}={batch} or more"
        _require(self, "total_tokens", self.total_tokens >= batch, rule, remedy)
        _require(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0, or null")
        for name in ("micro_batch_rows", "threads"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "at least 1, or null to have it derived")
        if self.optim.kind == "muon" and self.zero.stage != 0:
            raise Refusal(
                "zero.stage",
                self.zero.stage,
                "Muon (optim.kind) orthogonalizes whole matrices, and from stage 1 on a rank holds pieces of them",
                "set zero.stage=0, or optim=adamw",
            )

    def identity(self) -> TrainSettings:
        """These settings with every execution field at its default: equal for runs that make the same thing."""
        return replace(self, **{f.name: default_of(f) for f in fields(self) if f.metadata.get("execution")})


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How one global batch is shared out; every number follows from the settings, seq_len and the world size."""

    seq_len: int
    world_size: int
    rows_per_step: int
    micro_batch_rows: int
    accumulation: int
    total_steps: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update, over all ranks and micro-batches."""
        return self.rows_per_step * self.seq_len

    @classmethod
    def derive(cls, settings: TrainSettings, *, seq_len: int, world_size: int, largest_rows: int) -> BatchPlan:
        """`largest_rows`: the most rows one forward pass may take where `micro_batch_rows` is null.

        Raises Refusal where a division leaves a remainder.
        """
        tokens = settings.global_batch_tokens
        rows, rest = divmod(tokens, seq_len)
        if rest or rows < 1:
            below = max(rows, 1) * seq_len
            raise Refusal(
                "global_batch_tokens",
                tokens,
                f"a global batch is a whole number of rows, so seq_len = {seq_len:,} must divide it",
                f"use for example {key('global_batch_tokens')}={below} or {below + seq_len}",
            )
        local_rows, rest = divmod(rows, world_size)
        if rest or local_rows < 1:
            fitting = max(local_rows, 1) * world_size * seq_len
            raise Refusal(
                "global_batch_tokens",
                tokens,
                f"{rows:,} rows of {seq_len:,} are shared by {world_size} ranks, and each takes equally many whole rows",
                f"use {key('global_batch_tokens')}={fitting}, or a number of ranks that divides {rows:,}",
            )
        micro = settings.micro_batch_rows or _largest_divisor(local_rows, at_most=largest_rows)
        if local_rows % micro:
            raise Refusal(
                "micro_batch_rows",
                micro,
                f"micro-batches are equal, so it must divide the {local_rows} rows of a rank and step "
                f"({key('global_batch_tokens')} / seq_len / ranks)",
                f"use {key('micro_batch_rows')}={_largest_divisor(local_rows, at_most=micro)}, or null",
            )
        return cls(
            seq_len=seq_len,
            world_size=world_size,
            rows_per_step=rows,
            micro_batch_rows=micro,
            accumulation=local_rows // micro,
            total_steps=settings.total_tokens // tokens,
        )


def largest_batch(settings: TrainSettings, rows: int, *, seq_len: int, world_size: int) -> int:
    """Tokens of the largest global batch of at most so many rows that `BatchPlan.derive` takes; 0 where none does."""
    smallest = world_size * (settings.micro_batch_rows or 1)
    return rows // smallest * smallest * seq_len


LARGEST_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Of one forward pass where nothing is set: beyond these, rows only cost memory."""


def largest_rows(seq_len: int, row_bytes: int = 0, once_bytes: int = 0, *, gpu_bytes: int | None = None) -> int:
    """Rows of a forward pass: at most LARGEST_TOKENS, on a GPU with activations in at most half of its memory.

    row_bytes: of each row. once_bytes: of the pass, however many rows it has; both as `model.costs` has them.
    """
    if gpu_bytes is None:
        return max(1, LARGEST_TOKENS["cpu"] // seq_len)
    fit = (gpu_bytes // 2 - once_bytes) // max(1, row_bytes)
    return max(1, min(LARGEST_TOKENS["cuda"] // seq_len, fit))


def _largest_divisor(number: int, *, at_most: int) -> int:
    return next(k for k in range(max(1, min(number, at_most)), 0, -1) if number % k == 0)


def _is_rate(value: float | str) -> bool:
    return value == "auto" or (not isinstance(value, str) and value > 0)


def _require(settings: object, name: str, holds: bool, rule: str, remedy: str = "") -> None:
    """Refuse a field unless it `holds` its rule; the remedy is its default where none is given."""
    if not holds:
        remedy = remedy or f"set {key(name)}={shown(getattr(type(settings), name))}"
        raise Refusal(name, getattr(settings, name), f"it must be {rule}", remedy)
