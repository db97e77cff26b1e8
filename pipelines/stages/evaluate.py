"""Evaluate: bits per byte on held-out documents beside what it must beat, harness tasks, and sample completions.

Every model of the run (`base`, and `finetuned` where there is one) is scored on the same documents: each document is
`<s> text </s>`, every token of it but `<s>` counts, and a byte is a UTF-8 byte of the text. The work is cut into shards
that depend on the documents alone, so no score depends on how many workers there were. What the workers do is in
`measure.py`.

Writes results.json, results.md (the table), documents.parquet (one row per document), tasks/ (each harness example with
its answers) and samples.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.engine.step import Artifact, Context, EngineError
from pipelines.stages.generate import GenerateSettings

TASKS = Path(__file__).parents[2] / "conf" / "evaluate" / "tasks"


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
    """lm-evaluation-harness tasks: names of YAML files in conf/evaluate/tasks or in task_folders."""
    task_folders: tuple[str, ...] = ()
    task_examples: int = 100
    """Examples of a task made from held-out documents; a task that brings its own data uses all of it."""
    samples: SampleSettings = field(default_factory=SampleSettings)
    bytes_per_shard: int = 250_000
    """Text scored by one worker task."""
    tokens_per_batch: int = field(default=8192, metadata={"execution": True})
    gpus_per_task: float = field(default=0, metadata={"execution": True})

    def __post_init__(self) -> None:
        counts = ("max_documents", "max_bytes", "context_tokens", "stride_tokens", "bootstrap_resamples")
        for name in (*counts, "task_examples", "bytes_per_shard", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1; leave it out for the default.")


def run(settings: EvaluateSettings, inputs: Mapping[str, Artifact], out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: corpus (or several, corpus-NAME), tokenizer, pretrain; optionally finetune, and shards (or several), from
    which the unigram baseline learns. Returns the figures of results.json, flat."""
    from pipelines.stages import held_out, summary
    from pipelines.stages.measure import MODELS, measure, plan_work

    models = {name: inputs[step] for name, step in MODELS.items() if step in inputs}
    chosen = {name: held_out.choose(artifact.path, settings) for name, artifact in named(inputs, "corpus").items()}
    documents = list({document.id: document for part in chosen.values() for document in part.documents}.values())
    groups = held_out.group_by_bytes(documents, settings.bytes_per_shard)
    work = plan_work(settings, inputs, models, [document.id for document in documents], groups)
    done = ctx.map_shards(measure, work, label="measurements", gpus=settings.gpus_per_task)

    columns = summary.collect_columns(documents, groups, models, done)
    scores = summary.summarize(columns, settings)
    results = {
        "held_out": {name: part.card() for name, part in chosen.items()},
        "scored": {"documents": len(documents)} | {unit: int(columns[unit].sum()) for unit in ("bytes", "tokens")},
        "windows": done["score-base-000"]["windows"] | {"precision": settings.precision},
        "unigram_training_tokens": done["baselines"]["training_tokens"],
        "scores": {name: asdict(score) for name, score in scores.items()},
        "tasks": {name: done[f"tasks-{name}"]["tasks"] for name in models if settings.tasks},
    }
    _write_json(out_dir / "results.json", results)
    _write_json(out_dir / "samples.json", {name: done[f"samples-{name}"]["samples"] for name in models})
    (out_dir / "results.md").write_text(summary.table(results), encoding="utf-8")
    summary.write_documents(out_dir / "documents.parquet", columns)
    ctx.say(summary.headline(results))
    return summary.metrics(results)


def named(inputs: Mapping[str, Artifact], kind: str) -> dict[str, Artifact]:
    """The inputs of one kind: `corpus` alone, or one for each source of a mixture (`corpus-NAME`)."""
    return {name: artifact for name, artifact in sorted(inputs.items()) if name == kind or name.startswith(f"{kind}-")}


def task_path(name: str, folders: Sequence[str]) -> Path:
    """The YAML file of a task: in the user's folders first, then in conf/evaluate/tasks. EngineError if in none."""
    places = [*map(Path, folders), TASKS]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    known = ", ".join(sorted(path.stem for place in places for path in place.glob("*.yaml")))
    raise EngineError(
        f"evaluate.tasks: no task named {name!r}. A task is a harness YAML file in conf/evaluate/tasks "
        f"or in one of evaluate.task_folders; there are {known}."
    )


def task_files(settings: EvaluateSettings) -> tuple[Path, ...]:
    """Every file that the chosen tasks are made from, to enter the step's digest: their YAML and their own data."""
    import yaml

    files: list[Path] = []
    for name in settings.tasks:
        path = task_path(name, settings.task_folders)
        data = (yaml.safe_load(path.read_text(encoding="utf-8")).get("dataset_kwargs") or {}).get("data_files", ())
        by_split = data.values() if isinstance(data, dict) else [data] if data else []
        files += [path, *(path.parent / file for file in by_split)]
    return tuple(files)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
