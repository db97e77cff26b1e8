"""From measurements to scores with intervals, and the scores as columns, flat metrics and a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.rows.instructions import Conversation
from data.text.document import Document
from pipelines.evaluation.baselines import COMPRESSORS
from pipelines.evaluation.intervals import Interval, bounds, interval, resample_sums
from pipelines.evaluation.measure import BASE, FINETUNED
from pipelines.evaluation.settings import TASK_INTERVALS, EvaluateSettings

LOST = "lost_by_tokenizer"
"""Column of the bits needed to restore text that a tokenizer lost (data/tokenizers/lost_text.py)."""
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
    baselines = done.get("baselines", {"nats": {}, "compressed_bytes": {}})
    for name, nats in baselines["nats"].items():
        columns[f"{name}_bits"] = np.array(nats) * BITS_PER_NAT
    # Scores over tokens ignore text that the tokenizer lost; gzip and xz are lossless.
    columns[LOST] = np.array(baselines.get("lost_bits", np.zeros(len(documents))), np.float64)
    for name in [name for name in columns if name.endswith("_bits")]:
        columns[name] = columns[name] + columns[LOST]
    for name, compressed_bytes in baselines["compressed_bytes"].items():
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
    table_NK = np.column_stack(
        [columns["bytes"], columns["tokens"], *(columns[f"{name}_bits"] for name in names), columns[LOST]]
    )
    totals_K = table_NK.sum(0)
    draws_RK = resample_sums(table_NK, resamples=settings.bootstrap_resamples, seed=settings.seed)
    bytes_R, tokens_R, base_R = draws_RK[:, 0], draws_RK[:, 1], draws_RK[:, 2]
    over = functools.partial(interval, count=len(table_NK), of="documents")
    scores = {}
    for number, name in enumerate(names, start=2):
        bits, bits_R = totals_K[number], draws_RK[:, number]
        per_token = None
        if name not in COMPRESSORS:
            per_token = over(2 ** ((bits - totals_K[-1]) / totals_K[1]), 2 ** ((bits_R - draws_RK[:, -1]) / tokens_R))
        worse_by = None
        if name != BASE:
            worse_by = over((bits - totals_K[2]) / totals_K[0], (bits_R - base_R) / bytes_R)
        scores[name] = Score(
            bits_per_byte=over(bits / totals_K[0], bits_R / bytes_R), perplexity=per_token, worse_by=worse_by
        )
    return scores


def collect_conversations(
    conversations: Sequence[Conversation],
    groups: Sequence[Sequence[str]],
    models: Iterable[str],
    done: Mapping[str, dict[str, Any]],
) -> dict[str, np.ndarray]:
    """One row per conversation: id, source, position, tokens of the assistant, and NAME_nats for each model NAME."""
    columns = {
        "id": np.array([conversation.id for conversation in conversations]),
        "source": np.array([conversation.source for conversation in conversations]),
        "position": np.array([conversation.position for conversation in conversations], np.int64),
        "tokens": np.zeros(len(conversations), np.int64),
    }
    place = {conversation.id: number for number, conversation in enumerate(conversations)}
    for name in models:
        nats = columns[f"{name}_nats"] = np.zeros(len(conversations))
        for number, ids in enumerate(groups):
            found, at = done[f"conversations-{name}-{number:03d}"], [place[identity] for identity in ids]
            nats[at], columns["tokens"][at] = found["nats"], found["tokens"]
    return columns


def summarize_conversations(
    columns: Mapping[str, np.ndarray], models: Iterable[str], available: int, settings: EvaluateSettings
) -> dict[str, Any]:
    """Of each model the nats per token of the assistant, and how they differ from the base model's, over conversations."""
    scored = columns["tokens"] > 0
    names, count = list(models), int(scored.sum())
    card = {
        "available": available,
        "scored": count,
        "refused": int((~scored).sum()),
        "tokens": int(columns["tokens"].sum()),
    }
    if not count:
        return card | {"scores": {}}
    table_NK = np.column_stack([columns["tokens"], *(columns[f"{name}_nats"] for name in names)])[scored]
    totals_K = table_NK.sum(0)
    draws_RK = resample_sums(table_NK, resamples=settings.bootstrap_resamples, seed=settings.seed)
    over = functools.partial(interval, count=count, of="conversations")
    scores = {}
    for number, name in enumerate(names, start=1):
        loss = over(totals_K[number] / totals_K[0], draws_RK[:, number] / draws_RK[:, 0])
        difference_R = (draws_RK[:, number] - draws_RK[:, 1]) / draws_RK[:, 0]
        worse_by = None if name == BASE else over((totals_K[number] - totals_K[1]) / totals_K[0], difference_R)
        scores[name] = {"loss": asdict(loss), "worse_by": None if worse_by is None else asdict(worse_by)}
    return card | {"scores": scores}


def lost_line(columns: Mapping[str, np.ndarray]) -> str | None:
    """How much text the tokenizer lost; empty if none."""
    lost = columns[LOST]
    if not lost.any():
        return None
    rate = lost.sum() / columns["bytes"].sum()
    return (
        f"the tokenizer loses text: {np.count_nonzero(lost):,} of {len(lost):,} documents do not come back from their "
        f"tokens as they were; mending them takes {rate:.4g} bits per byte, which every score over its tokens is charged"
    )


def write_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """One row per document or conversation as Parquet."""
    pq.write_table(pa.table(dict(columns)), path, compression="zstd")


def metrics(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures by flat names, with `_low` and `_high` where there is an interval. The base model's have no prefix: a
    sweep sorts by `bits_per_byte`."""
    flat: dict[str, Any] = {}
    for name, score in results["scores"].items():
        prefix = "" if name == BASE else f"{name}_"
        flat[f"{prefix}bits_per_byte"] = score["bits_per_byte"]["value"]
        if name in (BASE, FINETUNED):
            flat |= bounds(f"{prefix}bits_per_byte", score["bits_per_byte"])
            flat[f"{prefix}perplexity"] = score["perplexity"]["value"]
    conversations = results.get("conversations", {"scores": {}})
    for name, score in conversations["scores"].items():
        prefix = "" if name == BASE else f"{name}_"
        flat[f"{prefix}conversation_loss"] = score["loss"]["value"]
        flat |= bounds(f"{prefix}conversation_loss", score["loss"])
    for name, tasks in results["tasks"].items():
        prefix = "" if name == BASE else f"{name}_"
        for task, figures in tasks.items():
            for metric, figure in figures.items():
                if isinstance(figure, dict) and figure["value"] is not None:
                    flat[f"{prefix}{task}_{metric}"] = figure["value"]
                    flat |= bounds(f"{prefix}{task}_{metric}", figure)
                    flat |= {} if figure["chance"] is None else {f"{task}_{metric}_chance": figure["chance"]}
    flat |= {f"scored_{unit}": count for unit, count in results["scored"].items()}
    return flat | ({"scored_conversations": conversations["scored"]} if "scored" in conversations else {})


def headlines(results: Mapping[str, Any]) -> list[str]:
    """The scores in a line or two, best first."""
    lines = []
    ranked = sorted(results["scores"].items(), key=lambda item: float(item[1]["bits_per_byte"]["value"]))
    if ranked:
        missing = ranked[0][1]["bits_per_byte"]["missing"]
        scores = ", ".join(f"{name} {bracketed(score['bits_per_byte'])}" for name, score in ranked)
        lines.append(f"bits per byte: {scores}{f'; no intervals: {missing}' if missing else ''}")
    if conversations := results.get("conversations"):
        scores = ", ".join(f"{name} {bracketed(score['loss'])}" for name, score in conversations["scores"].items())
        missing = next((score["loss"]["missing"] for score in conversations["scores"].values()), "")
        lines.append(
            f"{conversations['scored']} of {conversations['available']} held-out conversations, nats per token of the "
            f"answers: {scores or 'none scored'}{f'; no intervals: {missing}' if missing else ''}"
        )
    return lines


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    return "\n".join([*_document_lines(results), *_conversation_lines(results), *_task_lines(results)]) + "\n"


def _document_lines(results: Mapping[str, Any]) -> list[str]:
    scored, windows = results["scored"], results["windows"]
    if not results["scores"]:
        return ["No corpus, so no bits per byte."]
    missing = results["scores"][BASE]["bits_per_byte"]["missing"]
    brackets = f"No intervals: {missing}." if missing else "In brackets: 95 % bootstrap intervals over documents."
    lines = [
        f"{scored['documents']} held-out documents, {scored['bytes']} bytes, {scored['tokens']} tokens; windows of "
        f"{windows['context_tokens']} tokens every {windows['stride_tokens']}, {windows['precision']}. {brackets}",
        "",
        "| scorer | bits per byte | minus base | perplexity per token |",
        "|---|---|---|---|",
    ]
    if lost := results.get("lost_by_tokenizer"):
        lines.insert(1, f"\n{lost[0].upper()}{lost[1:]}.")
    for name, score in results["scores"].items():
        cells = [bracketed(score[key]) for key in ("bits_per_byte", "worse_by", "perplexity")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _conversation_lines(results: Mapping[str, Any]) -> list[str]:
    if (found := results.get("conversations")) is None:
        return []
    missing = next((score["loss"]["missing"] for score in found["scores"].values()), "")
    brackets = f"No intervals: {missing}." if missing else "In brackets: 95 % bootstrap intervals over conversations."
    refused = f" (not scored: {found['refused']} that the chat template refuses)" if found["refused"] else ""
    lines = [
        "",
        f"{found['scored']} of {found['available']} held-out conversations{refused}, {found['tokens']} tokens of the "
        f"assistant. {brackets}",
        "",
        "| model | nats per token of the answers | minus base |",
        "|---|---|---|",
    ]
    for name, score in found["scores"].items():
        lines.append(f"| {name} | {bracketed(score['loss'])} | {bracketed(score['worse_by'])} |")
    return lines


def _task_lines(results: Mapping[str, Any]) -> list[str]:
    if not any(results["tasks"].values()):
        return []
    lines = [
        "",
        TASK_INTERVALS,
        "",
        "| task | model | metric | value | chance | examples |",
        "|---|---|---|---|---|---|",
    ]
    for name, tasks in results["tasks"].items():
        for task, figures in tasks.items():
            if "skipped" in figures:
                lines.append(f"| {task} | {name} | skipped | {figures['skipped']} | – | 0 |")
            for metric, figure in figures.items():
                if isinstance(figure, dict):
                    value = bracketed(figure) + (f" ({figure['missing']})" if figure["missing"] else "")
                    chance = "–" if figure["chance"] is None else f"{figure['chance']:.3g}"
                    lines.append(f"| {task} | {name} | {metric} | {value} | {chance} | {figures['examples']} |")
    return lines


def bracketed(figure: Mapping[str, Any] | None) -> str:
    """`1.234 [1.200, 1.270]`; a dash where there is no figure."""
    if figure is None or figure["value"] is None:
        return "–"
    between = "" if figure["low"] is None else f" [{figure['low']:.4g}, {figure['high']:.4g}]"
    return f"{figure['value']:.4g}{between}"
