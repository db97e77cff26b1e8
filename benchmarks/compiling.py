"""Claim: `pretrain.compile=auto` compiles where that pays, and not where it costs.

    python benchmarks/compiling.py [--experiment demo-30min] [--steps 30] [--rounds 3] [--write] [OVERRIDE ...]

The training loop whole on one rank, compiled and not, taking turns, each time in a new process, as a run is. A step lasts
until the next one's record, and counts from the third on. What comes before the first record holds the compiling: all
of it in the first round, what the cache on disk leaves in the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hardware import machine, write_result
from training_loop import our_loop, random_shards

from conf.typed import to_plain
from pipelines.settings.compose import compose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo-30min")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", metavar="JOB", help="run this job alone and print its steps' seconds")
    parser.add_argument("overrides", nargs="*", help="as for athanor run, such as pretrain.precision=fp32")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(our_loop(json.loads(Path(arguments.one).read_text()))))
        return
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    until_first: dict[str, list[float]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATHANOR_CACHE"] = folder  # nothing compiled before
        job = job_of(arguments.experiment, arguments.overrides, steps=arguments.steps, folder=Path(folder))
        for turn in range(arguments.rounds):
            for compiled in seconds:
                began = time.perf_counter()
                times = run_alone(job, compiled, Path(folder) / f"{compiled}-{turn}")
                until_first[compiled].append(time.perf_counter() - began - sum(times))
                seconds[compiled] += times[2:]
    tokens = job["train"]["global_batch_tokens"]
    rates = {compiled: tokens / statistics.median(times) for compiled, times in seconds.items()}
    fastest = {compiled: tokens / statistics.quantiles(times, n=10)[0] for compiled, times in seconds.items()}
    result = {
        "claim": "compile=auto compiles where that pays",
        "machine": machine(),
        "experiment": [arguments.experiment, *arguments.overrides],
        "load": os.getloadavg()[0],
        "tokens_per_second": {compiled: round(rate) for compiled, rate in rates.items()},
        "ratio": round(rates["on"] / rates["off"], 3),
        "ratio_of_the_fastest_tenth": round(fastest["on"] / fastest["off"], 3),
        "seconds_without_the_steps": {
            compiled: [round(each, 1) for each in times] for compiled, times in until_first.items()
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.write:
        print(write_result("compiling", result))


def job_of(experiment: str, overrides: list[str], *, steps: int, folder: Path) -> dict[str, Any]:
    pretraining = compose([f"experiment={experiment}", "tracking=off", *overrides]).pretraining()
    config = to_plain(pretraining.model) | {"vocab_size": pretraining.model.vocab_size or 4096}
    train = to_plain(pretraining.train)
    train |= {"checkpoint": {"every_seconds": None}, "total_tokens": steps * train["global_batch_tokens"]}
    shards = random_shards(folder / "shards", seq_len=config["max_seq_len"], vocab_size=config["vocab_size"])
    return {"train": train, "model": config, "shards": {"random": str(shards)}, "label": "compiling"}


def run_alone(job: dict[str, Any], compiled: str, out_dir: Path) -> list[float]:
    """Seconds of each step of `job` in a process of its own, from each record to the next."""
    path = out_dir.with_suffix(".json")
    path.write_text(json.dumps({**job, "train": job["train"] | {"compile": compiled}, "out_dir": str(out_dir)}))
    done = subprocess.run([sys.executable, __file__, "--one", str(path)], capture_output=True, text=True, check=True)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


if __name__ == "__main__":
    main()
