"""Claims: masking packed documents costs at most 10 % over plain causal attention, and less than nothing when they are
short; no attention holds T² of anything; a window's time, Longformer's and BigBird's grow linearly with T.

    python benchmarks/attention.py [--threads 2] [--rounds 7] [--longest 16384] [--write]

Forward and backward of one attention layer in bf16, rows by tokens as in training. The peer is PyTorch's fused kernel,
plain causal without documents, and with the documents as its boolean mask. All take turns, each with documents of other
lengths, as training has them (oneDNN compiles for every shape it has not met); each figure is the median of
its turns' processor time, which other work on the machine disturbs less than it does the clock.

Memory is the peak of what PyTorch's allocator says it holds, in the trace of its profiler: every tensor of the forward
and the backward pass, the inputs and gradients too, and nothing that the process holds for other reasons.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from hardware import machine, write_result

from model.kernels.select import KERNELS, select_kernel
from model.masks import Mask

SHAPES = ((8, 256, 2), (16, 256, 4), (16, 512, 4), (8, 512, 8), (4, 1024, 8))  # rows, tokens, heads of 64 channels
FUSED_LONGEST = 8192  # its boolean mask is 64 MiB there, and what it makes of it ten times that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=int, default=16384)
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
    result["lengths"] = lengths(arguments.longest)
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
    means = (4 * tokens, tokens, tokens // 2, tokens // 4, 64, 16)
    ways = {
        "fused, causal": ("sdpa", None),
        "fused, documents as a boolean mask": ("sdpa", tokens // 4),
        "blockwise, causal": ("blockwise", None),
        "blockwise, one document a row": ("blockwise", 10**9),
        **{f"blockwise, documents of {mean} tokens": ("blockwise", mean) for mean in means},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first is not counted: oneDNN compiles for the shapes it meets
        for name, (kernel, mean) in ways.items():
            mask = Mask() if mean is None else documents(rows, tokens, mean, seed=turn)
            started = time.process_time()
            torch.autograd.grad(KERNELS[kernel](q, k, v, mask, 0.125), (q, k, v), grad)
            if turn:
                times[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def lengths(longest: int) -> dict[str, list[dict[str, float]]]:
    """Peak bytes and milliseconds for one row of 1,024 tokens, 2,048 …; 8 heads of 64 channels, bf16."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in long_masks(1024)}
    tokens = 1024
    while tokens <= longest:
        for name, mask in long_masks(tokens).items():
            if tokens <= FUSED_LONGEST or not name.startswith("fused"):
                found[name].append({"tokens": tokens, **one_length(name, mask, tokens)})
        tokens *= 2
    for name, rows in found.items():
        print(f"{name:42} " + ", ".join(f"{r['tokens']}: {r['peak_mib']} MiB {r['milliseconds']:.0f} ms" for r in rows))
    return found


def one_length(name: str, mask: Mask, tokens: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, tokens, 8, 64, generator=generator).bfloat16().requires_grad_() for _ in range(4))
    attend = select_kernel("sdpa" if name.startswith("fused") else "auto")

    def once() -> None:  # a fresh mask, so that lowering it is measured too
        torch.autograd.grad(attend(q, k, v, replace(mask), 0.125), (q, k, v), grad)

    held, times = peak_bytes(once), []
    for _ in range(3):
        started = time.process_time()
        once()
        times.append(1e3 * (time.process_time() - started))
    return {"peak_mib": round(held / 2**20, 1), "milliseconds": round(statistics.median(times), 1)}


def long_masks(tokens: int) -> dict[str, Mask]:
    """Masks of one long row; blocks as BigBird has them: 3 around the diagonal, 3 drawn, the first and the last."""
    first = (torch.arange(tokens) == 0)[None]
    count = tokens // 64
    block = torch.arange(count)
    layout = (block[:, None] - block).abs() <= 1
    drawn = torch.randint(0, count, (count, 3), generator=torch.Generator().manual_seed(0))
    layout[block[:, None], drawn] = True
    layout[[0, -1]] = layout[:, [0, -1]] = True
    return {
        "fused, documents of 1,024 tokens": documents(1, tokens, 1024),
        "causal": Mask(),
        "documents of 1,024 tokens": documents(1, tokens, 1024),
        "documents that look at an encoder's": Mask(
            causal=False,
            documents_BT=documents(1, tokens, 1024).documents_BT,
            key_documents_BS=documents(1, tokens, 1024).documents_BT,
        ),
        "window of 256 tokens": Mask(window=256),
        "Longformer: 256 each way, one global token": Mask(causal=False, window=257, globals_BT=first),
        "BigBird: blocks of 64": Mask(causal=False, layout_HQJ=layout[None]),
    }


def peak_bytes(once: Callable[[], None]) -> int:
    """The most that PyTorch's allocator held at a time, beyond what it held before."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            once()
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    held = [event["args"] for event in events if event.get("name") == "[memory]"]
    return max(event["Total Allocated"] for event in held) - (held[0]["Total Allocated"] - held[0]["Bytes"])


def documents(rows: int, tokens: int, mean: int, seed: int = 0) -> Mask:
    """Rows packed with documents of exponentially distributed length; what a row cuts off begins the next one."""
    draw = random.Random(seed)
    numbers_BT = torch.zeros(rows, tokens, dtype=torch.int32)
    flat, start, number = numbers_BT.view(-1), 0, 1
    while start < len(flat):
        length = max(1, round(draw.expovariate(1 / mean)))
        flat[start : start + length] = number
        start, number = start + length, number + 1
    return Mask(documents_BT=numbers_BT)


if __name__ == "__main__":
    main()
