"""From measurements to scores with intervals, and the scores as columns, flat metrics and a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.document import Document
from pipelines.stages.baselines import COMPRESSORS
from pipelines.stages.evaluate_settings import EvaluateSettings
from pipelines.stages.intervals import Interval, interval, resample_sums
from pipelines.stages.measure import BASE, FINETUNED

BITS_PER_NAT = 1 / math.log(2)


def collect_columns(
    documents: list[Document], groups: list[list[int]], models: Iterable[str], done: Mapping[str, dict[str, Any]]
) -> dict[str, np.ndarray]:
    """One row per document: id, source, bytes, tokens, and for each scorer NAME the column NAME_bits."""
    columns = {
        "id": np.array([document.id for document in documents]),
        "source": np.array([document.source for document in documents]),
        "bytes": np.array([len(document.text.encode("utf-8")) for document in documents], np.int64),
        "tokens": np.zeros(len(documents), np.int64),
    }
    for name in models:
        bits = columns[f"{name}_bits"] = np.zeros(len(documents))
        for number, group in enumerate(groups):
            found = done[f"score-{name}-{number:03d}"]
            bits[group] = np.array(found["nats"]) * BITS_PER_NAT
            columns["tokens"][group] = found["tokens"]
    for name, nats in done["baselines"]["nats"].items():
        columns[f"{name}_bits"] = np.array(nats) * BITS_PER_NAT
    for name, compressed_bytes in done["baselines"]["compressed_bytes"].items():
        columns[f"{name}_bits"] = np.array(compressed_bytes, np.float64) * 8
    return columns


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well one scorer predicts the documents: perplexity per token, worse_by in bits per byte than the base."""

    bits_per_byte: Interval
    perplexity: Interval | None
    worse_by: Interval | None


def summarize(columns: Mapping[str, np.ndarray], settings: EvaluateSettings) -> dict[str, Score]:
    """A score for each column of bits. Totals over documents: long documents count for what they are."""
    names = [name.removesuffix("_bits") for name in columns if name.endswith("_bits")]
    table_NK = np.column_stack([columns["bytes"], columns["tokens"], *(columns[f"{name}_bits"] for name in names)])
    totals_K = table_NK.sum(0)
    draws_RK = resample_sums(table_NK, resamples=settings.bootstrap_resamples, seed=settings.seed)
    bytes_R, tokens_R, base_R = draws_RK[:, 0], draws_RK[:, 1], draws_RK[:, 2]
    scores = {}
    for number, name in enumerate(names, start=2):
        bits, bits_R = totals_K[number], draws_RK[:, number]
        per_token = None
        if name not in COMPRESSORS:
            per_token = interval(2 ** (bits / totals_K[1]), 2 ** (bits_R / tokens_R))
        worse_by = None
        if name != BASE:
            worse_by = interval((bits - totals_K[2]) / totals_K[0], (bits_R - base_R) / bytes_R)
        scores[name] = Score(
            bits_per_byte=interval(bits / totals_K[0], bits_R / bytes_R), perplexity=per_token, worse_by=worse_by
        )
    return scores


def write_documents(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """One row per document as Parquet."""
    pq.write_table(pa.table(dict(columns)), path, compression="zstd")


def metrics(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures by flat names. The base model's carry no prefix: what a sweep sorts by is `bits_per_byte`."""
    flat: dict[str, Any] = {}
    for name, score in results["scores"].items():
        prefix = "" if name == BASE else f"{name}_"
        flat[f"{prefix}bits_per_byte"] = score["bits_per_byte"]["value"]
        if name in (BASE, FINETUNED):
            flat[f"{prefix}bits_per_byte_low"] = score["bits_per_byte"]["low"]
            flat[f"{prefix}bits_per_byte_high"] = score["bits_per_byte"]["high"]
            flat[f"{prefix}perplexity"] = score["perplexity"]["value"]
    for name, tasks in results["tasks"].items():
        prefix = "" if name == BASE else f"{name}_"
        for task, figures in tasks.items():
            for metric, figure in figures.items():
                if isinstance(figure, dict):
                    flat[f"{prefix}{task}_{metric}"] = figure["value"]
    return flat | {f"scored_{unit}": count for unit, count in results["scored"].items()}


def headline(results: Mapping[str, Any]) -> str:
    """The scores in one line, best first."""
    ranked = sorted(results["scores"].items(), key=lambda item: float(item[1]["bits_per_byte"]["value"]))
    return "bits per byte: " + ", ".join(f"{name} {bracketed(score['bits_per_byte'])}" for name, score in ranked)


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    scored, windows = results["scored"], results["windows"]
    lines = [
        f"{scored['documents']} held-out documents, {scored['bytes']} bytes, {scored['tokens']} tokens; windows of "
        f"{windows['context_tokens']} tokens every {windows['stride_tokens']}, {windows['precision']}. In brackets: "
        "95 % bootstrap intervals over documents (over examples in tasks).",
        "",
        "| scorer | bits per byte | minus base | perplexity per token |",
        "|---|---|---|---|",
    ]
    for name, score in results["scores"].items():
        cells = [bracketed(score[key]) for key in ("bits_per_byte", "worse_by", "perplexity")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if any(results["tasks"].values()):
        lines += ["", "| task | model | metric | value | examples |", "|---|---|---|---|---|"]
    for name, tasks in results["tasks"].items():
        for task, figures in tasks.items():
            if "skipped" in figures:
                lines.append(f"| {task} | {name} | skipped | {figures['skipped']} | 0 |")
            for metric, figure in figures.items():
                if isinstance(figure, dict):
                    lines.append(f"| {task} | {name} | {metric} | {bracketed(figure)} | {figures['examples']} |")
    return "\n".join(lines) + "\n"


def bracketed(figure: Mapping[str, float | None] | None) -> str:
    """`1.234 [1.200, 1.270]`; a dash where there is no figure."""
    if figure is None:
        return "–"
    between = "" if figure["low"] is None else f" [{figure['low']:.4g}, {figure['high']:.4g}]"
    return f"{figure['value']:.4g}{between}"
