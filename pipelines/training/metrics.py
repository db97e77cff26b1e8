"""What a run says about itself: metrics.jsonl, a progress line, Weights & Biases; throughput, MFU and goodput."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from conf.refusal import Refusal
from pipelines.training.settings import TrackingSettings
from pipelines.training.wandb_mode import INIT_SECONDS, wandb_mode

METRICS = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 10.0
KINDS = {"start": "model", "pretrain": "model", "finetune": "model", "tokenizer": "tokenizer", "evaluate": "evaluation"}
"""What a step's artifact is called at Weights & Biases, where that is not a dataset."""
Row = dict[str, Any]


class MetricsLog:
    """`metrics.jsonl`, one row per step, floats with every digit they have: equal losses are equal text.

    Rows after `keep_steps` are cut by writing a new file in the place of the old one, so that a process that was
    believed dead goes on writing into a file nobody reads.
    """

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        draft = path.with_name(f".{path.name}.writing")
        self._file: IO[str] = open(draft, "w")  # noqa: SIM115  (closed by `close`)
        for row in read_metrics(path):
            if row["step"] <= keep_steps:
                self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.replace(draft, path)

    def __call__(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; every row is in it already."""
        self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`; none where there is no file, and a line torn by a kill ends them."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


@dataclass
class Speed:
    """MFU = tokens/s x FLOPs per token / peak FLOP/s of all ranks' devices; None where a model's FLOPs are unknown.

    A peak that was measured while the machine was busy can be passed; then what was reached is the peak from there on.
    """

    flops_per_token: float | None
    peak_flops: float

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the peak that this many tokens/s of all ranks make use of; 0.4 is 40 %."""
        if self.flops_per_token is None:
            return None
        reached = tokens_per_second * self.flops_per_token
        self.peak_flops = max(self.peak_flops, reached)
        return reached / self.peak_flops


def summary(rows: list[Row], *, resumed_at_step: int) -> dict[str, Any]:
    """The figures of a whole run. Speed is of this process's steps, the first one left out as it warms up."""
    mine = [row for row in rows if row["step"] > resumed_at_step + 1] or rows[-1:]
    applied = [row for row in rows if not row["skipped"]] or rows
    step_seconds = sum(row["step_seconds"] for row in mine)
    tokens = sum(row["step_tokens"] for row in mine)
    began = rows[0]["time"] - rows[0]["step_seconds"]
    last = applied[-20:]
    speeds = [row["mfu"] for row in mine if row["mfu"] is not None]
    return {
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "rows": rows[-1]["rows"],
        "loss": sum(row["loss"] for row in last) / len(last),
        "final_loss": applied[-1]["loss"],
        "tokens_per_second": tokens / step_seconds,
        "mfu": sum(speeds) / len(speeds) if speeds else None,
        "data_wait_share": sum(row["data_seconds"] for row in mine) / step_seconds,
        # Of the time since the first attempt began: what went into steps that still count.
        "goodput": sum(row["step_seconds"] for row in rows) / max(rows[-1]["time"] - began, 1e-9),
        "skipped_steps": sum(row["skipped"] for row in rows),
        "resumed_at_step": resumed_at_step,
    }


class Progress:
    """One line every ten seconds: where the run is, how fast, how long it will take."""

    def __init__(self, label: str, total_steps: int) -> None:
        self._label, self._total_steps, self._said_at = label, total_steps, 0.0
        self._steps: list[tuple[float, int]] = []

    def __call__(self, row: Row) -> None:
        now = time.monotonic()
        self._steps = [*self._steps[-20:], (now, row["step"])]
        if now - self._said_at < SECONDS_BETWEEN_LINES and row["step"] != self._total_steps:
            return
        self._said_at = now
        print(self.line(row), flush=True)

    def line(self, row: Row) -> str:
        """What is shown of a row: step, loss, tokens/s, MFU, time left."""
        (then, first), (now, step) = self._steps[0], self._steps[-1]
        left = (now - then) / (step - first) * (self._total_steps - step) if step > first else None
        parts = [
            f"{self._label} step {step}/{self._total_steps}",
            f"loss {row['loss']:.4f}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if row["mfu"] is not None:
            parts.append(f"MFU {row['mfu']:.1%}")
        if left is not None:
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures in rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, kw_only=True)
class RunName:
    """Identity of a run at Weights & Biases. label: its job type. digest: of its step."""

    id: str
    label: str
    digest: str = ""

    @classmethod
    def kept(cls, folder: Path, *, label: str, url: str) -> RunName:
        """The run of a training whose logs are in `folder`: drawn once and kept there, beside its checkpoints.

        Not made from what the training is made from: two people who train the same would write into one run.
        """
        path = folder / RUN_ID
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        return cls(id=path.read_text(encoding="utf-8").strip(), label=label, digest=url.rstrip("/").rpartition("/")[2])


RUN_ID = "wandb-run-id"
"""The file in a training's logs that holds its id at Weights & Biases."""


@contextmanager
def _typed_by_the_user(command: str | None) -> Iterator[None]:
    """Weights & Biases records this process's arguments as the run's; in a worker those are Ray's."""
    before = sys.argv
    sys.argv = shlex.split(command) if command else before
    try:
        yield
    finally:
        sys.argv = before


class WandbRun:
    """Weights & Biases for one training run: one id, so a resumed run goes on under it with its own step numbers."""

    def __init__(
        self,
        settings: TrackingSettings,
        mode: Literal["online", "offline"],
        *,
        run: RunName,
        folder: Path,
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        experiment, command = settings.about.get("experiment"), settings.about.get("command")
        with _typed_by_the_user(command):
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                name=settings.name or " ".join(filter(None, (experiment, run.label, run.digest[:8]))),
                tags=list(dict.fromkeys([*filter(None, (experiment, run.label)), *settings.tags])),
                job_type=run.label,
                id=run.id,
                resume="allow",
                mode=mode,
                dir=str(folder),
                config={**settings.about, **config},
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    program=shlex.split(command)[0] if command else None,
                    init_timeout=INIT_SECONDS if settings.mode == "auto" else 90.0,
                ),
            )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def __call__(self, row: Row) -> None:
        figures = {name: value for name, value in row.items() if value is not None}
        figures["perplexity"] = math.exp(min(row["loss"], 100.0))
        figures["data_wait_share"] = row["data_seconds"] / row["step_seconds"]
        # Offline, a resumed run would count from 0 again if it were not told.
        self._run.log(figures, step=row["step"])

    def summary(self, figures: Mapping[str, float]) -> None:
        """Figures of the run as a whole."""
        self._run.summary.update(dict(figures))

    def tables(self, tables: Mapping[str, Table], *, step: int) -> None:
        """Tables by name, at a step after the last that was logged."""
        import wandb

        made = {
            name: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
            for name, table in tables.items()
        }
        self._run.log(made, step=step)

    def lineage(self, url: str, *, inputs: Mapping[str, str], digests: Mapping[str, str]) -> None:
        """Say what this run used and what it made: references to where that is or will be; the bytes stay there.

        url: of what it made; inputs: {name: url}. digests: {name: digest} of all that it was made from.
        """
        for name, used in inputs.items():
            # What `use_artifact` does with a new artifact; that itself is refused offline, and waits for an answer online.
            self._run._log_artifact(_reference(used, {"digest": digests.get(name)}), use_after_commit=True)
        made_from = {name: {"digest": digest, "url": inputs.get(name)} for name, digest in digests.items()}
        self._run.log_artifact(_reference(url, {"made_from": made_from}))

    def close(self, *, failed: bool) -> None:
        """End the run and see that an offline file is whole on the disk."""
        import wandb

        self._run.finish(exit_code=1 if failed else 0)
        wandb.teardown()  # only then is the last of an offline file on the disk
        for path in self._folder.rglob("*"):
            if path.is_symlink():  # `latest-run`: links have no place in a published artifact
                path.unlink()


def _reference(url: str, metadata: dict[str, Any]) -> Any:
    """An artifact at Weights & Biases that is one reference to an artifact of the store, STEP/DIGEST at the end of `url`.

    What one run made and another used is the same there: its name and its one entry follow from the url. Not by
    `add_reference`, which lists a folder's files and refuses one that is yet to be published.
    """
    import wandb
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

    uri = url if "://" in url else Path(url).absolute().as_uri()
    step, digest = (re.sub(r"[^\w.-]", "-", part) for part in uri.rstrip("/").split("/")[-2:])
    artifact = wandb.Artifact(f"{step}-{digest}", type=KINDS.get(step, "dataset"), metadata=metadata)
    artifact.manifest.add_entry(ArtifactManifestEntry.model_validate({"path": digest, "ref": uri, "digest": uri}))
    return artifact


class TrackingRefusal(Refusal):
    """Weights & Biases does not start: what a training is refused for and an evaluation says."""


@contextmanager
def wandb_run(
    settings: TrackingSettings,
    *,
    name: RunName,
    folder: Path,
    config: Mapping[str, Any],
    log: Callable[[str], None] = print,
) -> Iterator[WandbRun | None]:
    """The run at Weights & Biases, or None where none is wanted. Raises TrackingRefusal where it does not start."""
    mode, _ = wandb_mode(settings)
    if mode == "off":
        yield None
        return
    try:
        try:
            run = WandbRun(settings, mode, run=name, folder=folder, config=config)
        except Exception as error:
            if settings.mode != "auto" or mode == "offline" or not _server_is_away(error):
                raise
            import wandb

            wandb.teardown()  # else the run's id is in use
            why = str(error).partition("\n")[0]
            log(f"tracking: Weights & Biases offline after all, its server took no run ({why})")
            run = WandbRun(settings, "offline", run=name, folder=folder, config=config)
    except Exception as error:
        rule, remedy = f"Weights & Biases did not start ({error})", "use tracking.mode=offline, or tracking.mode=off"
        raise TrackingRefusal("tracking.mode", settings.mode, rule, remedy) from error
    failed = True
    try:
        yield run
        failed = False
    finally:
        run.close(failed=failed)


def _server_is_away(error: Exception) -> bool:
    """Whether the server failed, as opposed to refusing the key."""
    from wandb.errors import AuthenticationError, CommError

    return isinstance(error, CommError) and not isinstance(error, AuthenticationError)


def tracking_line(settings: TrackingSettings, url: str) -> str:
    """One line on what is tracked where; url: final location of the run's folder."""
    mode, why = wandb_mode(settings)
    if mode == "off":
        return f"tracking: metrics.jsonl only ({why})"
    if mode == "online":
        return f"tracking: Weights & Biases online, project {settings.project}"
    first = "copy its logs folder to a disk, then " if "://" in url else ""
    runs = f"{url if first else shlex.quote(url)}/logs/wandb/offline-run-*"
    return f"tracking: Weights & Biases offline ({why}); when the step is done: {first}wandb sync {runs}"


def duration(seconds: float) -> str:
    """1h02m, 3m05s or 42s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
