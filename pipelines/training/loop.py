"""Training: batch → loss → update, for pretraining and fine-tuning alike. Every rank runs `train`."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.refusal import NO_VALUE, Refusal
from data.batch import combine_digest, hash_sum
from data.loader import Loader, StepBatch
from model.ffns.experts.layer import rebalance
from model.ffns.experts.receipts import loads, receipts
from model.kernels.check import check_kernels
from model.stack import Stack
from pipelines.training.checkpoint import Checkpoint, Checkpoints
from pipelines.training.compile import compile_blocks
from pipelines.training.expert_parallel import share_experts
from pipelines.training.hardware import peak_flops
from pipelines.training.health import Health, few_steps, replay
from pipelines.training.metrics import (
    METRICS,
    MetricsLog,
    Progress,
    Row,
    RunName,
    Speed,
    TrackingRefusal,
    WandbRun,
    read_metrics,
    summary,
    tracking_line,
    wandb_run,
)
from pipelines.training.optim import build_optimizer, learning_rate_scale, set_learning_rates
from pipelines.training.ranks import Ranks, join
from pipelines.training.settings import BatchPlan, TrainSettings
from pipelines.training.signals import Signals, TrainingStopped, catch_signals
from pipelines.training.zero import ZeroEngine

LoaderFactory = Callable[[BatchPlan, int], Loader]
"""(plan, rank) -> that rank's loader, at row 0."""

GO_ON, SAVE, STOP, DIVERGED = 0, 1, 2, 3

NOTES = "logs/notes.txt"
"""Below a run's folder: what it said in words, one line each, for whoever watches from another process."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one update says, the same in every rank; losses are per target. routing: see `moe.receipts`."""

    loss: float
    z_loss: float
    aux_loss: float
    grad_norm: float
    applied: bool
    target_count: int
    batch_digest: str
    data_seconds: float
    action: int
    routing: Mapping[str, float] = field(default_factory=dict)


def train_step(engine: ZeroEngine, batch: StepBatch, ranks: Ranks, *, action: int = GO_ON) -> StepResult:
    """One update over the global batch of which `batch` is this rank's part.

    The loss is Σ NLL over all micro-batches and ranks divided by the number of targets in all of them, counted before
    the first backward pass: it does not depend on how rows are shared out. So are a model's auxiliary losses, whose sums
    are over rows. Routing is counted in the same sums, and moves the selection biases of experts after the update.
    `action` is this rank's request, and the result has the strongest of all ranks'.
    """
    per_rank = ranks.gather(torch.tensor([batch.target_count, hash_sum(batch.row_hashes), action], dtype=torch.int64))
    target_count = int(per_rank[:, 0].sum())
    batch_digest = combine_digest([int(part) for part in per_rank[:, 1]])
    if target_count == 0:
        raise Refusal(
            f"batch at row {batch.first_row}",
            NO_VALUE,
            f"it has no target (digest {batch_digest}): every token in it is masked, so there is nothing to learn from",
            "check the loss mask of the data, or enlarge the global batch",
        )
    sums: dict[str, torch.Tensor] = {}
    for i, micro_batch in enumerate(batch.micro_batches):
        out = engine.forward({name: x.to(ranks.device, non_blocking=True) for name, x in micro_batch.items()})
        for name, value in out.items():
            sums[name] = sums.get(name, 0) + value.detach().double()
        engine.backward(out["loss_sum"] / target_count, last=i + 1 == len(batch.micro_batches))
    grad_norm, applied = engine.step()
    totals, waits = _over_ranks(sums, batch.data_seconds, ranks)
    if applied:
        rebalance(engine.model, loads(totals))
    return StepResult(
        loss=float(totals["loss_sum"]) / target_count,
        z_loss=float(totals.get("z_loss_sum", 0.0)) / target_count,
        aux_loss=float(totals.get("aux_loss_sum", 0.0)) / target_count,
        grad_norm=grad_norm,
        applied=applied,
        target_count=target_count,
        batch_digest=batch_digest,
        data_seconds=max(waits),
        action=int(per_rank[:, 2].max()),
        routing=receipts(totals),
    )


def _over_ranks(
    sums: dict[str, torch.Tensor], waited: float, ranks: Ranks
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Each of the sums over all ranks, in fp64 on the CPU, and every rank's `waited`: one exchange for all."""
    flat = torch.cat([x.flatten() for x in sums.values()]).cpu()
    table = ranks.gather(torch.cat([flat, torch.tensor([waited], dtype=torch.float64)]))
    parts = table[:, :-1].sum(0).split([x.numel() for x in sums.values()])
    return dict(zip(sums, parts, strict=True)), table[:, -1].tolist()


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is, beside its settings.

    digests: of what it is made from, by name; a checkpoint with others is refused. save_model: writes the finished
    weights, by parameter name on the CPU in fp32, into a folder that does not exist yet. url: final location of
    out_dir; inputs: URLs of its inputs, by name. flops_per_token: forward and backward, counted as
    `flop_formula` says. largest_rows: the most rows a forward pass may take on one rank where the settings leave it open.
    uniform_loss: of a uniform guess, in nats per target; None where targets are not tokens of a vocabulary. config: for
    the record.
    """

    out_dir: Path
    seq_len: int
    save_model: Callable[[dict[str, torch.Tensor], Path], None]
    digests: Mapping[str, str] = field(default_factory=dict)
    earlier_digests: Mapping[str, str] = field(default_factory=dict)
    label: str = "train"
    url: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    flops_per_token: float | None = None
    flop_formula: str = ""
    largest_rows: int = 8
    uniform_loss: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def train(
    *,
    model: nn.Module,
    loader_factory: LoaderFactory,
    settings: TrainSettings,
    run: Run,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Train `model` to the end, from the newest checkpoint in `run.out_dir` if there is one; returns the key figures.

    Writes metrics.jsonl, ds_config.json and checkpoints/ on the way and model/ at the end; a run that has ended only
    returns its figures. `on_checkpoint` hears in rank 0 of each checkpoint's folder. Raises Refusal for a run
    that cannot go on, TrainingStopped after SIGTERM or SIGINT.
    """
    began = time.monotonic()
    ranks = join(settings)
    plan = BatchPlan.derive(settings, seq_len=run.seq_len, world_size=ranks.world_size, largest_rows=run.largest_rows)
    with closing(loader_factory(plan, ranks.rank)) as loader, ExitStack() as sinks, catch_signals() as signals:
        checkpoints = Checkpoints(
            folder=run.out_dir / "checkpoints",
            ranks=ranks,
            digests={**run.digests, "data": loader.state()["digest"]},
            earlier=run.earlier_digests,
            keep=settings.checkpoint.keep,
            on_saved=on_checkpoint,
        )
        ended = checkpoints.ended()
        if ended is not None:
            return ended
        trainer = Trainer(model, loader, settings, run, plan, ranks, checkpoints)
        sinks.callback(trainer.engine.close)
        wandb = trainer.open_sinks(sinks)
        trainer.run_steps(signals)
        trainer.write_model()
        figures = summary(read_metrics(run.out_dir / METRICS), resumed_at_step=trainer.first_step)
        figures |= {"parameters": trainer.parameters, "seconds": time.monotonic() - began}
        figures["warnings"] = trainer.warnings(figures)
        if run.flops_per_token:
            figures["mfu_formula"] = (
                f"tokens/s x {run.flops_per_token:,.0f} FLOPs a token / peak FLOP/s of all ranks; {run.flop_formula}"
            )
        if wandb is not None:
            wandb.lineage(run.url or str(run.out_dir), inputs=run.inputs, digests=run.digests)
        checkpoints.end(figures, keep=settings.checkpoint.keep_finished)
    return figures


class Trainer:
    """One rank's state of a run."""

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        settings: TrainSettings,
        run: Run,
        plan: BatchPlan,
        ranks: Ranks,
        checkpoints: Checkpoints,
    ) -> None:
        self.loader, self.settings, self.run, self.plan, self.ranks = loader, settings, run, plan, ranks
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        (run.out_dir / "logs").mkdir(parents=True, exist_ok=True)
        self.checkpoints = checkpoints
        saved = checkpoints.newest(self.log)
        if saved is not None:
            saved.load_weights(model)
        compiled = self._prepare(model)
        experts = share_experts(model, settings, ranks, self.log)
        optimizer = build_optimizer(model, settings.optim)
        self.engine = ZeroEngine(model, optimizer, settings=settings, plan=plan, ranks=ranks, experts=experts)
        self.first_step = self._restore(saved)
        self.step = self.first_step
        self._saved_step, self._saved_at = self.step if saved else -1, time.monotonic()
        self._sinks: list[Callable[[Row], None]] = []
        warmup_steps = round(settings.schedule.warmup_fraction * plan.total_steps)
        self.health = Health(uniform=run.uniform_loss, warmup_steps=warmup_steps, total_steps=plan.total_steps)
        if ranks.is_first:
            replay([row for row in read_metrics(run.out_dir / METRICS) if row["step"] <= self.step], self.health)
        self._log_header(compiled)

    def open_sinks(self, stack: ExitStack) -> WandbRun | None:
        """Where rows of metrics go, in rank 0; `stack` closes them."""
        wandb, refusal = None, None
        if self.ranks.is_first:
            log = stack.enter_context(closing(MetricsLog(self.run.out_dir / METRICS, keep_steps=self.first_step)))
            self._sinks = [log, Progress(self.run.label, self.plan.total_steps)]
            try:
                wandb = stack.enter_context(
                    wandb_run(
                        self.settings.tracking,
                        name=RunName.kept(self.run.out_dir / "logs", label=self.run.label, url=self.run.url),
                        folder=self.run.out_dir / "logs",
                        config={**self.run.config, "ranks": self.ranks.world_size, "parameters": self.parameters},
                        log=self.log,
                    )
                )
            except TrackingRefusal as refused:
                refusal = refused
            if wandb is not None:
                self._sinks.append(wandb)
        self.ranks.agree(refusal)
        return wandb

    def run_steps(self, signals: Signals) -> None:
        """Run all remaining steps. Raises Refusal if the run has diverged, unless on_divergence=warn."""
        self._stop_if_diverged()
        while self.step < self.plan.total_steps:
            began = time.perf_counter()
            batch = next(self.loader)
            scale = learning_rate_scale(self.settings.schedule, step=self.step, total_steps=self.plan.total_steps)
            lr = set_learning_rates(self.engine.optimizer, scale)
            result = train_step(self.engine, batch, self.ranks, action=self._requested_action(signals))
            self.step += 1
            self._report(result, lr, time.perf_counter() - began)
            if not result.applied and self.settings.on_non_finite == "stop":
                raise self._non_finite(result)
            if result.action != GO_ON:
                self.save()
            if result.action == DIVERGED:
                self._stop_if_diverged()
            if result.action == STOP:
                raise TrainingStopped(
                    self.run.label,
                    NO_VALUE,
                    f"stopped as asked after step {self.step} of {self.plan.total_steps}, and saved",
                    "run the same command again to go on from there",
                )
        if self.health.diverged is not None:  # in the last step, perhaps
            self.save()
        self._stop_if_diverged()

    def warnings(self, figures: Mapping[str, Any]) -> list[str]:
        """Warnings to keep with the run's figures."""
        texts = [warning.text for warning in self.health.warnings]
        if self.health.diverged is not None:
            texts.append(f"it went on, and its loss ended at {figures['loss']:.2f}")
        if figures["skipped_steps"]:
            texts.append(f"{figures['skipped_steps']:,} of {figures['steps']:,} updates were not finite and left out")
        few = self._few_steps()
        return texts if few is None else [few, *texts]

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self._saved_step == self.step:
            return
        began = time.monotonic()
        path = self.checkpoints.save(
            self.engine,
            {
                "step": self.step,
                "rows_consumed": self.loader.rows_consumed,
                "world_size": self.ranks.world_size,
                "zero_stage": self.settings.zero.stage,
                "threads": self.ranks.threads,
                "versions": self.engine.versions(),
                "groups": self.engine.hyperparameters(),
                "config": dict(self.run.config),
            },
        )
        self._saved_step, self._saved_at = self.step, time.monotonic()
        if self.ranks.is_first:
            size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
            self.log(f"checkpoint {path.name}: {size:,.0f} MiB in {self._saved_at - began:.1f} s")

    def write_model(self) -> None:
        """The finished weights, as `model/`, after a checkpoint in case this is as far as the process gets."""
        self.save()
        state = {}
        for name, weight in self.engine.full_weights():
            if self.ranks.is_first:
                # -0.0 + 0.0 is 0.0: a sum over ranks may lose that sign, and the bytes of the file are its digest.
                state[name] = weight.to("cpu", torch.float32, copy=True).add_(0.0)
        self.engine.close()
        refusal = None
        if self.ranks.is_first:
            final, draft = self.run.out_dir / "model", self.run.out_dir / ".model.writing"
            try:
                for left_over in (final, draft):
                    shutil.rmtree(left_over, ignore_errors=True)
                self.run.save_model(state, draft)
                os.rename(draft, final)
            except OSError as error:
                remedy = "make room, then run the same command again"
                refusal = Refusal(final, NO_VALUE, f"cannot be written ({error})", remedy)
        self.ranks.agree(refusal)

    def log(self, line: str) -> None:
        """Tell the user one line, on the screen and in the notes that the driver shows; the first rank speaks for all."""
        if self.ranks.is_first:
            print(f"{self.run.label}: {line}", flush=True)
            with (self.run.out_dir / NOTES).open("a", encoding="utf-8") as notes:
                notes.write(line + "\n")

    def _prepare(self, model: nn.Module) -> str:
        """Device, recomputation, attention kernels, compilation; returns what was done about the last."""
        # Each rank has random numbers of its own, for dropout.
        torch.manual_seed(self.settings.seed * 1_000_003 + self.ranks.rank)
        model.train()
        model.to(self.ranks.device)
        for stack in (module for module in model.modules() if isinstance(module, Stack)):
            stack.recompute = self.settings.recompute
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        for line in check_kernels(model, device=self.ranks.device, dtype=dtype, tokens=self.run.seq_len):
            self.log(line)
        return compile_blocks(model, self.settings, self.ranks.device)

    def _restore(self, saved: Checkpoint | None) -> int:
        """Everything but the weights, which the engine has taken from the model; returns the step to go on from."""
        if saved is None:
            return 0
        step = int(saved.state["step"])
        self.log(f"continuing after step {step}, from {saved.path}")
        saved.load_optimizer(self.engine)
        if not saved.load_random_state(self.ranks):
            torch.manual_seed((self.settings.seed * 1_000_003 + self.ranks.rank) * 1_000_003 + step)
            self.log(f"written by {saved.state['world_size']} ranks: dropout RNG is re-seeded (world size changed)")
        self.loader.restore({**self.loader.state(), "rows_consumed": saved.state["rows_consumed"]})
        return step

    def _log_header(self, compiled: str) -> None:
        """What is about to happen, in the log and in ds_config.json."""
        peak, source = peak_flops(self.ranks.device, self.settings.precision, self.ranks.threads)
        peaks = self.ranks.gather(torch.tensor([peak], dtype=torch.float64))
        self.speed = Speed(self.run.flops_per_token, float(peaks.sum()))
        plan, shared = self.plan, self.settings.zero.expert_parallel
        self.log(
            f"{self.parameters / 1e6:,.1f} M parameters, {plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens "
            f"({plan.micro_batch_rows} rows x {plan.accumulation} micro-batches x {plan.world_size} ranks), "
            f"{self.settings.precision}, ZeRO {self.settings.zero.stage}, "
            f"{'' if shared == 1 else f'experts shared by {shared} ranks, '}{self.ranks.device.type}, "
            f"{self.ranks.threads} threads a rank"
        )
        self.log(compiled)
        if self.run.flops_per_token:
            self.log(f"MFU is of {plan.world_size} x {source}")
        if (few := self._few_steps()) is not None:
            self.log(f"WARNING {few}")
        if self.ranks.is_first:
            self.log(tracking_line(self.settings.tracking, self.run.url or str(self.run.out_dir)))
            (self.run.out_dir / "ds_config.json").write_text(json.dumps(self.engine.config, indent=2) + "\n")

    def _stop_if_diverged(self) -> None:
        """Raise Refusal in every rank if rank 0 found divergence and on_divergence=stop."""
        warning, refusal = self.health.diverged, None
        if warning is not None and self.settings.on_divergence == "stop":
            refusal = Refusal(
                self.run.label,
                NO_VALUE,
                f"{warning.text}; a model that is worse than it was is no use to what follows, so the run stops; "
                f"{self._kept()}",
                f"lower {self._rates()} or take auto, or lengthen {self._key('schedule')}.warmup_fraction; "
                f"{self._key('on_divergence')}=warn goes on from there all the same",
            )
        self.ranks.agree(refusal)

    def _few_steps(self) -> str | None:
        batch, plan = self._key("global_batch_tokens"), self.plan
        smaller = max(plan.seq_len * plan.world_size, plan.tokens_per_step * plan.total_steps // 50)
        smaller -= smaller % (plan.seq_len * plan.world_size)
        remedy = f"Set {batch}={smaller}, or train on more"
        return few_steps(plan.total_steps, plan.tokens_per_step, remedy)

    def _key(self, name: str) -> str:
        """Dotted key of a training setting on the command line."""
        if self.run.label == "pretrain":
            return name if name in ("optim", "schedule") else f"pretrain.{name}"
        return f"{self.run.label}.train.{name}"

    def _rates(self) -> str:
        optim = self._key("optim")
        return f"{optim}.matrix_lr and {optim}.lr" if self.settings.optim.kind == "muon" else f"{optim}.lr"

    def _kept(self) -> str:
        kept = sorted(path.name for path in self.checkpoints.folder.glob("step-*"))
        return f"checkpoints kept: {', '.join(kept)}" if kept else "there is no checkpoint yet"

    def _requested_action(self, signals: Signals) -> int:
        if self.health.diverged is not None and self.settings.on_divergence == "stop":
            return DIVERGED
        if signals.asks_to_stop:
            return STOP
        clock = self.settings.checkpoint
        if clock.every_steps is not None and (self.step + 1) % clock.every_steps == 0:
            return SAVE
        # Ranks' clocks differ; the first one's counts.
        waited = time.monotonic() - self._saved_at
        due = self.ranks.is_first and clock.every_seconds is not None and waited >= clock.every_seconds
        return SAVE if due else GO_ON

    def _report(self, result: StepResult, lr: float, seconds: float) -> None:
        tokens = self.plan.tokens_per_step
        row: Row = {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": self.step * tokens,
            "rows": self.step * self.plan.rows_per_step,
            "batch_digest": result.batch_digest,
            "step_seconds": seconds,
            "data_seconds": result.data_seconds,
            "step_tokens": tokens,
            "targets": result.target_count,
            "tokens_per_second": tokens / seconds,
            "mfu": self.speed.mfu(tokens / seconds),
            "z_loss": result.z_loss,
            "aux_loss": result.aux_loss,
            "skipped": int(not result.applied),
            "time": time.time(),
            **result.routing,
        }
        for sink in self._sinks:
            sink(row)
        if self.ranks.is_first and result.applied:
            for warning in self.health.look(self.step, result.loss):
                self.log(f"WARNING {warning.text}")

    def _non_finite(self, result: StepResult) -> Refusal:
        return Refusal(
            f"{self.run.label}, step {self.step}",
            NO_VALUE,
            f"loss = {result.loss} and gradient norm = {result.grad_norm} (batch digest {result.batch_digest}), and an "
            f"update must be finite, so it was not applied and the run stops; {self._kept()}",
            f"lower {self._rates()}, lengthen {self._key('schedule')}.warmup_fraction or set {self._key('clip_norm')}=1; "
            f"{self._key('on_non_finite')}=skip leaves such updates out and counts them",
        )
