"""What machine a figure was measured on, and where results are written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Date, processor, cores, memory, versions, commit."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "?")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def memory_bandwidth() -> float:
    """Bytes a second that the present threads read of memory too large for any cache, the best of ten passes."""
    import torch

    held = torch.ones(2**28, dtype=torch.float32)
    return held.nbytes / _fastest(lambda: held.sum())


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a product of 2,048 x 2,048 matrices with the present threads, the best of ten."""
    import torch

    x = torch.ones(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / _fastest(lambda: x @ x)


def _fastest(once: Callable[[], object]) -> float:
    """Seconds of the fastest of ten calls."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME-DATE.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
