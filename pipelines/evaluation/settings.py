"""What the evaluate stage can be told, and where its tasks lie. Light: every command that only plans imports it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.engine.step import EngineError
from pipelines.evaluation.task_files import read_tasks
from pipelines.inference.generator import GenerateSettings
from pipelines.training.settings import TrackingSettings

TASK_INTERVALS = (
    "Tasks: the harness's own figures. In brackets 95 %: Wilson's for shares of right answers, else the bootstrap through "
    "the harness's aggregation; over whole documents where they gave several examples. Chance: what random answers score."
)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Completions kept for the eye: the same prompts and seed for every model."""

    prompts: tuple[str, ...] = ()
    """Texts to continue."""
    questions: tuple[str, ...] = ()
    """User messages, asked through the chat template."""
    generation: GenerateSettings = field(default_factory=lambda: GenerateSettings(max_new_tokens=96, temperature=0.5))


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What is measured, on how much, and how precisely."""

    max_documents: int | None = None
    max_bytes: int | None = 4_000_000
    """Caps on the held-out documents scored, which are taken in the order of their ids (hashes of their content)."""
    context_tokens: int | None = None
    """Longest window; null: as long as the rows of the shards, at most the model's max_seq_len."""
    stride_tokens: int | None = None
    """New tokens scored per window; null: half the window. A whole window: half the work, a slightly worse score."""
    precision: Literal["fp32", "bf16"] = "fp32"
    bootstrap_resamples: int = 1000
    seed: int = 0
    compressors: tuple[Literal["gzip", "xz"], ...] = ("gzip", "xz")
    tasks: tuple[str, ...] = ()
    """lm-evaluation-harness tasks, groups or tags: names of YAML files in conf/evaluate/tasks or in task_folders."""
    task_folders: tuple[str, ...] = field(default=(), metadata={"execution": True, "path": True})
    """Where else to look for tasks. What counts is what is in their files, which enter the step's digest."""
    task_examples: int = 100
    """Examples of a task made from held-out documents; a task that brings its own data uses all of it."""
    samples: SampleSettings = field(default_factory=SampleSettings)
    bytes_per_shard: int = 250_000
    """Text scored by one worker task."""
    tokens_per_batch: int = field(default=8192, metadata={"execution": True})
    gpus_per_task: float = field(default=0, metadata={"execution": True})
    tracking: TrackingSettings = field(default_factory=TrackingSettings, metadata={"execution": True})

    def __post_init__(self) -> None:
        counts = ("max_documents", "max_bytes", "context_tokens", "stride_tokens", "bootstrap_resamples")
        for name in (*counts, "task_examples", "bytes_per_shard", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1; leave it out for the default.")

    def windows(self, max_seq_len: int, trained_tokens: int | None) -> tuple[int, int]:
        """Context and stride in tokens for a model of `max_seq_len`, trained on rows of `trained_tokens`. Raises
        EngineError where it was not made for such a window, or windows would skip some tokens."""
        context = self.context_tokens or min(max_seq_len, trained_tokens or max_seq_len)
        stride = self.stride_tokens or max(1, context // 2)
        if context > max_seq_len:
            raise EngineError(
                f"evaluate.context_tokens = {context}: the model was made for {max_seq_len} tokens; choose at most that."
            )
        if stride > context:
            raise EngineError(
                f"evaluate.stride_tokens = {stride}: windows of {context} tokens would skip some; choose at most {context}."
            )
        return context, stride


def task_files(settings: EvaluateSettings) -> tuple[Path, ...]:
    """Every file that the tasks read, for the step's digest: their YAML, its includes, their data.

    Raises EngineError for a task that is not there or cannot be run.
    """
    return tuple(read_tasks(settings.tasks, settings.task_folders).files)
