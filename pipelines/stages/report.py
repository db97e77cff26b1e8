"""Report: one HTML page that tells what was made, how well it does, and what everything came from.

Reads the artifacts' manifests and small files only: no model is run. Writes report.html, which needs no network, no
script and no other file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.console import charts
from pipelines.engine.step import Artifact, Context, Inputs
from pipelines.evaluation.settings import TASK_INTERVALS

TEMPLATE = "report.html.jinja"
COUNTED = ("tokenizer", "rows", "conversations")
"""Kinds of steps whose figures stand beside the corpus's card."""
SMOOTHING_SHARE = 0.02
"""Part of the training that the bold loss curve averages over."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What stands above the report."""

    title: str = "Athanor"
    """Headline of the report."""

    def without(self, failed: Mapping[str, str]) -> PartialReportSettings:
        """Settings of a partial report, after these steps failed."""
        return PartialReportSettings(title=self.title, failed=dict(failed))


@dataclass(frozen=True, kw_only=True)
class PartialReportSettings(ReportSettings):
    """A report on part of a run: which steps failed, or could not be made without one that did, with the error of each."""

    failed: dict[str, str]
    """Step → why it is missing."""


def run(settings: ReportSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Inputs: any artifacts, by kind and step; a section appears for each that is there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": charts.count, "bytes": bytes_text, "seconds": seconds_text, "figure": figure}
    scored, exported = inputs.first("evaluation"), inputs.first("export")
    artifacts = inputs.by_key
    page = environment.get_template(TEMPLATE).render(
        title=settings.title,
        tiles=tiles(inputs),
        warnings=[(name, text) for name, a in artifacts.items() for text in a.metrics.get("warnings", ())],
        trainings=[training(name, artifact) for name, artifact in inputs["model"].items()],
        corpora=[corpus(name, artifact) for name, artifact in sorted(inputs["corpus"].items())],
        counts={name: numbers(a.metrics) for kind in COUNTED for name, a in inputs[kind].items()},
        evaluation=evaluation(scored)
        if scored is not None and "scored_documents" in scored.metrics and "hidden_token_loss" not in scored.metrics
        else None,
        export=exported.metrics if exported is not None else None,
        lineage=[lineage(name, artifact) for name, artifact in artifacts.items()],
        failed=settings.failed if isinstance(settings, PartialReportSettings) else {},
        environment=next((artifact.manifest for artifact in artifacts.values()), {}),
    )
    (out_dir / "report.html").write_text(page, encoding="utf-8")
    return {"bytes": len(page.encode("utf-8"))}


def tiles(inputs: Inputs) -> list[dict[str, str]]:
    """The key figures on top of the page: name, value, remark."""
    found: list[dict[str, str]] = []

    def tile(name: str, value: str, remark: str = "") -> None:
        found.append({"name": name, "value": value, "remark": remark})

    scored, trained, exported = (inputs.first(kind) for kind in ("evaluation", "model", "export"))
    scores = scored.metrics if scored is not None else {}
    if scored is not None and "bits_per_byte" in scores:
        tile("bits per byte, held out", f"{scores['bits_per_byte']:.3f}", between(scores, "bits_per_byte"))
        tile(*verdict(json.loads((scored.path / "results.json").read_text(encoding="utf-8"))["scores"]))
        tile("perplexity", f"{scores['perplexity']:.1f}", "per token")
    for name in ("finetuned_conversation_loss", "conversation_loss"):
        if name in scores:
            model = name.removesuffix("_conversation_loss") if "_conv" in name else "base"
            tile(f"held-out answers, {model}", f"{scores[name]:.3f}", f"nats per token; {between(scores, name)}")
    if "hidden_token_loss" in scores:
        remark = f"nats, held out; {between(scores, 'hidden_token_loss')}"
        tile("loss of a hidden token", f"{scores['hidden_token_loss']:.3f}", remark)
        tile("hidden tokens found", f"{scores['hidden_token_accuracy']:.1%}", f"of {scores['scored_targets']:,}")
    figures = trained.metrics if trained is not None else {}
    if "parameters" in figures:
        tile("parameters", charts.count(figures["parameters"]))
    if "tokens" in figures:
        speed = figures.get("tokens_per_second")
        tile("tokens trained on", charts.count(figures["tokens"]), f"{charts.count(speed)}/s" if speed else "")
    if exported is not None and "max_logit_error" in exported.metrics:
        error = exported.metrics["max_logit_error"]
        tile("export against transformers", "equal", f"largest logit difference {error:.1g}")
    seconds = sum(artifact.manifest.get("seconds", 0) for artifact in inputs.by_key.values())
    tile("made in", seconds_text(seconds), f"{len(inputs.by_key)} steps, some side by side")
    return found


def between(scores: Mapping[str, Any], name: str) -> str:
    """Text of the interval around a figure, or that there is none."""
    if f"{name}_low" not in scores:
        return "no interval: too few held out"
    return f"95 % interval {scores[f'{name}_low']:.3f} – {scores[f'{name}_high']:.3f}"


def verdict(scores: Mapping[str, Any]) -> tuple[str, str, str]:
    """A tile with the scorers that the model beats: the interval of their difference over the same documents is above 0."""
    rivals = {name: scores[name] for name in ("unigram", "gzip", "xz") if name in scores}
    remark = ", ".join(f"{name} {score['bits_per_byte']['value']:.2f}" for name, score in rivals.items())
    if any(score["worse_by"]["low"] is None for score in rivals.values()):
        return "clearly better than", "no verdict", f"too few documents for intervals; {remark}"
    beaten = [name for name, score in rivals.items() if score["worse_by"]["low"] > 0]
    return "clearly better than", ", ".join(beaten) or "none of them", remark


TRAINING_FIGURES = {
    "parameters": ("parameters", "{:,}"),
    "steps": ("steps", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "rows": ("rows", "{:,}"),
    "loss": ("loss, mean of the last 20 steps", "{:.3f}"),
    "tokens_per_second": ("tokens per second", "{:,.0f}"),
    "mfu": ("model FLOPs utilization", "{:.1%}"),
    "data_wait_share": ("time waiting for data", "{:.2%}"),
}
"""What the report says of a training run: the metric, what it is called, how it is written."""


def training(name: str, artifact: Artifact) -> dict[str, Any]:
    """Curves and figures of one training run."""
    path = artifact.path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line] if path.exists() else []
    tokens = [row["tokens"] for row in rows]
    losses = [row["loss"] for row in rows]
    bold = charts.smoothed(losses, round(len(rows) * SMOOTHING_SHARE))
    loss = [charts.Curve(xs=tokens, ys=losses, style="raw"), charts.Curve(xs=tokens, ys=bold, style="bold")]
    lr = charts.Curve(xs=tokens, ys=[row["lr"] for row in rows], style="thin")
    norm = charts.Curve(xs=tokens, ys=[row["grad_norm"] for row in rows], style="thin")
    figures = artifact.metrics
    return {
        "name": name,
        "loss": charts.curves(loss, label=f"{name}: loss over tokens", height=230),
        "lr": charts.curves([lr], label=f"{name}: learning rate over tokens", y_text=lambda y: f"{y:.0e}"),
        "grad_norm": charts.curves([norm], label=f"{name}: gradient norm over tokens"),
        "mfu_formula": figures.get("mfu_formula"),
        "figures": {
            words: shape.format(figures[key])
            for key, (words, shape) in TRAINING_FIGURES.items()
            if isinstance(figures.get(key), int | float)
        },
    }


def corpus(name: str, artifact: Artifact) -> dict[str, Any]:
    """The data card of one corpus."""
    path = artifact.path / "card.json"
    card = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(artifact.metrics)
    return {"name": name, "card": card, "most_dropped": max(card.get("dropped", {}).values(), default=1) or 1}


def evaluation(artifact: Artifact) -> dict[str, Any]:
    """Scores, tasks and samples, and the picture of the scores."""
    results = json.loads((artifact.path / "results.json").read_text(encoding="utf-8"))
    samples = json.loads((artifact.path / "samples.json").read_text(encoding="utf-8"))
    chats = results.get("conversations", {"scores": {}})["scores"]
    ranked = sorted(results["scores"].items(), key=lambda item: float(item[1]["bits_per_byte"]["value"]))
    rows = []
    for name, score in ranked:
        found = score["bits_per_byte"]
        rows.append(
            (
                name.replace("_", " "),
                found["value"],
                found["low"],
                found["high"],
                "ours" if name in samples else "rival",
            )
        )
    missing = ranked[0][1]["bits_per_byte"]["missing"] if ranked else ""
    label = f"bits per byte of every scorer, {'without' if missing else 'with 95 %'} intervals"
    asked = [
        {
            "prompt": first["prompt"],
            "chat": first["chat"],
            "texts": {name: said[number] for name, said in samples.items()},
        }
        for number, first in enumerate(next(iter(samples.values()), []))
    ]
    return {
        **results,
        "picture": charts.intervals(rows, label=label) if rows else "",
        "missing": missing,
        "chats_missing": next((score["loss"]["missing"] for score in chats.values()), ""),
        "task_intervals": TASK_INTERVALS,
        "ranked": ranked,
        "models": list(samples),
        "samples": asked,
    }


def numbers(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The figures that are numbers, as text."""
    return {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def lineage(name: str, artifact: Artifact) -> dict[str, Any]:
    """What an artifact is, what it came from, and how it was told to be."""
    manifest = artifact.manifest
    files = manifest.get("files", {})
    return {
        "name": name,
        "digest": artifact.digest,
        "content_digest": str(manifest.get("content_digest", "")),
        "inputs": {step: source["digest"] for step, source in manifest.get("inputs", {}).items()},
        "sources": {what: len(entries) for what, entries in manifest.get("sources", {}).items()},
        "files": len(files),
        "bytes": sum(entry.get("bytes", entry.get("size", 0)) for entry in files.values()),
        "seconds": manifest.get("seconds"),
        "commit": str(manifest.get("commit") or "")[:12],
        "settings": json.dumps(manifest.get("identity", {}).get("settings", {}), indent=2, ensure_ascii=False),
    }


def figure(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`1.234 (1.200 – 1.270)`; a dash where there is no figure."""
    if value is None or value["value"] is None:
        return "–"
    middle = f"{value['value']:.{digits}f}"
    return middle if value["low"] is None else f"{middle} ({value['low']:.{digits}f} – {value['high']:.{digits}f})"


def bytes_text(value: float) -> str:
    """3145728 → '3.0 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def seconds_text(value: float | None) -> str:
    """90 → '1 min 30 s'."""
    if value is None:
        return "–"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{value:.1f} s"
