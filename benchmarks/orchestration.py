"""Overhead of the orchestration: an experiment through Ray against the same stage functions called in one process.

    python benchmarks/orchestration.py experiment=demo [--repeat 1] [--write]

Both sides make every artifact from nothing, in stores of their own, on this machine: `through_ray` is `athanor run`,
`in_process` the same command with the backend that calls the stages' functions here (no Ray, no worker processes). Told
are both wall times, their ratio, and the fixed start-up: by how much Ray, and as many gangs as the experiment has, take
longer than the same in one process when ranks only load what training loads. Limit: 1.10 times the time in one process,
plus the start-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hardware import machine, write_result

IN_PROCESS = """
import sys
from pipelines.engine import runner
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.store.open import open_store
from pipelines.graph import build
from pipelines.settings.compose import compose
if __name__ == "__main__":
    settings = compose(sys.argv[1:])
    steps = list(build(settings).values())
    runner.run(steps, store=open_store(settings.store), backend=LocalBackend(in_process=True))
"""


STARTUP = """
import sys
from pathlib import Path
from pipelines.engine import runner
from pipelines.engine.backends.ray_backend import RayBackend
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.step import Step
from pipelines.engine.store.open import open_store
from pipelines.settings.compose import compose

def rank(config):
    import pipelines.training.job
    import deepspeed

def run(settings, inputs, out_dir, ctx):
    for _ in range(int(settings["gangs"])):
        ctx.gang(rank, {}, workers=1, cpus_per_worker=settings["cpus"])
    (out_dir / "nothing").touch()
    return {}

if __name__ == "__main__":
    kind, store, gangs, *overrides = sys.argv[1:]
    settings = {"gangs": gangs, "cpus": compose(overrides).compute.cpus}
    backend = RayBackend() if kind == "ray" else LocalBackend(in_process=True)
    nothing = Step(name="nothing", kind="nothing", run=run, version=1, settings=settings)
    runner.run([nothing], store=open_store(store), backend=backend)
    backend.close()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["experiment=demo"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/orchestration-DATE.json")
    options = parser.parse_intermixed_args()
    result: dict[str, object] = {"overrides": options.overrides, **machine()}
    for name, command in (
        ("in_process", [sys.executable, "-c", IN_PROCESS]),
        ("through_ray", [sys.executable, "-m", "pipelines", "run"]),
    ):
        runs = [timed(command, options.overrides) for _ in range(options.repeat)]
        result[name] = min(runs, key=lambda run: run["seconds"])
    ray, plain = result["through_ray"], result["in_process"]
    gangs = sum(step in ray["steps"] for step in ("pretrain", "finetune"))
    startup, nothing = (
        min(startup_seconds(kind, gangs, options.overrides) for _ in range(2)) for kind in ("ray", "in_process")
    )
    startup -= nothing
    result["gangs"], result["startup_seconds"] = gangs, round(startup, 1)
    result["difference_seconds"] = ray["seconds"] - plain["seconds"]
    result["ratio"] = ray["seconds"] / plain["seconds"]
    result["ratio_beside_startup"] = (ray["seconds"] - startup) / plain["seconds"]
    result["holds"] = result["ratio_beside_startup"] <= 1.10
    result["step_ratio"] = sum(ray["steps"].values()) / sum(plain["steps"].values())
    print(json.dumps(result, indent=1))
    if options.write:
        write_result("orchestration", result)


def startup_seconds(kind: str, gangs: int, overrides: list[str]) -> float:
    """Seconds of a whole command that runs that many gangs, one after the other, which compute nothing."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "startup.py"
        program.write_text(STARTUP)
        began = time.perf_counter()
        subprocess.run([sys.executable, str(program), kind, f"{folder}/store", str(gangs), *overrides], check=True)
        return time.perf_counter() - began


def timed(command: list[str], overrides: list[str]) -> dict[str, object]:
    """Wall seconds of one run from nothing, and of each step by its manifest."""
    with tempfile.TemporaryDirectory() as store:
        began = time.perf_counter()
        subprocess.run([*command, *overrides, f"store={store}"], check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - began
        manifests = [json.loads(path.read_text()) for path in Path(store).glob("*/*/manifest.json")]
    return {
        "seconds": seconds,
        "steps": {manifest["step"]: manifest["seconds"] for manifest in manifests},
        "figures": {
            f"{manifest['step']}.{name}": value
            for manifest in manifests
            if manifest["step"] in ("pretrain", "evaluate")
            for name, value in manifest["metrics"].items()
            if isinstance(value, int | float)
        },
    }


if __name__ == "__main__":
    main()
