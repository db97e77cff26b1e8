"""Evaluate: bits per byte on held-out documents beside what it must beat, harness tasks, and sample completions.

Every model of the run (`base`, and `finetuned` where there is one) is scored on the same documents: each document is
`<s> text </s>`, every token of it but `<s>` counts, and a byte is a UTF-8 byte of the text. The work is cut into shards
that depend on the documents alone, so no score depends on how many workers there were. What the workers do is in
`measure.py`.

Writes results.json, results.md (the table), documents.parquet (one row per document), tasks/ (each harness example with
its answers), samples.json and, where runs are tracked offline, logs/.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.engine.step import Artifact, Context
from pipelines.stages.evaluate_settings import EvaluateSettings, SampleSettings, task_files
from pipelines.stages.inputs import named
from pipelines.stages.tracked import track_scores

__all__ = ["EvaluateSettings", "SampleSettings", "run", "task_files"]


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
    figures = summary.metrics(results)
    track_scores(settings.tracking, figures, inputs, out_dir, ctx)
    return figures


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
