"""Shards: documents → packed rows of token ids in WebDataset tars, once and for all epochs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.rows.shards import ShardSettings
from pipelines.engine.step import Artifact, Context, Inputs


def run(settings: ShardSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Writes shard tars, offset indexes, document tables and shards.json over them."""
    from data.rows.shard_tasks import CHANGED, plan_shards
    from data.rows.shards import write_manifest
    from data.tokenizers.sentencepiece import Tokenizer

    corpus, tokenizer = inputs.one("corpus"), inputs.one("tokenizer")
    tasks = {
        task.name: _Payload(task=task, corpus=corpus, tokenizer=tokenizer, settings=settings)
        for task in plan_shards(corpus.path / "train", settings)
    }
    done = ctx.map_shards(_make, tasks, label="pack")
    vocab_size = Tokenizer.load(tokenizer.path).vocab_size
    totals = write_manifest(out_dir, [done[name] for name in tasks], settings=settings, vocab_size=vocab_size)
    if changed := totals["counts"].get(CHANGED):
        ctx.log(
            f"the tokenizer loses text: {changed:,} of {corpus.metrics['train_documents']:,} documents do not come back "
            "from their tokens as they were"
        )
    return {
        "shards": len(tasks),
        "seq_len": settings.seq_len,
        "bytes_per_token": corpus.metrics["train_bytes"] / totals["tokens"],
        **totals,
    }


@dataclass(frozen=True, kw_only=True)
class _Payload:
    task: Any
    corpus: Artifact
    tokenizer: Artifact
    settings: ShardSettings


def _make(payload: _Payload, out_dir: Path) -> dict[str, Any]:
    from data.rows.shard_tasks import make_shard
    from data.tokenizers.sentencepiece import Tokenizer

    return make_shard(
        payload.task,
        out_dir,
        corpus_dir=payload.corpus.path / "train",
        tokenizer=Tokenizer.load(payload.tokenizer.path),
        settings=payload.settings,
    )
