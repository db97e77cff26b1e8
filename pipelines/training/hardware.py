"""How fast the devices could be, so that how fast they are means something."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from conf.files import machine_cache

# Dense peak FLOP/s from the vendors' data sheets, without sparsity: (bf16 tensor cores, fp32 outside them).
GPU_PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 75e12),
    "H200": (989.4e12, 66.9e12),
    "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989.4e12, 66.9e12),
    "GH200": (989.4e12, 66.9e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}
MATMUL_SIZE = 1024
CALIBRATION_SECONDS = 0.5
ANOTHER_MEASURES_SECONDS = 10.0
"""Timeout of waiting for another process's measurement, before measuring here too."""


def peak_flops(device: torch.device, precision: str, threads: int) -> tuple[float, str]:
    """FLOP/s this rank's device could reach in `precision`, and where the number comes from.

    From the data sheet for a GPU with a known name, else the best rate of a square matrix product, measured here once and
    kept for this machine, so that runs of one machine are shares of one number.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = max((key for key in GPU_PEAKS if key in name), key=len, default=None)
        if known is not None:
            peak = GPU_PEAKS[known][0 if precision == "bf16" else 1]
            return peak, f"{name} data sheet, {precision}: {peak / 1e12:,.1f} TFLOP/s"
    size = MATMUL_SIZE if device.type == "cpu" else 8 * MATMUL_SIZE
    found, where = _kept(device, precision, threads, size)
    unit = f"{threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return found["best"], (
        f"measured {precision} matmul {size}x{size} on {unit}: {found['best'] / 1e9:,.0f} GFLOP/s (median "
        f"{found['median'] / 1e9:,.0f}, load {found['load']:.1f}, {found['date']}, {where})"
    )


def peaks_file() -> Path:
    """Cache file of a machine's measured peaks."""
    return machine_cache() / "peak-flops.json"


def _kept(device: torch.device, precision: str, threads: int, size: int) -> tuple[dict[str, Any], str]:
    """The measurement under these conditions and its file; measured if missing, by one process at a time."""
    unit = platform.processor() or platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    parts = (platform.node(), unit, f"{os.cpu_count()} cores", f"{threads} threads", precision, size, torch.__version__)
    conditions, path = ", ".join(map(str, parts)), peaks_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            kept = _read(path)
            found = kept.get(conditions)
            if not (isinstance(found, dict) and {"best", "median", "products", "load", "date"} <= found.keys()):
                found = None
            if found is None or _was_disturbed(found):
                found = max(filter(None, (found, _measure(device, precision, size))), key=lambda each: each["best"])
                draft = path.with_name(f".{path.name}.{os.getpid()}")
                draft.write_text(json.dumps(kept | {conditions: found}, indent=1) + "\n")
                os.replace(draft, path)
            return found, f"kept in {path}"
    except OSError as error:
        return _measure(device, precision, size), f"not kept, so another run's may differ: {error}"


def _was_disturbed(found: dict[str, Any]) -> bool:
    """Whether a measurement was taken under load that has ended: at a load of 15, a core of 870 GFLOP/s was
    seen to reach 151."""
    return found["load"] > (os.cpu_count() or 1) / 2 and os.getloadavg()[0] < found["load"] / 2


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold while no other process measures, or after a timeout."""
    with open(lock, "w") as file:
        deadline = time.monotonic() + ANOTHER_MEASURES_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield


def _measure(device: torch.device, precision: str, size: int) -> dict[str, Any]:
    """FLOP/s of repeated products in half a second, with time and load of the measurement."""
    load = os.getloadavg()[0]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers are not touched
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    seconds: list[float] = []
    deadline = time.perf_counter() + CALIBRATION_SECONDS
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {
        "best": 2 * size**3 / min(seconds),
        "median": 2 * size**3 / statistics.median(seconds),
        "products": len(seconds),
        "load": load,
        "date": datetime.date.today().isoformat(),
    }


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of giving them back to the kernel after each tensor.

    By default every large activation is mapped and page-faulted afresh; on two cores this took 6 to 14 % of a step. Does
    nothing where the C library has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    m_mmap_max, m_trim_threshold, m_top_pad = -4, -1, -2
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 1 << 28)
