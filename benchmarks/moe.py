"""Claim: a dropless step with experts makes at least 0.80 of the tokens/s of a dense one with equal active FLOPs.

    python benchmarks/moe.py [--threads 2] [--rounds 5] [--experts 8] [--device cpu] [--write]

Two models alike but for their ffn: a dense one of width top_k x F against experts of width F, top_k of them for each
token. The same training step of both: bf16 autocast over fp32 weights, two micro-batches, clipping and fused AdamW,
which has all the experts to update. They take turns; each figure is the fastest turn's wall time, to which other work
on the machine has added least, with the median of processor time beside it. What the experts cost beyond the dense
network is told apart by a step without the optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from hardware import machine, write_result

from model.build import build_model
from model.config import ModelConfig
from model.costs import parameter_counts, train_flops_per_token
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import MoeConfig
from model.mixers.attention import AttentionConfig
from pipelines.training.hardware import keep_freed_memory
from pipelines.training.optim import build_optimizer
from pipelines.training.settings import AdamWSettings

MICRO_BATCHES, ROWS, TOKENS, TOP_K, D_FF = 2, 8, 512, 2, 768
DENSE = ModelConfig(
    vocab_size=4096,
    d_model=512,
    n_layers=4,
    max_seq_len=TOKENS,
    mixer=AttentionConfig(n_heads=8),
    ffn=FfnConfig(d_ff=TOP_K * D_FF),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    experts = replace(DENSE, ffn=MoeConfig(n_experts=arguments.experts, top_k=TOP_K, d_ff=D_FF))
    configs = {"dense": DENSE, "experts": experts}
    wall: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for name, optimized in (("", True), (", no optimizer", False)):
        sides = {side + name: step(config, arguments.device, optimized) for side, config in configs.items()}
        for side, (fastest, processor) in measure(sides, arguments.rounds, arguments.device).items():
            wall[side], cpu[side] = fastest, processor
    tokens = MICRO_BATCHES * ROWS * TOKENS
    result = {
        "claim": "a dropless step with experts makes at least 0.80 of the tokens/s of a dense one, active FLOPs equal",
        "machine": machine(),
        "device": arguments.device,
        "load": os.getloadavg()[0],
        "threads": arguments.threads,
        "experts": f"{arguments.experts}, {TOP_K} for each token, of width {D_FF}; dense {TOP_K * D_FF}",
        "tokens_per_step": tokens,
        "parameters": {side: parameter_counts(config).total for side, config in configs.items()},
        "active": {side: parameter_counts(config).active for side, config in configs.items()},
        "train_flops_per_token": {side: train_flops_per_token(config, TOKENS) for side, config in configs.items()},
        "tokens_per_second": {side: round(tokens / seconds) for side, seconds in wall.items()},
        "processor_seconds": {side: round(seconds, 3) for side, seconds in cpu.items()},
        "ratio": round(wall["dense"] / wall["experts"], 3),
        "ratio_of_processor_time": round(cpu["dense"] / cpu["experts"], 3),
        "ratio_without_optimizer": round(wall["dense, no optimizer"] / wall["experts, no optimizer"], 3),
    }
    print(json.dumps(result, indent=1))
    if arguments.write:
        print(write_result("moe", result))


def step(config: ModelConfig, device: str, optimized: bool) -> Callable[[], None]:
    """One training step over random rows."""
    model = build_model(config, device=device).train()
    optimizer = build_optimizer(model, AdamWSettings(lr=1e-4))
    generator = torch.Generator().manual_seed(0)

    def once() -> None:
        for _ in range(MICRO_BATCHES):
            tokens_BT = torch.randint(0, 4096, (ROWS, TOKENS), generator=generator).to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                out = model(tokens_BT, targets_BT=tokens_BT.roll(-1, 1))
            (out["loss_sum"] / (MICRO_BATCHES * ROWS * TOKENS)).backward()
        if optimized:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()

    return once


def measure(sides: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Fastest wall seconds and median processor seconds of each; the first turn is not counted."""
    wall: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, once in sides.items():
            started, spent = time.perf_counter(), time.process_time()
            once()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                wall[side].append(time.perf_counter() - started)
                cpu[side].append(time.process_time() - spent)
    return {side: (min(wall[side]), statistics.median(cpu[side])) for side in sides}


if __name__ == "__main__":
    main()
