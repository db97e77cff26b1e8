"""What the evaluate stage can be told, and where its tasks lie. Light: every command that only plans imports it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from conf.refusal import Refusal
from pipelines.evaluation.task_files import read_tasks
from pipelines.inference.generator import GenerateSettings
from pipelines.training.settings import TrackingSettings

TASK_INTERVALS = (
    "Tasks: the harness's own figures. In brackets 95 %: Wilson's for shares of right answers, else the bootstrap through "
    "the harness's aggregation; over whole documents where they gave several examples. Chance: what random answers score."
)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Samples of text from the model: the same prompts and seed for every model."""

    prompts: tuple[str, ...] = ()
    """Texts to continue."""
    questions: tuple[str, ...] = ()
    """User messages, each answered through the chat template."""
    generation: GenerateSettings = field(default_factory=lambda: GenerateSettings(max_new_tokens=96, temperature=0.5))
    """How completions and answers are generated."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What is measured, on how much, and how precisely."""

    max_documents: int | None = None
    """Most held-out documents that are scored, in the order of their ids (hashes of their content); null: all."""
    max_bytes: int | None = 4_000_000
    """Most bytes of held-out text that are scored; null: all."""
    context_tokens: int | None = None
    """Tokens of the longest window; null: the length of the training rows, at most the model's max_seq_len."""
    stride_tokens: int | None = None
    """New tokens scored per window; null: half the window. A whole window: half the work, a slightly worse score."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the weights and activations while scoring."""
    bootstrap_resamples: int = 1000
    """Resamples of the bootstrap from which intervals come."""
    seed: int = 0
    """Seed of the bootstrap, of few-shot examples and of the examples that are made from held-out documents."""
    compressors: tuple[Literal["gzip", "xz"], ...] = ("gzip", "xz")
    """Compressors whose bits per byte on the same text are reported for comparison."""
    tasks: tuple[str, ...] = ()
    """lm-evaluation-harness tasks, groups or tags: names of YAML files in conf/evaluate/tasks or in task_folders."""
    task_folders: tuple[str, ...] = field(default=(), metadata={"execution": True, "path": True})
    """Folders with further task files. The files' content enters the step's digest, not where they are."""
    task_examples: int = 100
    """Examples of a task that is made from held-out documents; a task with its own data uses all of it."""
    samples: SampleSettings = field(default_factory=SampleSettings)
    """Prompts whose completions are kept with the results."""
    bytes_per_shard: int = 250_000
    """Bytes of text that one worker task scores."""
    tokens_per_batch: int = field(default=8192, metadata={"execution": True})
    """Tokens in one batch while scoring."""
    gpus_per_task: float = field(default=0, metadata={"execution": True})
    """GPUs of one worker task, which may be a fraction."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings, metadata={"execution": True})
    """Tracking of the evaluation's results."""

    def __post_init__(self) -> None:
        counts = ("max_documents", "max_bytes", "context_tokens", "stride_tokens", "bootstrap_resamples")
        for name in (*counts, "task_examples", "bytes_per_shard", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(name, value, "must be at least 1", "leave it out for the default")

    def windows(self, max_seq_len: int, trained_tokens: int | None) -> tuple[int, int]:
        """Context and stride in tokens for a model of `max_seq_len`, trained on rows of `trained_tokens`. Raises
        Refusal where it was not made for such a window, or windows would skip some tokens."""
        context = self.context_tokens or min(max_seq_len, trained_tokens or max_seq_len)
        stride = self.stride_tokens or max(1, context // 2)
        if context > max_seq_len:
            raise Refusal(
                "evaluate.context_tokens",
                context,
                f"the model was made for {max_seq_len} tokens",
                "choose at most that",
            )
        if stride > context:
            raise Refusal(
                "evaluate.stride_tokens",
                stride,
                f"windows of {context} tokens would skip some",
                f"choose at most {context}",
            )
        return context, stride


def task_files(settings: EvaluateSettings) -> tuple[Path, ...]:
    """Every file that the tasks read, for the step's digest: their YAML, its includes, their data.

    Raises Refusal for a task that is not there or cannot be run.
    """
    return tuple(read_tasks(settings.tasks, settings.task_folders).files)
