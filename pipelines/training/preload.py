"""What every process of a training imports, which takes seconds: for backends that can import it once for all of them.

    LocalBackend(preload=Preload(modules=modules(), environment=ENVIRONMENT, begin=take_threads))

Names alone: neither this file nor whoever asks for them imports any.
"""

from __future__ import annotations

import os
import sys
from glob import glob

ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}
"""DeepSpeed decides for an accelerator when it is imported, and logs a warning unless it is named one."""


def modules() -> tuple[str, ...]:
    """By name. DeepSpeed is not among them where there is a GPU: which accelerator it uses depends on the training."""
    common = ("torch", "pyarrow.parquet", "sentencepiece", "safetensors.torch", "transformers")
    return common if glob("/dev/nvidia[0-9]*") else (*common, "deepspeed")


def take_threads() -> None:
    """As many threads as OMP_NUM_THREADS says, which PyTorch reads only while it is imported."""
    if (torch := sys.modules.get("torch")) is not None and "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].partition(",")[0]))
