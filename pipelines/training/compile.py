"""torch.compile of a model's blocks and of its loss over the vocabulary, where possible and configured."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from conf.files import machine_cache
from conf.refusal import Refusal
from model.heads.language import LanguageHead
from model.stack import Stack
from pipelines.training.settings import TrainSettings

CPU_WORTH_FLOPS = 1e14
"""Compiling costs 3 s with code in its cache, 12 s and more without, and gains 5 to 10 % on a CPU
(`benchmarks/compiling.py`): a run below this, some ten minutes on two cores, would hardly earn it back."""


NO_COMPILER = "there is no C++ compiler (g++ or clang++)"


def compile_blocks(model: nn.Module, settings: TrainSettings, device: torch.device) -> str:
    """Compile each block of `model`, and the passes over its logits, if the settings and the machine allow; returns what
    was done, in one line.

    Block by block and not the whole model: the blocks are alike, so one is compiled and all use it. Shapes are static,
    so a resumed run compiles the same code. Raises Refusal for compile=on where it cannot be done.
    """
    whole, blocks = _no_compiler(device), _blocks_impossible(model, settings)
    if settings.compile == "on" and (whole or blocks) is not None:
        raise Refusal(
            "compile",
            "on",
            f"not possible here, {whole or blocks}",
            "use pretrain.compile=auto (of fine-tuning: finetune.train.compile=auto), or off",
        )
    if settings.compile == "off":
        whole = "as set"
    elif settings.compile == "auto":
        whole = _not_worth_it(model, settings, device) or whole
    losses = [module for module in model.modules() if isinstance(module, LanguageHead)]
    if whole is not None or (blocks is not None and not losses):
        return f"compile: off, {whole or blocks}"
    # The default, under /tmp, is emptied when the machine restarts.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(machine_cache() / "inductor"))
    for head in losses:
        head.compile_loss()
    if blocks is not None:
        return f"compile: torch.compile of the loss, not of the blocks: {blocks}"
    for block in _blocks(model):
        block.compile(dynamic=False)
    parts = "blocks and the loss" if losses else "blocks"
    return f"compile: torch.compile of the {parts}; the first step takes longer"


def _blocks(model: nn.Module) -> list[nn.Module]:
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    return [block for stack in stacks for block in stack.layers]


def _no_compiler(device: torch.device) -> str | None:
    return f"{NO_COMPILER}, so steps take 5 to 10 % longer" if _lacks_compiler(device) else None


def _blocks_impossible(model: nn.Module, settings: TrainSettings) -> str | None:
    if settings.zero.stage == 3:
        return "ZeRO stage 3 gathers parameters inside the blocks, which cannot be compiled"
    return None if _blocks(model) else "the model has no stack of blocks"


def _lacks_compiler(device: torch.device) -> bool:
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name is not None]
    return device.type == "cpu" and not any(shutil.which(name) for name in compilers)


def _not_worth_it(model: nn.Module, settings: TrainSettings, device: torch.device) -> str | None:
    """A rule of the settings alone: a resumed run must decide as the first attempt did."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cpu" and 6 * parameters * settings.total_tokens < CPU_WORTH_FLOPS:
        short = "the run is too short to earn back the time it takes"
        return short if not _lacks_compiler(device) else f"{short}; {NO_COMPILER} for a longer one either"
    return None
