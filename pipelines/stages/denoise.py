"""Evaluate a model that fills in what is hidden: its own objective, asked of held-out documents.

Encoders and encoder-decoders give no probability to a text from left to right, so they have no bits per byte. What they can
be asked is the loss of each hidden token (each token the decoder says) and how often the likeliest is right. What is hidden
hangs on `evaluate.seed` and the document alone: models of one tokenizer and objective are asked the same.

Writes results.json, results.md, documents.parquet (one row per document) and, where runs are tracked offline, logs/.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.typed import to_plain
from data.rows.packing import TokenDocument, pack_stream, token_dtype
from data.tasks.denoising import AnyObjective
from data.tasks.objectives import Examples
from data.tasks.settings import ObjectiveChoice
from data.text.document import Document
from data.tokenizers.sentencepiece import Tokenizer
from pipelines.engine.step import Artifact, Context, Inputs
from pipelines.evaluation import held_out
from pipelines.evaluation.intervals import bounds, interval, resample_sums, share_interval
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.stages.tracked import track_scores

if TYPE_CHECKING:
    from model.architecture import Transformer


@dataclass(frozen=True, kw_only=True)
class DenoiseSettings:
    """What is asked, in rows of how many tokens; of `evaluate`: documents, bytes, resamples, seed and precision count."""

    evaluate: EvaluateSettings
    """Documents, bytes, resamples, seed and precision count."""
    objective: ObjectiveChoice
    """What is asked of the documents."""
    seq_len: int
    """Tokens of a row."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One worker's part: some held-out documents, by their ids."""

    settings: DenoiseSettings
    tokenizer: Artifact
    model: Artifact
    corpora: tuple[Artifact, ...]
    ids: tuple[str, ...]


def run(settings: DenoiseSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: corpora, tokenizer, the model. Returns the figures of results.json."""
    asked = settings.evaluate
    corpora = dict(sorted(inputs["corpus"].items()))
    chosen = {name: held_out.choose(artifact.path, asked) for name, artifact in corpora.items()}
    if line := held_out.unscored(chosen.values()):
        ctx.log(line)
    documents = list({document.id: document for part in chosen.values() for document in part.documents}.values())
    groups = held_out.group_by_bytes([len(d.text.encode("utf-8")) for d in documents], asked.bytes_per_shard)
    work = {
        f"hidden-{number:03d}": Work(
            settings=settings,
            tokenizer=inputs.one("tokenizer"),
            model=inputs.one("model"),
            corpora=tuple(corpora.values()),
            ids=tuple(documents[place].id for place in group),
        )
        for number, group in enumerate(groups)
    }
    done = ctx.map_shards(measure, work, label="measurements", gpus=asked.gpus_per_task)
    columns = {
        name: np.array([value for shard in work for value in done[shard][name]])
        for name in ("id", "targets", "nats", "right")
    }
    table_NK = np.column_stack([columns["targets"], columns["nats"], columns["right"]]).astype(np.float64)
    targets, nats, right = table_NK.sum(0)
    draws_RK = resample_sums(table_NK, resamples=asked.bootstrap_resamples, seed=asked.seed)
    count = len(documents)
    loss = interval(nats / targets, draws_RK[:, 1] / draws_RK[:, 0], count=count, of="documents")
    accuracy = share_interval(right, targets, draws_RK[:, 2] / draws_RK[:, 0], count=count, of="documents")
    scored = {"documents": len(documents), "targets": int(targets)}
    results = {
        "objective": to_plain(settings.objective),
        "held_out": {name: part.card() for name, part in chosen.items()},
        "scored": scored,
        "hidden_token_loss": asdict(loss),
        "hidden_token_accuracy": asdict(accuracy),
    }
    (out_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    between = "" if loss.low is None else f" [{loss.low:.4f}, {loss.high:.4f}]"
    shares = "" if accuracy.low is None else f" [{accuracy.low:.1%}, {accuracy.high:.1%}]"
    words = (
        f"{settings.objective.kind} on {count} held-out documents, {int(targets):,} hidden tokens: loss "
        f"{loss.value:.4f} nats{between}, {accuracy.value:.1%} right{shares}"
    )
    brackets = f"No intervals: {loss.missing}" if loss.missing else "Brackets: 95 %, bootstrap over documents"
    (out_dir / "results.md").write_text(f"{words}. {brackets}.\n", encoding="utf-8")
    pq.write_table(pa.table(columns), out_dir / "documents.parquet", compression="zstd")
    missing = f" (no intervals: {loss.missing})" if loss.missing else ""
    ctx.log(f"{words}{missing}; bits per byte, tasks and samples are for models that write from left to right")
    figures = {
        "hidden_token_loss": loss.value,
        "hidden_token_perplexity": math.exp(loss.value),
        "hidden_token_accuracy": accuracy.value,
        **bounds("hidden_token_loss", asdict(loss)),
        **bounds("hidden_token_accuracy", asdict(accuracy)),
        **{f"scored_{unit}": count for unit, count in scored.items()},
    }
    track_scores(asked.tracking, figures, inputs, out_dir, ctx)
    return figures


def measure(work: Work, out_dir: Path) -> dict[str, Any]:
    """Targets, nats and likeliest tokens that are right, of each document of this part."""
    from pipelines.inference.weights import load_model

    asked = work.settings.evaluate
    tokenizer = Tokenizer.load(work.tokenizer.path)
    objective = work.settings.objective.over(tokenizer, asked.seed)
    device = "cuda" if asked.gpus_per_task else "cpu"
    model = load_model(work.model.path / "model", precision=asked.precision, device=device)
    seq_len = work.settings.seq_len
    at_once = max(1, asked.tokens_per_batch // seq_len)
    sums = [
        score(model, hidden(document, tokenizer, objective, seq_len), at_once)
        for document in held_out.by_id([corpus.path for corpus in work.corpora], work.ids)
    ]
    targets, nats, right = zip(*sums, strict=True)
    return {"id": list(work.ids), "targets": list(targets), "nats": list(nats), "right": list(right)}


def hidden(document: Document, tokenizer: Tokenizer, objective: AnyObjective, seq_len: int) -> Examples:
    """A document cut into rows as shards are, and what the objective makes of them."""
    tokens = TokenDocument(id=document.id, source="", position=0, tokens=tokenizer.encode(document.text))
    rows = pack_stream(
        [tokens],
        seq_len=seq_len,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        dtype=token_dtype(tokenizer.vocab_size),
    )
    first = int(hashlib.sha256(document.id.encode()).hexdigest()[:12], 16)
    return objective(rows, first + np.arange(len(rows)))


def score(model: Transformer, examples: Examples, rows_at_once: int) -> tuple[int, float, int]:
    """(targets, their nats, likeliest tokens that are right) of some rows."""
    import torch

    from data.batch import collate

    device = next(model.parameters()).device
    targets, nats, right = 0, 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(examples.tokens_RT), rows_at_once):
            batch = {name: x.to(device) for name, x in collate(examples, start, start + rows_at_once).items()}
            said = model(**batch, per_token=True)
            is_target_BT = batch["targets_BT"] >= 0
            targets += int(is_target_BT.sum())
            nats += float(said["nll"][is_target_BT].double().sum())
            right += int(said["is_top"][is_target_BT].sum())
    return targets, nats, right
