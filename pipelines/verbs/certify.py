"""`athanor certify resume`: exact resume shown on the user's own configuration, scaled down.

Three trainings of the same few steps, each a real `athanor run --until pretrain` in a process of its own:

    straight   never interrupted
    killed     its driver killed by SIGKILL at a random step, then the same command again
    regrouped  with another number of ranks

The verdict compares `metrics.jsonl`: killed must equal straight bit for bit, final weights included; regrouped must have
the same batches, and losses within the float tolerance of summing in another order.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.refusal import NO_VALUE, Refusal, Shown
from model.ffns.dense import FfnConfig
from model.mixers.attention import AttentionConfig
from model.mixers.linear_attention import LinearAttentionConfig
from model.mixers.mamba import MambaConfig
from pipelines.engine import runner
from pipelines.engine.backends.search_path import ROOT
from pipelines.engine.step import Step
from pipelines.engine.store.open import open_store, storage_errors
from pipelines.execution import execute, get_step
from pipelines.graph import build
from pipelines.settings.compose import compose
from pipelines.settings.derive import Settings

STEPS = 12
ATTEMPTS = 3  # to kill a training before it ends
EXACT_FIELDS = ("step", "loss", "grad_norm", "lr", "tokens", "rows", "batch_digest")
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative, on the loss of a step. Regrouping rows changes the order of sums: about 1e-7 per sum in fp32, and 2^-8 = 4e-3
per product rounded to bf16; each update feeds the difference back, about a factor of a few over these twelve steps."""


def certify_resume(overrides: Sequence[str]) -> int:
    """Run the three trainings, print the verdict, return 0 if both comparisons hold and 1 otherwise."""
    settings = compose(overrides)
    if "://" in settings.store:
        raise Refusal("store", Shown(settings.store), "certify compares files on this machine", "add store=FOLDER")
    with storage_errors(open_store(settings.store)):
        return _certify(settings, overrides)


def _certify(settings: Settings, overrides: Sequence[str]) -> int:
    steps = build(settings)
    get_step(steps, "pretrain")
    settings.check_sizes(["pretrain"])  # the user's own, which the scaled-down trainings replace
    folder = Path(settings.store).absolute() / ".certify" / settings.experiment
    if folder.exists():
        shutil.rmtree(folder)
    words = [*overrides, *scaled_down(settings)]
    _make_inputs(settings, steps)
    other_ranks = 2 if settings.compute.ranks == 1 else settings.compute.ranks // 2
    stores = {name: folder / name for name in ("straight", "killed", "regrouped")}
    for store in stores.values():
        _share_inputs(settings, steps, store)
    log(f"certify: {STEPS} steps of {settings.experiment}, scaled down: {' '.join(scaled_down(settings))}")

    _train("straight", words, stores["straight"])
    at = _train_killed(words, stores["killed"])
    _train("regrouped", [*words, f"compute.ranks={other_ranks}"], stores["regrouped"])

    runs = {name: read(store) for name, store in stores.items()}
    verdicts = [
        exact_verdict(runs["straight"], runs["killed"], at),
        regrouped_verdict(runs["straight"], runs["regrouped"], settings.pretrain.precision, other_ranks),
    ]
    for holds, words_of in verdicts:
        print(f"{'holds ' if holds else 'BROKEN'}  {words_of}")
    print(f"records: {folder}")
    return 0 if all(holds for holds, _ in verdicts) else 1


def scaled_down(settings: Settings) -> list[str]:
    """Overrides that keep the configuration's kind and make twelve steps of it take seconds."""
    model = settings.model
    rows = 4 * max(2, settings.compute.ranks)
    tokens = rows * settings.shards.seq_len
    small = ["model.d_model=128"]
    if not isinstance(model.mixer, MambaConfig):
        small.append("model.mixer.n_heads=4")
    if isinstance(model.mixer, AttentionConfig | LinearAttentionConfig):
        small.append("model.mixer.head_dim=null")
    if isinstance(model.mixer, AttentionConfig) and model.mixer.kv_heads < model.mixer.n_heads:
        small.append("model.mixer.n_kv_heads=2")
    if isinstance(model.ffn, FfnConfig):
        small.append("model.ffn.d_ff=256")
    fewer = [f"model.n_layers={min(2, model.n_layers)}"]
    if model.d_model > 128 and not model.pattern:  # a pattern's parts have widths of their own
        fewer += small
    return [
        f"pretrain.global_batch_tokens={tokens}",
        f"pretrain.total_tokens={tokens * STEPS}",
        "pretrain.micro_batch_rows=2",
        "pretrain.compile=off",
        "pretrain.checkpoint.every_steps=3",
        "tracking.mode=off",
        *([] if settings.open_start() else fewer),  # weights to start from are as large as they are
    ]


def log(line: str) -> None:
    """One line of progress on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _make_inputs(settings: Settings, steps: dict[str, Step]) -> None:
    execute(settings, list(steps["pretrain"].sources.values()))


def _share_inputs(settings: Settings, steps: dict[str, Step], store: Path) -> None:
    """The finished inputs under another store: links, so that nothing is made or copied twice."""
    for report in runner.plan(list(steps["pretrain"].sources.values()), store=open_store(settings.store)):
        if report.path is None:
            continue
        link = store / report.name / Path(report.path).name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(report.path).absolute(), target_is_directory=True)


def _train_killed(words: Sequence[str], store: Path) -> int:
    """A training whose driver is killed at a random step, and the same command again; the step of the kill.

    Raises Refusal where every attempt was over before it could be killed.
    """
    for _ in range(ATTEMPTS):
        at = random.SystemRandom().randint(2, STEPS - 4)
        if _train("killed", words, store, kill_at=at):
            _train("killed", words, store)
            return at
        shutil.rmtree(store / "pretrain")
    raise Refusal(
        "certify",
        NO_VALUE,
        f"{ATTEMPTS} trainings ended before they could be killed, so nothing is shown",
        "run it again",
    )


def _train(name: str, words: Sequence[str], store: Path, *, kill_at: int | None = None) -> bool:
    """One `athanor run`; with `kill_at`, SIGKILL its driver when that step is on record. Whether it was killed."""
    log(f"certify: {name}" + (f", to be killed after step {kill_at}" if kill_at is not None else ""))
    file = store / f"{name}.log"
    # Not from the working folder, which may contain another pipelines.py.
    command = [sys.executable, "-P", "-m", "pipelines", "run", *words, f"store={store}", "--until", "pretrain"]
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with file.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        while process.poll() is None:
            if kill_at is not None and len(_records(store)) >= kill_at:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.02)
    if process.returncode != 0:
        raise Refusal(
            f"the {name} training", NO_VALUE, f"it failed with exit code {process.returncode}", f"read its log, {file}"
        )
    return False


def _records(store: Path) -> list[dict[str, Any]]:
    """Whole lines of the run's metrics.jsonl, finished or not."""
    files = sorted([*store.glob(".work/pretrain-*/*/out/metrics.jsonl"), *store.glob("pretrain/*/metrics.jsonl")])
    if not files:
        return []
    newest = max(files, key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in newest.read_bytes().split(b"\n")[:-1]]


def read(store: Path) -> dict[str, Any]:
    """A finished run's records and the content digest of its artifact."""
    [manifest] = store.glob("pretrain/*/manifest.json")
    return {"records": _records(store), "content": json.loads(manifest.read_text())["content_digest"]}


def exact_verdict(straight: dict[str, Any], killed: dict[str, Any], at: int) -> tuple[bool, str]:
    """Whether the interrupted run is the uninterrupted one, bit for bit."""
    pairs = list(zip(straight["records"], killed["records"], strict=False))
    for one, other in pairs:
        for field in EXACT_FIELDS:
            if one.get(field) != other.get(field):
                return (
                    False,
                    f"killed at step {at}: {field} of step {one['step']} is {other.get(field)!r}, not {one.get(field)!r}",
                )
    if len(straight["records"]) != len(killed["records"]):
        return False, f"killed at step {at}: {len(killed['records'])} records, uninterrupted {len(straight['records'])}"
    if straight["content"] != killed["content"]:
        return (
            False,
            f"killed at step {at}: final weights {killed['content'][:16]}, uninterrupted {straight['content'][:16]}",
        )
    return True, f"killed at step {at} and continued: {len(pairs)} steps and the final weights are equal bit for bit"


def regrouped_verdict(
    straight: dict[str, Any], regrouped: dict[str, Any], precision: str, ranks: int
) -> tuple[bool, str]:
    """Whether another number of ranks saw the same batches and, within float tolerance, the same losses."""
    worst = 0.0
    if len(straight["records"]) != len(regrouped["records"]):
        return False, f"on {ranks} ranks: {len(regrouped['records'])} records, expected {len(straight['records'])}"
    for one, other in zip(straight["records"], regrouped["records"], strict=True):
        if one["batch_digest"] != other["batch_digest"]:
            return (
                False,
                f"on {ranks} ranks: step {one['step']} had batch {other['batch_digest']}, expected {one['batch_digest']}",
            )
        worst = max(worst, abs(one["loss"] - other["loss"]) / abs(one["loss"]))
    limit = TOLERANCE[precision]
    words = f"the same batches, losses at most {worst:.1e} apart (relative; {precision} limit {limit:.0e})"
    return worst <= limit, f"on {ranks} ranks: {words}"
