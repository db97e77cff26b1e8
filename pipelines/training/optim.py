"""Parameter roles to optimizer groups, the optimizers, and the schedules that move their learning rates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from model.init import NO_WEIGHT_DECAY, Role, parameter_roles
from pipelines.training.settings import MuonSettings, OptimSettings, ScheduleSettings

Group = dict[str, Any]


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of `settings` over the parameters of `model` that are trained, one group for each treatment.

    Each group keeps its peak learning rate as `peak_lr`. Raises Refusal where nothing is to be trained.
    """
    groups = parameter_groups(model, settings)
    if not groups:
        rule = "no parameter of the model is to be trained: all are frozen"
        raise Refusal("optimizer", NO_VALUE, rule, "train some, or add adapters")
    adamw_groups = [group for group in groups if not group["muon"]]
    betas = (settings.beta1, settings.beta2)
    # Every group has its own rate; these defaults are unused.
    adamw = torch.optim.AdamW(adamw_groups, lr=0.0, betas=betas, eps=settings.eps, fused=True)
    if not isinstance(settings, MuonSettings):
        return adamw
    matrices = [group for group in groups if group["muon"]]
    muon = torch.optim.Muon(matrices, lr=0.0, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw")
    return JointOptimizer(muon, adamw)


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[Group]:
    """Groups in the order of their first parameter: `params`, `names`, `peak_lr`, `weight_decay` and `muon`."""
    roles = parameter_roles(model)
    groups: dict[tuple[float, float, bool], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = roles[name]
        muon = isinstance(settings, MuonSettings) and role == "matrix" and parameter.ndim == 2
        lr = peak_rate(settings, role, parameter.ndim)
        decay = 0.0 if role in NO_WEIGHT_DECAY else settings.weight_decay
        treatment = {"lr": lr, "peak_lr": lr, "weight_decay": decay, "muon": muon}
        group = groups.setdefault((lr, decay, muon), {"params": [], "names": [], **treatment})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def peak_rate(settings: OptimSettings, role: Role, ndim: int) -> float:
    """The peak learning rate of a parameter with this role and `ndim` axes."""
    rate = {"embedding": settings.embedding_lr, "head": settings.head_lr}.get(role)
    if isinstance(settings, MuonSettings) and role == "matrix" and ndim == 2:
        rate = settings.matrix_lr
    elif isinstance(settings, MuonSettings) and ndim > 1 and role in ("matrix", "router", "expert"):
        rate = settings.expert_lr
    rate = rate or settings.lr
    if isinstance(rate, str):
        raise Refusal("learning rate", rate, "training takes numbers", "derive them first, with `rates.derived`")
    return rate


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers, each over its own groups, as the one that DeepSpeed and checkpoints see."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        # The very groups and the one state, so that what is set or loaded here is what the parts use.
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.state = defaultdict(dict)
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every part."""
        for part in self.parts:
            part.step(closure)


def learning_rate_scale(settings: ScheduleSettings, *, step: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by in update `step`, counted from 0.

    Warmup goes up linearly and gives 1/warmup_steps in step 0; after it the progress p runs from 0 towards 1:
    cosine f + (1 - f)(1 + cos πp)/2, linear f + (1 - f)(1 - p), wsd 1 and then linear over the last steps.
    """
    warmup_steps = round(settings.warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if settings.shape == "constant":
        return 1.0
    decay_steps = total_steps - warmup_steps
    if settings.shape == "wsd":
        decay_steps = min(decay_steps, round(settings.decay_fraction * total_steps))
    progress = max(0, step - (total_steps - decay_steps)) / max(1, decay_steps)
    height = (1 + math.cos(math.pi * progress)) / 2 if settings.shape == "cosine" else 1 - progress
    return settings.final_fraction + (1 - settings.final_fraction) * height


def set_learning_rates(optimizer: torch.optim.Optimizer, scale: float) -> float:
    """Give every group its peak times `scale`; returns the first group's, for reports."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    return float(optimizer.param_groups[0]["lr"])
