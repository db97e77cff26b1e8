"""Claim: the training loop makes at least 0.97 of the tokens/s of a plain PyTorch loop.

    python benchmarks/training_loop.py [--experiment demo] [--steps 50] [--rounds 4] [--write] [OVERRIDE ...]

Both sides train the same model in the same precision with the same optimizer, micro-batches, clipping and loader, on
one rank. Ours is `pipelines.training.loop` whole: DeepSpeed, digests, metrics.jsonl. The plain loop is what one writes
by hand: autocast, backward, clip, step. They take turns, so that what else the machine does falls on both. A step of ours
lasts until the next one's record, so that writing it counts. `ratio` is of medians over all steps; of the fastest tenth,
to which other work on the machine has added least, as well. CPU time is that of a long run less that of a short one, so
that starting up drops out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import machine, write_result

from conf.typed import to_plain
from data.loader import open_loader
from data.rows.packing import TokenDocument, pack_stream
from data.rows.shards import ShardSettings, write_manifest, write_shard
from model.build import build_model
from model.config import ModelConfig
from pipelines.settings.compose import compose
from pipelines.training.compile import compile_blocks
from pipelines.training.job import run_rank
from pipelines.training.metrics import read_metrics
from pipelines.training.optim import build_optimizer, learning_rate_scale, set_learning_rates
from pipelines.training.settings import BatchPlan, TrainSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("overrides", nargs="*", help="as for athanor run, such as pretrain.compile=on")
    arguments = parser.parse_args()
    pretraining = compose([f"experiment={arguments.experiment}", "tracking=off", *arguments.overrides]).pretraining()
    config = to_plain(pretraining.model) | {"vocab_size": pretraining.model.vocab_size or 4096}
    train = to_plain(pretraining.train)
    train["checkpoint"] = {"every_seconds": None}
    wall: dict[str, list[float]] = {"ours": [], "plain": []}
    cpu: dict[str, list[float]] = {"ours": [], "plain": []}
    short, long = arguments.steps // 5, arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        shards = random_shards(Path(folder) / "shards", seq_len=config["max_seq_len"], vocab_size=config["vocab_size"])
        job = {"train": train, "model": config, "shards": {"random": str(shards)}, "label": "ours"}
        for turn in range(arguments.rounds + 1):
            for side, loop in (("ours", our_loop), ("plain", plain_loop)):
                spent = {}
                for steps in (short, long):
                    train["total_tokens"] = steps * train["global_batch_tokens"]
                    began = time.process_time()
                    seconds = loop({**job, "out_dir": f"{folder}/{turn}-{steps}"})
                    spent[steps] = time.process_time() - began
                if turn > 0:  # the first turn warms up
                    wall[side] += seconds[2:]
                    cpu[side].append((spent[long] - spent[short]) / (long - short))
    tokens = train["global_batch_tokens"]
    rates = {side: tokens / statistics.median(times) for side, times in wall.items()}
    fastest = {side: tokens / statistics.quantiles(times, n=10)[0] for side, times in wall.items()}
    cpu_rates = {side: tokens / statistics.median(times) for side, times in cpu.items()}
    result = {
        "claim": "the training loop makes at least 0.97 of the tokens/s of a plain PyTorch loop",
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "experiment": [arguments.experiment, *arguments.overrides],
        "load": os.getloadavg()[0],
        "tokens_per_second": {side: round(rate) for side, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["plain"], 3),
        "ratio_of_the_fastest_tenth": round(fastest["ours"] / fastest["plain"], 3),
        "tokens_per_cpu_second": {side: round(rate) for side, rate in cpu_rates.items()},
        "cpu_ratio": round(cpu_rates["ours"] / cpu_rates["plain"], 3),
    }
    print(json.dumps(result, indent=1))
    if arguments.write:
        print(write_result("training_loop", result))


def our_loop(job: dict[str, Any]) -> list[float]:
    """Seconds of each step of ours."""
    run_rank(job)
    times = [row["time"] for row in read_metrics(Path(job["out_dir"]) / "metrics.jsonl")]
    return [later - before for before, later in itertools.pairwise(times)]


def plain_loop(job: dict[str, Any]) -> list[float]:
    """Seconds of each step of the loop one would write by hand."""
    from conf.typed import from_plain

    settings = from_plain(TrainSettings, job["train"])
    model = build_model(from_plain(ModelConfig, job["model"]), seed=settings.seed)
    compile_blocks(model, settings, torch.device("cpu"))
    seq_len = job["model"]["max_seq_len"]
    plan = BatchPlan.derive(settings, seq_len=seq_len, world_size=1, largest_rows=max(1, 8192 // seq_len))
    optimizer = build_optimizer(model, settings.optim)
    seconds = []
    loader = open_loader(
        {"random": Path(job["shards"]["random"])},
        rows_per_step=plan.rows_per_step,
        micro_batch_rows=plan.micro_batch_rows,
    )
    with loader:
        for step in range(plan.total_steps):
            began = time.perf_counter()
            set_learning_rates(
                optimizer, learning_rate_scale(settings.schedule, step=step, total_steps=plan.total_steps)
            )
            batch = next(loader)
            total = 0.0
            for micro_batch in batch.micro_batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                    out = model(**micro_batch)
                loss = out["loss_sum"] / batch.target_count
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
    return seconds


def random_shards(folder: Path, *, seq_len: int, vocab_size: int) -> Path:
    rng = np.random.default_rng(0)
    documents = [
        TokenDocument(
            id=str(i), source="random", position=i, tokens=rng.integers(8, vocab_size, size=int(rng.integers(50, 4000)))
        )
        for i in range(600)
    ]
    rows = pack_stream(documents, seq_len=seq_len, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)
    record = write_shard(
        rows, documents, folder, name="random-00000", rows_per_block=64, vocab_size=vocab_size, counts=Counter()
    )
    write_manifest(folder, [record], settings=ShardSettings(seq_len=seq_len), vocab_size=vocab_size)
    return folder


if __name__ == "__main__":
    main()
