"""One rank of a training run, from a plain dict: the same under Ray, under torchrun and alone.

{"train": {…}, "out_dir": "…", "shards": {"corpus": "…"}, "order": {…}, "mixture": {…},
  "model": {…} | null, "init": "folder of weights" | null, "lora": {…} | null, "freeze": [patterns],
  "objective": {"kind": …} | null, "digests": {"shards": "…", "tokenizer": "…"}, "label": "pretrain",
  "url": "where out_dir will be", "inputs": {"shards": "where they are"}}

With `model` and `init`, these weights in that model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conf.typed import from_plain, to_plain
from data.loader import Loader, order_over
from data.mixture import MixtureSettings
from data.order import OrderSettings
from data.rows.shard_set import ShardSet
from data.tasks.denoising import AnyObjective, ObjectiveSettings, SpanDenoising, TextInfilling
from model.adapt import LoraConfig, attach_lora, freeze, merged
from model.architecture import Transformer
from model.build import build_model
from model.config import ModelConfig
from model.costs import FLOP_FORMULA, row_and_once_bytes
from model.interop import adapted_weights, load_pretrained, save_adapter, save_pretrained
from pipelines.training.errors import TrainingError
from pipelines.training.hardware import keep_freed_memory
from pipelines.training.loop import Run, train
from pipelines.training.objective import check_suits, flops_per_token
from pipelines.training.settings import BatchPlan, TrainSettings, largest_rows


def run_rank(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train as `job` says, as the rank that the environment says this process is; returns the key figures."""
    keep_freed_memory()
    settings = from_plain(TrainSettings, job["train"], "train")
    shard_sets = {name: ShardSet.open(Path(folder)) for name, folder in job["shards"].items()}
    order = order_over(
        shard_sets,
        order=from_plain(OrderSettings, job.get("order") or {}, "order"),
        mixture=from_plain(MixtureSettings, job.get("mixture") or {}, "mixture"),
    )
    seq_len = next(iter(shard_sets.values())).seq_len
    model = _starting_model(job, settings)
    objective = _objective(job, model.config)
    two_sided = objective if isinstance(objective, SpanDenoising | TextInfilling) else None
    widths = None if two_sided is None else two_sided.widths(seq_len)
    lora = from_plain(LoraConfig, job["lora"], "lora") if job.get("lora") else None
    if lora is not None:
        adapted_weights(
            attach_lora(model, lora, seed=settings.seed), model.config
        )  # refuses now what could not be saved
    if job.get("freeze"):
        freeze(model, job["freeze"])

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

    digests, label = _digests(job, settings, model.config, objective), job.get("label") or "train"
    run = Run(
        out_dir=Path(job["out_dir"]),
        seq_len=seq_len,
        save_model=save_model,
        digests=digests,
        label=label,
        url=job.get("url") or job["out_dir"],
        inputs=job.get("inputs") or {},
        flops_per_token=flops_per_token(model.config, widths, seq_len, _mean_piece_tokens(shard_sets))
        * (1 if lora is None else 2 / 3),  # frozen weights have no gradient of their own, a third of the work
        flop_formula=FLOP_FORMULA + ("" if lora is None else "; of that 2/3, as only adapters are trained"),
        largest_rows=_largest_rows(model.config, settings, seq_len),
        uniform_loss=math.log(model.config.vocab_size) if model.config.vocab_size else None,
        config={name: job[name] for name in ("train", "model", "order", "mixture", "digests") if name in job},
    )
    return train(model=model, loader_factory=loader_factory, settings=settings, run=run)


def _starting_model(job: Mapping[str, Any], settings: TrainSettings) -> Transformer:
    if job.get("init"):
        config, state = load_pretrained(Path(job["init"]))
        model = build_model(
            from_plain(ModelConfig, job["model"], "model") if job.get("model") else config, device="meta"
        )
        model.load_state_dict({name: x.float() for name, x in state.items()}, assign=True)
        model.tie_weights()
        return model
    if not job.get("model"):
        raise TrainingError("A training run needs `model`, a configuration, or `init`, a folder of weights; set one.")
    return build_model(from_plain(ModelConfig, job["model"], "model"), seed=settings.seed)


def _objective(job: Mapping[str, Any], config: ModelConfig) -> AnyObjective:
    """What the rows ask, if it suits the model."""
    asked = {"objective": job["objective"]} if job.get("objective") else {}
    objective = from_plain(ObjectiveSettings, asked, "job").objective
    check_suits(objective.kind, config)
    return objective


def _digests(
    job: Mapping[str, Any], settings: TrainSettings, config: ModelConfig, objective: AnyObjective
) -> dict[str, str]:
    """Of everything that a checkpoint is only good for: what the job was given, and what it makes of it."""
    parts = {"model": to_plain(config), "settings": to_plain(settings.identity())}
    if job.get("objective"):
        parts["objective"] = to_plain(objective)
    parts |= {name: job[name] for name in ("lora", "freeze") if job.get(name)}
    return {**job.get("digests", {}), **{name: _digest(plain) for name, plain in parts.items()}}


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
