"""Experts shared out over ranks: each holds some of every layer's, and tokens travel to them and back by all-to-all
(GShard, https://arxiv.org/abs/2006.16668).

Consecutive ranks form a group that together holds all experts; groups are replicas of each other. The experts leave the
model: DeepSpeed neither reduces nor partitions what it does not see, so reducing their gradients over replicas, their
share of the global norm and their optimizer are here. A checkpoint knows only stretches of whole parameters, experts in
the order of their numbers, so it is read at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from conf.refusal import Refusal
from model.ffns.experts.layer import Experts
from pipelines.training.optim import JointOptimizer, peak_rate
from pipelines.training.pieces import Piece
from pipelines.training.ranks import Ranks
from pipelines.training.settings import TrainSettings


def share_experts(
    model: nn.Module, settings: TrainSettings, ranks: Ranks, log: Callable[[str], None]
) -> ExpertParallel | None:
    """Take the experts out of `model` and share them out; none where each rank keeps all: with zero.expert_parallel=1,
    and frozen ones, which `say` hears of.

    Raises Refusal where the ranks or the experts do not divide, or there are none.
    """
    size = settings.zero.expert_parallel
    if not shared_parameters(model, size, ranks.world_size):
        return None
    found = layers_with_experts(model)
    if not all(parameter.requires_grad for module in found.values() for parameter in module.parameters()):
        log(f"zero.expert_parallel = {size} is left: experts are frozen, so each rank keeps all of them")
        return None
    return ExpertParallel(found, settings, ranks)


def layers_with_experts(model: nn.Module) -> dict[str, Experts]:
    """The routed experts of each layer that has some, by the module's name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def shared_parameters(model: nn.Module, size: int, world_size: int) -> int:
    """How many parameters groups of `size` ranks share. Raises Refusal where they cannot share them equally."""
    if size == 1:
        return 0
    layers = layers_with_experts(model)
    counts = sorted({len(module.down) for module in layers.values()})
    uneven = [count for count in counts if count % size]
    refused = None
    if not layers:
        refused = "the model has no layer with experts", "set zero.expert_parallel=1"
    elif world_size % size:
        refused = f"{world_size} ranks do not divide into groups of {size}", "use as many ranks, or a multiple"
    elif uneven:
        refused = f"a layer has {uneven[0]} experts, which {size} ranks cannot hold equally", "choose a divisor of that"
    if refused is not None:
        raise Refusal("zero.expert_parallel", size, *refused)
    return sum(weight.numel() for layer in layers.values() for weight in layer.parameters())


class ExpertParallel:
    """This rank's experts of every layer, their gradients and their optimizer."""

    def __init__(self, layers: dict[str, Experts], settings: TrainSettings, ranks: Ranks) -> None:
        size = settings.zero.expert_parallel
        self._ranks, self._size, self._clip_norm = ranks, size, settings.clip_norm
        groups = [range(first, first + size) for first in range(0, ranks.world_size, size)]
        replicas = [range(first, ranks.world_size, size) for first in range(size)]
        self._place, self._replica = ranks.rank % size, ranks.rank // size
        # Every rank makes every group, in the same order.
        self._group = [dist.new_group(list(members)) for members in groups][self._replica]
        self._replicas = [dist.new_group(list(members)) for members in replicas][self._place]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._held: dict[str, nn.Parameter] = {}
        for name, experts in layers.items():
            self._take(name, experts)
        optim = settings.optim
        lr = peak_rate(optim, "expert", 3)
        group = {"names": list(self._held), "peak_lr": lr, "muon": False, "weight_decay": optim.weight_decay}
        self._optimizer = torch.optim.AdamW(
            [{"params": list(self._held.values()), **group}],
            lr=lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )

    def _take(self, name: str, experts: Experts) -> None:
        """Leave `experts` without weights, and with the way to where they are now."""
        weights = []
        for local, whole in list(experts.named_parameters()):
            held = nn.Parameter(whole.detach().chunk(self._size)[self._place].clone())
            self._shapes[f"{name}.{local}"], self._held[f"{name}.{local}"] = tuple(whole.shape), held
            weights.append(held)
            delattr(experts, local)
        experts.elsewhere = Exchange(experts, weights, self._group)

    def joint_optimizer(self, rest: torch.optim.Optimizer) -> JointOptimizer:
        """With the optimizer of everything else, for schedules and checkpoints."""
        return JointOptimizer(*(rest.parts if isinstance(rest, JointOptimizer) else (rest,)), self._optimizer)

    def reduce(self) -> None:
        """After the last backward pass of a step: the gradients of all replicas' tokens.

        Losses arrive times the number of ranks, because DeepSpeed takes means; here are sums.
        """
        for held in self._held.values():
            held.grad = torch.zeros_like(held) if held.grad is None else held.grad.div_(self._ranks.world_size)
            if self._ranks.world_size > self._size:
                dist.all_reduce(held.grad, group=self._replicas)

    def total_norm(self, rest: torch.Tensor) -> torch.Tensor:
        """The norm of all gradients, of that of the rest; infinite where one of them is not finite (DeepSpeed says -1)."""
        gradients = [held.grad for held in self._held.values() if held.grad is not None]
        square = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(square, group=self._group)
        total = (rest.to(square.device).square() + square).sqrt().to(rest.device)
        return torch.where(total.isfinite() & (rest >= 0), total, torch.inf)

    def step(self, norm: float) -> None:
        """Clip by the norm of all gradients and update."""
        if self._clip_norm is not None:
            norm_ = torch.tensor(norm, device=self._ranks.device)
            nn.utils.clip_grads_with_norm_(self._held.values(), self._clip_norm, norm_)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients of an update that is dropped."""
        self._optimizer.zero_grad()

    def pieces(self) -> list[Piece]:
        """The stretches that this rank updates."""
        return [
            Piece(name, self._shapes[name], self._place * held.numel(), held.data.view(-1), held, 0)
            for name, held in self._held.items()
        ]

    def pieces_to_write(self) -> list[Piece]:
        """The same in the first replica; the others have nothing new to say."""
        return self.pieces() if self._replica == 0 else []

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All experts of every layer by name; every rank must iterate along."""
        for name, held in self._held.items():
            parts = [torch.empty_like(held.data) for _ in range(self._size)]
            dist.all_gather(parts, held.data, group=self._group)
            yield name, torch.cat(parts)


class Exchange:
    """(x_QD sorted by expert, ends_E) -> y_QD, by way of the ranks that hold the experts."""

    def __init__(self, experts: Experts, weights: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        self._experts, self._group = experts, group
        self._weights = weights

    @torch.compiler.disable
    def __call__(self, x_QD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        size, kept = dist.get_world_size(self._group), int(ends_E[-1])
        sent_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        # How many copies for each of our experts come from each rank, [ranks, our experts].
        coming_E = torch.empty_like(sent_E)
        dist.all_to_all_single(coming_E, sent_E, group=self._group)
        to, back = (counts_E.view(size, -1).sum(1).tolist() for counts_E in (sent_E, coming_E))
        arrived_QD = _Exchanged.apply(x_QD[:kept], to, back, self._group)
        ours = torch.arange(len(sent_E) // size, device=x_QD.device).repeat(size)
        order_Q = ours.repeat_interleave(coming_E).argsort(stable=True)
        ends_of_ours_E = coming_E.view(size, -1).sum(0).cumsum(0).to(torch.int32)
        y_QD = self._experts.through(arrived_QD.index_select(0, order_Q), ends_of_ours_E, *self._weights)
        returned_QD = _Exchanged.apply(y_QD.index_select(0, order_Q.argsort()), back, to, self._group)
        return torch.cat((returned_QD, returned_QD.new_zeros(len(x_QD) - kept, returned_QD.shape[1])))


class _Exchanged(torch.autograd.Function):
    """Rows to the ranks of a group, `to[i]` to rank i, and `back[i]` from it; gradients the other way."""

    @staticmethod
    def forward(ctx: Any, x_QD: torch.Tensor, to: list[int], back: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.way = to, back, group
        y_QD = x_QD.new_empty(sum(back), x_QD.shape[1])
        dist.all_to_all_single(y_QD, x_QD.contiguous(), back, to, group=group)
        return y_QD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to, back, group = ctx.way
        grad_QD = grads[0].new_empty(sum(to), grads[0].shape[1])
        dist.all_to_all_single(grad_QD, grads[0].contiguous(), to, back, group=group)
        return grad_QD, None, None, None
