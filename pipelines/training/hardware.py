"""How fast the devices could be, so that how fast they are means something."""

from __future__ import annotations

import ctypes
import functools
import time

import torch

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
CALIBRATION_SECONDS = 0.3


def peak_flops(device: torch.device, precision: str, threads: int) -> tuple[float, str]:
    """FLOP/s this rank's device could reach in `precision`, and where the number comes from.

    From the data sheet for a GPU with a known name, else the best rate of a square matrix product measured here.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = max((key for key in GPU_PEAKS if key in name), key=len, default=None)
        if known is not None:
            peak = GPU_PEAKS[known][0 if precision == "bf16" else 1]
            return peak, f"{name} data sheet, {precision}: {peak / 1e12:,.1f} TFLOP/s"
    size = MATMUL_SIZE if device.type == "cpu" else 8 * MATMUL_SIZE
    peak = _measured(device, precision, threads, size)
    where = f"{threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return peak, f"measured {precision} matmul {size}x{size} on {where}: {peak / 1e9:,.0f} GFLOP/s"


@functools.cache
def _measured(device: torch.device, precision: str, threads: int, size: int) -> float:
    """Best of repeated products in about a third of a second; ranks that share a machine measure side by side."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers are not touched
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    best = float("inf")
    deadline = time.perf_counter() + CALIBRATION_SECONDS
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


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
