"""A small graph with one step of every sort, as a program that tests start, kill and start again."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.engine.backends.base import Backend
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.backends.ray_backend import RayBackend
from pipelines.engine.events import Event
from pipelines.engine.runner import run
from pipelines.engine.step import Context, Inputs, Step
from pipelines.engine.store.open import Store, open_store


def count_letters(payload: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """One shard: a file that depends on the payload only."""
    time.sleep(payload["seconds"])
    (out_dir / "letters").mkdir()
    (out_dir / "letters" / f"{payload['name']}.txt").write_text(payload["name"] * 1000)
    return {"letters": len(payload["name"]) * 1000}


def shards_stage(settings: Any, inputs: Any, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Shards in worker processes, then a summary in the driver."""
    names = [f"shard{number}" for number in range(settings["shards"])]
    payloads = {name: {"name": name, "seconds": float(os.environ.get("SHARD_SECONDS", "0"))} for name in names}
    results = ctx.map_shards(count_letters, payloads, label="letters")
    ctx.map_shards(count_letters, payloads, label="again", scratch=True)
    total = sum(result["letters"] for result in results.values())
    kept = sorted(path.name for path in (ctx.scratch / "letters").iterdir())
    (out_dir / "summary.txt").write_text(f"{total} {kept}\n")
    return {"letters": total}


def steps_stage(settings: Any, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """A loop that continues by itself from the checkpoints it finds."""
    checkpoints = out_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    done = max((int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()), default=0)
    state = int((checkpoints / str(done)).read_text()) if done else inputs.one("letters").metrics["letters"]
    for step in range(done + 1, settings["steps"] + 1):
        state = (state * 31 + step) % 1_000_003
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        (checkpoints / f"{step}.part").write_text(str(state))
        os.replace(checkpoints / f"{step}.part", checkpoints / str(step))
        ctx.keep("checkpoints")
        ctx.progress("steps", step, settings["steps"])
    for path in checkpoints.glob("*.part"):
        path.unlink()
    (out_dir / "log.txt").write_text(f"process {os.getpid()} started at step {done}")
    (out_dir / "final.txt").write_text(str(state))
    return {"state": state}


def rank(config: dict[str, Any]) -> dict[str, Any]:
    """One rank of a gang; the one told to dies the first time."""
    number, folder = int(os.environ["RANK"]), Path(config["folder"])
    print(f"this is rank {number}", flush=True)
    (folder / f"rank{number}.txt").write_text(os.environ["WORLD_SIZE"])
    time.sleep(config["seconds"])
    return {"world_size": int(os.environ["WORLD_SIZE"])}


def gang_stage(settings: Any, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Two ranks at once."""
    seconds = float(os.environ.get("GANG_SECONDS", "0"))
    return dict(ctx.gang(rank, {"folder": str(out_dir), "seconds": seconds}, workers=2))


def graph(shards: int = 4, steps: int = 5) -> list[Step]:
    """letters → walk, and beside it a gang."""
    letters = Step(name="letters", kind="letters", run=shards_stage, version=1, settings={"shards": shards})
    walk = Step(
        name="walk",
        kind="walk",
        run=steps_stage,
        version=1,
        settings={"steps": steps},
        inputs={"letters": {"letters": letters}},
        volatile=("log.txt",),
        resumes=True,
    )
    gang = Step(
        name="gang",
        kind="gang",
        run=gang_stage,
        version=1,
        settings={},
        inputs={"letters": {"letters": letters}},
        cpus=2,
    )
    return [walk, gang]


def tell(event: Event) -> None:
    """Events as lines, for the test that reads them."""
    print(f"{event.kind} {event.step} {event.label} {event.done:g} {event.line}", flush=True)


def make(store: Store, backend: Backend, targets: list[Step]) -> dict[str, str]:
    """Run and return {step: content digest}."""
    reports = run(targets, store=store, backend=backend, on_event=tell)
    found = {report.name: store.find(report.name, report.digest) for report in reports}
    return {name: artifact.content_digest for name, artifact in found.items() if artifact is not None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--backend", default="local", choices=["local", "in-process", "ray"])
    parser.add_argument("--target", type=int, help="only this one of the targets")
    parser.add_argument("--ttl", type=float, default=60.0)
    chosen = parser.parse_args()
    backends = {
        "local": lambda: LocalBackend(cpus=2),
        "in-process": lambda: LocalBackend(cpus=2, in_process=True),
        "ray": lambda: RayBackend(cpus=2),
    }
    targets = graph() if chosen.target is None else [graph()[chosen.target]]
    try:
        for name, content in make(
            open_store(chosen.store, ttl_seconds=chosen.ttl), backends[chosen.backend](), targets
        ).items():
            print(f"made {name} {content}", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
