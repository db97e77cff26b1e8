"""Claim: masking packed documents costs at most 10 % over plain causal attention, and less than nothing when they are short.

    python benchmarks/attention.py [--threads 2] [--rounds 7] [--write]

Forward and backward of one attention layer in bf16, rows by tokens as in training. The peer is PyTorch's fused kernel,
plain causal without documents, and with the documents as its boolean mask. All take turns; each figure is the median of
its turns' processor time, which other work on the machine disturbs less than it does the clock.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from hardware import machine, write_result

from model.kernels.select import KERNELS
from model.masks import Mask

SHAPES = ((16, 256, 4), (16, 512, 4), (8, 512, 8), (4, 1024, 8))  # rows, tokens, heads of 64 channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {"machine": machine(), "threads": arguments.threads, "shapes": []}
    for rows, tokens, heads in SHAPES:
        measured = measure(rows, tokens, heads, arguments.rounds)
        ours, fused = measured["blockwise, causal"], measured["fused, causal"]
        print(f"{rows} rows x {tokens} tokens, {heads} heads of 64 channels, bf16")
        for name, milliseconds in measured.items():
            ratios = f"{milliseconds / ours:5.2f} of ours causal, {milliseconds / fused:5.2f} of fused"
            print(f"  {name:42} {milliseconds:8.1f} ms  {ratios}")
        result["shapes"].append({"rows": rows, "tokens": tokens, "heads": heads, "milliseconds": measured})
    if arguments.write:
        print(write_result("attention", result))
    else:
        print(json.dumps(result["machine"]))


def measure(rows: int, tokens: int, heads: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of processor time, forward and backward, of every way to attend."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(rows, tokens, heads, 64, generator=generator).bfloat16().requires_grad_() for _ in range(4)
    )
    masks = {
        f"documents of {mean} tokens": documents(rows, tokens, mean) for mean in (tokens // 2, tokens // 4, 64, 16)
    }
    ways = {
        "fused, causal": ("sdpa", Mask()),
        "fused, documents as a boolean mask": ("sdpa", masks[f"documents of {tokens // 4} tokens"]),
        "blockwise, causal": ("blockwise", Mask()),
        "blockwise, one document a row": ("blockwise", documents(rows, tokens, 10**9)),
        **{f"blockwise, {name}": ("blockwise", mask) for name, mask in masks.items()},
    }

    def turn(kernel: str, mask: Mask) -> Callable[[], None]:
        def once() -> None:
            torch.autograd.grad(KERNELS[kernel](q, k, v, mask, 0.125), (q, k, v), grad)

        return once

    runs = {name: turn(*way) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):  # the first is not counted: oneDNN compiles for the shapes it meets
        for name, once in runs.items():
            started = time.process_time()
            once()
            if round_number:
                times[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def documents(rows: int, tokens: int, mean: int) -> Mask:
    """Rows packed with documents of exponentially distributed length."""
    draw = random.Random(0)
    numbers = torch.zeros(rows, tokens, dtype=torch.int32)
    for row in numbers:
        start, number = 0, 1
        while start < tokens:
            length = tokens if mean > tokens else max(1, round(draw.expovariate(1 / mean)))
            row[start : start + length] = number
            start, number = start + length, number + 1
    return Mask(documents_BT=numbers)


if __name__ == "__main__":
    main()
