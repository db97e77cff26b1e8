"""Corpus: files → clean, deduplicated documents, split into train/ and heldout/ before anything learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.text.corpus import CorpusSettings, build_corpus
from pipelines.engine.step import Context, Inputs


def run(settings: CorpusSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Writes train/*.parquet, heldout/*.parquet and card.json (what came in, what stayed, why the rest went)."""
    card = build_corpus(settings, out_dir, ctx.map_shards, scratch=ctx.scratch)
    for repair, times in card["repaired"].items():
        if not repair.startswith(LEFT_OUT):
            ctx.log(f"{times:,} {repair.replace('_', ' ')}")
    counts = {key: value for key, value in card.items() if isinstance(value, int)}
    documents = card["train_documents"] + card["heldout_documents"]
    return {"documents": documents, **counts, "left_out": card["left_out"]}


LEFT_OUT = ("malformed_lines", "null_rows")
"""Prefixes of counts in `repaired` that are reported as left out instead."""
