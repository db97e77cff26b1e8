"""One rank of a training run, from a plain dict: the same under Ray, under torchrun and alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conf.identity import identity
from conf.refusal import NO_VALUE, Refusal
from conf.typed import from_plain, to_plain
from data.loader import Loader, order_over
from data.mixture import MixtureSettings
from data.order import OrderSettings
from data.rows.shard_set import ShardSet
from data.tasks.denoising import AnyObjective, SpanDenoising, TextInfilling
from data.tasks.objectives import NextToken
from model.adapt import LoraConfig, attach_lora, freeze, merged
from model.architecture import Transformer
from model.build import build_model
from model.config import ModelConfig
from model.costs import FLOP_FORMULA, row_and_once_bytes
from model.interop import adapted_weights, load_pretrained, save_adapter, save_pretrained
from pipelines.training.hardware import keep_freed_memory
from pipelines.training.loop import Run, train
from pipelines.training.objective import check_suits, flops_per_token
from pipelines.training.settings import BatchPlan, TrainSettings, largest_rows


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What every rank of a training receives; `run.json` is its plain form."""

    label: str = "train"
    """Name of the step, for logs and trackers."""
    train: TrainSettings
    """How it is trained."""
    model: ModelConfig | None = None
    """Null: the model that the folder `init` describes."""
    init: str | None = None
    """Folder of the weights it begins with; null: random ones."""
    objective: AnyObjective | None = None
    """What a row asks; null: the next token."""
    order: OrderSettings = field(default_factory=OrderSettings)
    """In which order rows come."""
    mixture: MixtureSettings | None = None
    """How much of each source; null: all of them alike."""
    shards: dict[str, str]
    """Folder of packed rows of each source."""
    lora: LoraConfig | None = None
    """Null: all weights are trained."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of the artifacts it is made from; a checkpoint of others is refused."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Where these artifacts are published."""
    out_dir: str
    """Folder that everything is written to."""
    url: str | None = None
    """Where that folder will be published; null: nowhere."""


def run_rank(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Train as a TrainJob in plain form says, as the rank that the environment says this process is; returns the key
    figures."""
    keep_freed_memory()
    job = from_plain(TrainJob, plain, "")
    settings = job.train
    shard_sets = {name: ShardSet.open(Path(folder)) for name, folder in job.shards.items()}
    order = order_over(shard_sets, order=job.order, mixture=job.mixture or MixtureSettings())
    seq_len = next(iter(shard_sets.values())).seq_len
    model = _starting_model(job)
    objective = job.objective or NextToken()
    check_suits(objective.kind, model.config)
    two_sided = objective if isinstance(objective, SpanDenoising | TextInfilling) else None
    widths = None if two_sided is None else two_sided.widths(seq_len)
    if (lora := job.lora) is not None:
        attached = attach_lora(model, lora, seed=settings.seed)
        adapted_weights(attached, model.config)  # refuses now what could not be saved
    if job.freeze:
        freeze(model, job.freeze)

    def loader_factory(plan: BatchPlan, rank: int) -> Loader:
        """This rank's loader, once the batch plan is known."""
        return Loader(
            shard_sets,
            order=order,
            rows_per_step=plan.rows_per_step,
            micro_batch_rows=plan.micro_batch_rows,
            rank=rank,
            world_size=plan.world_size,
            objective=objective,
        )

    def save_model(state: dict[str, torch.Tensor], folder: Path) -> None:
        if lora is not None:
            save_adapter(state, model.config, lora, folder.parent / "adapter")
            state = merged(state, lora)
        # A decoder that begins with another piece than it was trained to continues with noise.
        begins = {} if two_sided is None else {"decoder_start_token_id": two_sided.start_id}
        save_pretrained(_finished(state, model.config, settings), model.config, folder, extra=begins)

    run = Run(
        out_dir=Path(job.out_dir),
        seq_len=seq_len,
        save_model=save_model,
        digests=_digests(job, model.config, identity),
        earlier_digests=_digests(job, model.config, to_plain),
        label=job.label,
        url=job.url or job.out_dir,
        inputs=job.inputs,
        flops_per_token=flops_per_token(model.config, widths, seq_len, _mean_piece_tokens(shard_sets))
        * (1 if lora is None else 2 / 3),  # frozen weights have no gradient of their own, a third of the work
        flop_formula=FLOP_FORMULA + ("" if lora is None else "; of that 2/3, as only adapters are trained"),
        largest_rows=_largest_rows(model.config, settings, seq_len),
        uniform_loss=math.log(model.config.vocab_size) if model.config.vocab_size else None,
        config={name: plain[name] for name in ("train", "model", "order", "mixture", "digests") if name in plain},
    )
    return train(model=model, loader_factory=loader_factory, settings=settings, run=run)


def _starting_model(job: TrainJob) -> Transformer:
    if job.init is not None:
        config, state = load_pretrained(Path(job.init))
        model = build_model(job.model or config, device="meta")
        model.load_state_dict({name: x.float() for name, x in state.items()}, assign=True)
        model.tie_weights()
        return model
    if job.model is None:
        rule = "a training needs `model`, a configuration, or `init`, a folder of weights"
        raise Refusal("run.json", NO_VALUE, rule, "set one of them")
    return build_model(job.model, seed=job.train.seed)


def _digests(job: TrainJob, config: ModelConfig, payload: Callable[[Any], Any]) -> dict[str, str]:
    """Of everything that a checkpoint is only good for: what the job was given, and what it makes of it.

    payload: `identity`, so that a new setting at its default refuses no checkpoint; earlier versions took `to_plain`.
    """
    parts = {"model": payload(config), "settings": payload(job.train.identity())}
    if job.objective is not None:
        parts["objective"] = payload(job.objective)
    parts |= {"lora": payload(job.lora)} if job.lora is not None else {}
    parts |= {"freeze": list(job.freeze)} if job.freeze else {}
    return {**job.digests, **{name: _digest(plain) for name, plain in parts.items()}}


def _finished(state: dict[str, torch.Tensor], config: ModelConfig, settings: TrainSettings) -> dict[str, torch.Tensor]:
    """A state dict, in the precision it is to be kept in, from the distinct parameters."""
    dtype = torch.bfloat16 if settings.saved_precision == "bf16" else torch.float32
    state = {name: weight.to(dtype) for name, weight in state.items()}
    return state | {name: state[source] for name, source in config.tied_weights.items()}


def _mean_piece_tokens(shard_sets: Mapping[str, ShardSet]) -> float:
    """Mean length of the stretches that attention does not cross."""
    totals = [shards.manifest["totals"] for shards in shard_sets.values()]
    return sum(t["tokens"] for t in totals) / max(1, sum(t["pieces"] for t in totals))


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _largest_rows(config: ModelConfig, settings: TrainSettings, seq_len: int) -> int:
    """As `largest_rows`, for the memory that is free here."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        return largest_rows(seq_len)
    dtype_bytes = 2 if settings.precision == "bf16" else 4
    memory_of_rows = row_and_once_bytes(config, seq_len, dtype_bytes, settings.recompute)
    return largest_rows(seq_len, *memory_of_rows, gpu_bytes=torch.cuda.mem_get_info()[1])
