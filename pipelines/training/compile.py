"""torch.compile of a model's blocks, where it can and should be done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from pipelines.training.errors import TrainingError
from pipelines.training.settings import TrainSettings


def compile_blocks(model: nn.Module, settings: TrainSettings, device: torch.device) -> str:
    """Compile each block of `model` if the settings and the machine allow; returns what was done, in one line.

    Block by block and not the whole model: the blocks are alike, so one is compiled and all use it. Shapes are static,
    so a resumed run compiles the same code. Raises TrainingError for compile=on where it cannot be done.
    """
    reason = _why_not(model, settings, device)
    if reason is not None:
        if settings.compile == "on":
            raise TrainingError(f"compile = on: not possible here, {reason}. Use compile=auto or compile=off.")
        return f"compile: off, {reason}"
    # /tmp, the default, is emptied by a restart of the machine.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "athanor" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    for block in _blocks(model):
        block.compile(dynamic=False)
    return "compile: torch.compile of the blocks; the first step takes longer"


def _blocks(model: nn.Module) -> list[nn.Module]:
    stack = getattr(model, "stack", None)
    return list(stack.layers) if stack is not None else []


def _why_not(model: nn.Module, settings: TrainSettings, device: torch.device) -> str | None:
    if settings.compile == "off":
        return "as set"
    if settings.zero.stage == 3:
        return "ZeRO stage 3 gathers parameters inside the blocks, which cannot be compiled"
    if not _blocks(model):
        return "the model has no stack of blocks"
    if device.type == "cpu" and not any(
        shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")
    ):
        return "there is no C++ compiler (g++ or clang++); steps take longer for it"
    return None
