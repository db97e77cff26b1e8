"""The only door to DeepSpeed: everything it is told, and what of its inner state a checkpoint needs.

Why torch autocast and not DeepSpeed's own bf16 mode: with bf16 weights and fp32 sums DeepSpeed refuses stage 0 and uses
an optimizer of its own for stage 1. fp32 weights under autocast give the same numbers in all four stages, are their own
master weights, and cost the same memory at stage 1 (4 bytes of weight and 4 of gradient, against 2 + 4 + 2). Nothing is
communicated in bf16; what stage 3 gathers is therefore twice as large.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipelines.training.expert_parallel import ExpertParallel
from pipelines.training.pieces import Piece
from pipelines.training.ranks import Ranks
from pipelines.training.settings import BatchPlan, TrainSettings


class ZeroEngine:
    """A model and its optimizer under one ZeRO stage."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        settings: TrainSettings,
        plan: BatchPlan,
        ranks: Ranks,
        experts: ExpertParallel | None = None,
    ) -> None:
        """experts: those that were taken out of `model` to be shared out."""
        self._deepspeed = _import_deepspeed(ranks.device)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.config = ds_config(settings, plan, parameters=trained)
        self.optimizer = optimizer if experts is None else experts.joint_optimizer(optimizer)
        self._experts = experts
        self._stage, self._ranks, self._clip_norm = settings.zero.stage, ranks, settings.clip_norm
        self._linear, self._open = nn.functional.linear, True
        with _quiet():
            self._engine = self._deepspeed.initialize(model=model, optimizer=optimizer, config=dict(self.config))[0]
        # Alone there is nothing to reduce, and stage 0 would copy every gradient to a bucket and back.
        self._engine.enable_backward_allreduce = self._stage > 0 or ranks.world_size > 1
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if experts is not None and self._stage > 0:
            # DeepSpeed clips by, and drops an update for, the norm of what it holds; here is more.
            wrapper = self._engine.optimizer
            of_the_rest = wrapper.scaled_global_norm
            wrapper.scaled_global_norm = lambda *_, **__: experts.total_norm(of_the_rest())

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's answer to one micro-batch; the keys of `batch` are its keyword names."""
        out: dict[str, torch.Tensor] = self._engine(**batch)
        return out

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of this micro-batch's share of the step's loss; `last`: it is the rank's last of the step.

        The sum over micro-batches and ranks is what counts, so DeepSpeed's mean over ranks is undone here and its mean
        over micro-batches is not asked for.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._ranks.world_size, scale_wrt_gas=False)

    def step(self) -> tuple[float, bool]:
        """Clip and update; returns the global gradient norm before clipping, and whether the update was applied.

        An update with an infinite or NaN gradient is dropped.
        """
        if self._experts is not None:
            self._experts.reduce()
        norm, applied = self._step_of_the_rest()
        if self._experts is not None:
            self._experts.step(norm) if applied else self._experts.zero_grad()
        return norm, applied

    def _step_of_the_rest(self) -> tuple[float, bool]:
        if self._stage == 0:
            # DeepSpeed's stage 0 clips without telling the norm, and applies an update that is not finite.
            limit = float("inf") if self._clip_norm is None else self._clip_norm
            total = nn.utils.get_total_norm([p.grad for p in self._named.values() if p.grad is not None])
            total = total if self._experts is None else self._experts.total_norm(total)
            norm = total.item()
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return norm, False
            if norm + 1e-6 > limit:  # below, every gradient would be read and written to be multiplied by 1
                nn.utils.clip_grads_with_norm_(self._named.values(), limit, total)
            self._engine.step()
            return norm, True
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied())

    def pieces(self) -> list[Piece]:
        """The stretches this rank updates; in stage 0 they are all there is, in every rank, but for experts."""
        return self._pieces_of_the_rest() + ([] if self._experts is None else self._experts.pieces())

    def _pieces_of_the_rest(self) -> list[Piece]:
        if self._stage == 0:
            return [Piece(name, tuple(p.shape), 0, p.data.view(-1), p, 0) for name, p in self._named.items()]
        find = _sharded_piece if self._stage == 3 else _flat_piece
        found = (find(name, p, self._engine.optimizer, self._ranks) for name, p in self._named.items())
        return [piece for piece in found if piece is not None]

    def pieces_to_write(self) -> list[Piece]:
        """This rank's share of them: over all ranks, each element of each trained parameter exactly once."""
        pieces = self._pieces_of_the_rest()
        pieces = pieces[self._ranks.rank :: self._ranks.world_size] if self._stage == 0 else pieces
        return pieces + ([] if self._experts is None else self._experts.pieces_to_write())

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every buffer and parameter by name, whole, in rank 0. Other ranks must iterate along; in stage 3 they get no
        parameter."""
        yield from self.buffers()
        for name, parameter in self._engine.module.named_parameters():
            if self._stage < 3:
                yield name, parameter.detach()
                continue
            with self._deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach() if self._ranks.is_first else torch.empty(0)
        if self._experts is not None:
            yield from self._experts.full_weights()

    @property
    def model(self) -> nn.Module:
        """The model itself, its parameters in pieces under stage 3."""
        model: nn.Module = self._engine.module
        return model

    def buffers(self) -> list[tuple[str, torch.Tensor]]:
        """What the model keeps beside its parameters, by name: whole and the same in every rank, in every stage."""
        kept = self.model.state_dict(keep_vars=True)
        return [(name, buffer) for name, buffer in self.model.named_buffers() if name in kept]

    def hyperparameters(self) -> list[dict[str, Any]]:
        """What each of the optimizer's groups is told, for the record."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]

    def versions(self) -> dict[str, str]:
        """Packages whose version may change what training computes."""
        return {"torch": torch.__version__, "deepspeed": self._deepspeed.__version__}

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model again, and its product of stage 3 off everybody else's."""
        if self._open:
            self._engine.destroy()
            nn.functional.linear, self._open = self._linear, False


def ds_config(settings: TrainSettings, plan: BatchPlan, *, parameters: int) -> dict[str, Any]:
    """Everything DeepSpeed is told; the loop writes it to `ds_config.json`. `parameters`: how many are trained."""
    stage = settings.zero.stage
    # Buckets are allocated whole, so none is larger than all gradients together.
    bucket = max(1, min(settings.zero.bucket_elements, parameters))
    config: dict[str, Any] = {
        "train_batch_size": plan.rows_per_step,
        "train_micro_batch_size_per_gpu": plan.micro_batch_rows,
        "gradient_accumulation_steps": plan.accumulation,
        # Stage 0 is clipped in `ZeroEngine.step`.
        "gradient_clipping": settings.clip_norm if stage and settings.clip_norm is not None else 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Overlapping the reduction has shipped wrong gradients in several releases, and gains nothing on gloo.
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
        # The optimizer is ours: one that is named here is compiled from source when the run starts.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if stage == 3:
        config["zero_optimization"] |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 10**9}
    if settings.precision == "bf16":
        # Modules named as "safe" would have their gradients reduced in bf16, so none is named.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def _flat_piece(name: str, parameter: Any, wrapper: Any, ranks: Ranks) -> Piece | None:
    """Stages 1 and 2: groups are flattened and cut into one stretch for each rank, across parameters."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    owner = wrapper.single_partition_of_fp32_groups[mapping.param_group_index]
    weight = owner.detach().narrow(0, here.start, here.numel)
    return Piece(name, tuple(parameter.shape), there.start, weight, owner, here.start)


def _sharded_piece(name: str, parameter: Any, wrapper: Any, ranks: Ranks) -> Piece | None:
    """Stage 3: each parameter is cut into equal stretches, the last one padded."""
    group, offset, numel = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start = ranks.rank * numel
    held = min(numel, parameter.ds_numel - start)
    if held <= 0:
        return None
    owner = wrapper.fp32_partitioned_groups_flat[group]
    return Piece(name, tuple(parameter.ds_shape), start, owner.detach().narrow(0, offset, held), owner, offset)


def _import_deepspeed(device: torch.device) -> Any:
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    with _quiet():
        import deepspeed
        import deepspeed.ops

        # Its shared-memory all-reduce is compiled when the ranks meet, and a rank killed meanwhile leaves a lock that
        # the next run waits for without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its collectives carry names that torch calls deprecated, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's import and start without its warnings about optional parts."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
