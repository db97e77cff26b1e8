"""Evaluate: bits per byte on held-out documents beside what it must beat, harness tasks, and sample completions.

Every model of the run (`base`, and `finetuned` where there is one) is scored on the same documents: each document is
`<s> text </s>`, every token of it but `<s>` counts, and a byte is a UTF-8 byte of the text. The work is cut into shards
that depend on the documents alone, so no score depends on how many workers there were. What the workers do is in
`measure.py`.

Held-out conversations are scored by the loss of the assistant's tokens, which is what fine-tuning is trained on.

Writes results.json, results.md (the table), documents.parquet (one row per document), conversations.parquet (one row per
conversation), tasks/ (each harness example with its answers), samples.json and, where runs are tracked offline, logs/.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.engine.step import Context, Inputs
from pipelines.evaluation.settings import EvaluateSettings, SampleSettings, task_files
from pipelines.evaluation.task_files import read_tasks
from pipelines.stages.tracked import track_scores

if TYPE_CHECKING:
    from data.tokenizers.sentencepiece import Tokenizer

__all__ = ["EvaluateSettings", "SampleSettings", "check_tasks", "run", "task_files"]


def run(settings: EvaluateSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: tokenizer, models by the names they are scored under; optionally corpora, rows (the unigram baseline learns
    from them) and conversations. Returns the figures of results.json, flat."""
    from pipelines.evaluation import held_out, summary
    from pipelines.evaluation.measure import measure, plan_work

    models, talks = inputs["model"], inputs.first("conversations")
    corpora = sorted(inputs["corpus"].items())
    chosen = {name: held_out.choose(artifact.path, settings) for name, artifact in corpora}
    if line := held_out.unscored(chosen.values()):
        ctx.log(line)
    documents = list({document.id: document for part in chosen.values() for document in part.documents}.values())
    groups = held_out.group_by_bytes([len(d.text.encode("utf-8")) for d in documents], settings.bytes_per_shard)
    groups = groups if documents else []
    chats, available = held_out.choose_conversations(talks.path, settings) if talks is not None else ([], 0)
    chat_groups = held_out.group_by_bytes([held_out.text_bytes(chat) for chat in chats], settings.bytes_per_shard)
    ids_of_chats = [[chats[place].id for place in group] for group in chat_groups if group]
    work = plan_work(settings, inputs, [document.id for document in documents], groups, ids_of_chats)
    done = ctx.map_shards(measure, work, label="measurements", gpus=settings.gpus_per_task)

    columns = summary.collect_columns(documents, groups, models, done)
    scores = summary.summarize(columns, settings) if documents else {}
    windows: dict[str, Any] = next((result["windows"] for result in done.values() if "windows" in result), {})
    results: dict[str, Any] = {
        "held_out": {name: part.card() for name, part in chosen.items()},
        "scored": {"documents": len(documents)} | {unit: int(columns[unit].sum()) for unit in ("bytes", "tokens")},
        "windows": windows | {"precision": settings.precision},
        "unigram_training_tokens": done["baselines"]["training_tokens"] if documents else 0,
        "scores": {name: asdict(score) for name, score in scores.items()},
        "tasks": {name: done[f"tasks-{name}"]["tasks"] for name in models if settings.tasks},
    }
    if documents and (lost := summary.lost_line(columns)) is not None:
        ctx.log(lost)
        results["lost_by_tokenizer"] = lost
    if chats:
        chat_columns = summary.collect_conversations(chats, ids_of_chats, models, done)
        results["conversations"] = summary.summarize_conversations(chat_columns, models, available, settings)
        summary.write_columns(out_dir / "conversations.parquet", chat_columns)
        if refused := next((r["refused"] for r in done.values() if r.get("refused")), ""):
            count = results["conversations"]["refused"]
            ctx.log(
                f"not scored: {count} of the held-out conversations, refused by the chat template; the first: {refused}"
            )
    _write_json(out_dir / "results.json", results)
    _write_json(out_dir / "samples.json", {name: done[f"samples-{name}"]["samples"] for name in models})
    (out_dir / "results.md").write_text(summary.table(results), encoding="utf-8")
    if documents:
        summary.write_columns(out_dir / "documents.parquet", columns)
    for line in summary.headlines(results):
        ctx.log(line)
    figures = summary.metrics(results)
    track_scores(settings.tracking, figures, inputs, out_dir, ctx)
    return figures


def check_prompts(samples: SampleSettings, max_seq_len: int, tokenizer: Tokenizer | None, longest_piece: int) -> None:
    """Raise Refusal if a fixed prompt leaves no room for an answer, before training instead of after. Without a
    tokenizer yet, only for prompts too long for any whose pieces have at most `longest_piece` characters."""
    from data.tokenizers.sentencepiece import TAB_RUNS
    from pipelines.inference.generator import check_room, prompt_ids

    for name, texts in (("prompts", samples.prompts), ("questions", samples.questions)):
        for number, text in enumerate(texts):
            if tokenizer is not None:
                tokens = len(prompt_ids(tokenizer, text, chat=name == "questions"))
            else:
                tokens = 1 + -(-len(text) // max(longest_piece, *map(len, TAB_RUNS)))
            check_room(tokens, max_seq_len, f"evaluate.samples.{name}[{number}]")


def check_tasks(settings: EvaluateSettings, windows: tuple[int, int]) -> None:
    """Build and dry-run every task that does not come with this program, before training instead of after. Raises
    Refusal."""
    if read_tasks(settings.tasks, settings.task_folders).has_foreign():
        from pipelines.evaluation.harness_tasks import try_tasks

        try_tasks(settings, windows[0])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
