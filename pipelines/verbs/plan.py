"""What an experiment would cost, from closed forms: tokens, FLOPs, memory per rank, shards, disk. Nothing is run.

    costs = estimate(settings, reports)
    costs["memory_per_rank"]["total"]       # bytes

Memory follows the ZeRO paper (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054): a parameter takes 4 bytes of
fp32 weight, 4 of fp32 gradient and 8 of AdamW's moments, in bf16 too, where only the matrix products are in bf16. Stage 1
divides the moments by the ranks, stage 2 the gradients too, stage 3 the weights as well. Experts that `zero.expert_parallel`
ranks share are divided by that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from conf.refusal import Refusal
from data.rows.instructions import instruction_files
from data.text.corpus import CorpusSettings, corpus_files
from data.text.estimate import bytes_per_token
from data.text.estimate import text_bytes as text_bytes_of
from pipelines.console import display as console
from pipelines.console.display import count, duration, size
from pipelines.engine.events import StepReport
from pipelines.engine.waiting import working
from pipelines.settings.derive import Settings, corpus_key
from pipelines.stages.train import tuning_tokens
from pipelines.training.health import few_steps
from pipelines.training.objective import flops_per_token
from pipelines.training.settings import BatchPlan, TrainSettings, largest_rows

REPEATS = 4
"""Epochs up to which repeated text is worth nearly what new text is: Muennighoff et al. 2023,
https://arxiv.org/abs/2305.16264."""


def estimate(settings: Settings, reports: Sequence[StepReport]) -> dict[str, Any]:
    """Figures for `plan`. Raises the rooms' errors for a combination that could not run."""
    from model.build import build_model
    from model.costs import activation_bytes, parameter_counts, row_and_once_bytes

    settings.check_sizes()
    name, train = settings.first_training()
    tuned = tuning(settings, reports)
    if tuned is not None and name == "finetune":
        train = replace(train, total_tokens=tuned["tokens"])
    model, seq_len, ranks = settings.resolved_model(), settings.shards.seq_len, settings.compute.ranks
    with working(f"a model of {model.n_layers:,} layers is built, without its memory"):
        built = build_model(model, device="meta")  # proves that it can be built at this size
    dtype_bytes, on_gpu = 2 if train.precision == "bf16" else 4, settings.compute.gpus_per_rank > 0
    memory_of_rows = row_and_once_bytes(model, seq_len, dtype_bytes, train.recompute)
    rows = largest_rows(seq_len, *memory_of_rows, gpu_bytes=_GPU_BYTES if on_gpu else None)
    batch = BatchPlan.derive(train, seq_len=seq_len, world_size=ranks, largest_rows=rows)
    counts = parameter_counts(model)
    flops = flops_per_token(model, settings.objective.widths(seq_len), seq_len)
    shared = 0
    if train.zero.expert_parallel > 1:
        from pipelines.training.expert_parallel import shared_parameters

        shared = shared_parameters(built, train.zero.expert_parallel, ranks)
    memory = memory_per_rank(counts.total - shared, ranks=ranks, stage=train.zero.stage)
    # Those that a rank holds for others to use are in its own keeping, whatever the stage.
    for part, amount in memory_per_rank(shared // train.zero.expert_parallel, ranks=1, stage=0).items():
        memory[part] += amount
    memory["activations"] = activation_bytes(
        model,
        micro_batch_rows=batch.micro_batch_rows,
        seq_len=seq_len,
        dtype_bytes=dtype_bytes,
        recompute=train.recompute,
    )
    tokens = batch.total_steps * batch.tokens_per_step
    there = data(settings, tokens, reports)
    return {
        "step": name,
        "learning_rates": {f.name: getattr(train.optim, f.name) for f in fields(train.optim) if f.name.endswith("lr")},
        "finetune": tuned,
        "warnings": warnings(settings, reports, batch.total_steps if name == "pretrain" else None, tuned),
        "parameters": {"total": counts.total, "active": counts.active, "embedding": counts.embedding},
        "tokens": tokens,
        "tokens_per_step": batch.tokens_per_step,
        "steps": batch.total_steps,
        "ranks": ranks,
        "micro_batch_rows": batch.micro_batch_rows,
        "accumulation": batch.accumulation,
        "zero_stage": train.zero.stage,
        "flops_per_token": flops,
        "flops": flops * tokens,
        "memory_per_rank": {**memory, "total": sum(memory.values())},
        "disk": {
            **disk(counts.total, train, reports),
            "shards": rows_bytes(there, model.vocab_size or 0, reports),
            "export": 4 * counts.total,
        },
        "data": there,
        "time": {gpu: flops * tokens / (peak * 0.4 * ranks) for gpu, peak in _PEAKS.items()},
    }


def tuning(settings: Settings, reports: Sequence[StepReport]) -> dict[str, Any] | None:
    """Tokens and steps of fine-tuning: counted once the conversations are in rows, else estimated from their sources.

    None without fine-tuning.
    """
    finetuning = settings.finetuning()
    if finetuning is None or settings.finetune is None:
        return None
    counted = next((r.metrics for r in reports if r.kind == "conversations" and "rows" in (r.metrics or {})), None)
    if counted is not None:
        there, basis = float(counted["rows"] * settings.shards.seq_len), "counted"
    else:
        per_token = guessed_bytes_per_token(settings)
        there = conversation_bytes(settings) / per_token
        # The share of functions with docstrings is known only after reading them.
        at_most = "at most, " if settings.finetune.data.kind == "functions" else ""
        basis = f"{at_most}guessed at {per_token} bytes a token"
    epochs = settings.finetune.epochs
    tokens = tuning_tokens(finetuning.train, epochs, there)
    batch = finetuning.train.global_batch_tokens
    return {
        "tokens": tokens,
        "tokens_per_step": batch,
        "steps": tokens // batch,
        "epochs": epochs,
        "basis": basis if there else "no conversations yet",
    }


def conversation_bytes(settings: Settings) -> float:
    """Estimated bytes of the conversations to train on, before they are read."""
    assert settings.finetune is not None
    chosen = settings.finetune.data
    if chosen.kind == "files":
        try:
            files = instruction_files(chosen)
        except Refusal:  # there are none yet
            return 0.0
        with working("a sample of the conversations is read"):
            return text_bytes_of(files, chosen.reader, text_of=_messages_text) * (1 - chosen.held_out_fraction)
    most = (chosen.max_conversations or 10**9) * chosen.max_characters / 4  # their mean, over this machine's library
    return min(most, FUNCTIONS_SHARE * sum(corpus_bytes(source) for source in settings.corpora().values()))


def _messages_text(record: dict[str, Any]) -> str:
    if "messages" in record:
        return "".join(str(message["content"]) for message in record["messages"])
    return f"{record['prompt']}{record['completion']}"


FUNCTIONS_SHARE = 0.6
"""Bytes of conversations made from functions for a byte of Python, all three tasks, in this machine's library."""


def warnings(
    settings: Settings, reports: Sequence[StepReport], steps: int | None, tuned: dict[str, Any] | None
) -> list[str]:
    """Warnings to print before starting."""
    candidates = []
    if steps is not None and "pretrain" not in {r.name for r in reports if r.state == "cached"}:
        remedy = "Set pretrain.global_batch_tokens lower or pretrain.total_tokens higher"
        candidates.append(("pretrain", few_steps(steps, settings.pretrain.global_batch_tokens, remedy)))
    if tuned is not None and tuned["basis"] != "no conversations yet":
        remedy = "Set finetune.train.global_batch_tokens lower or finetune.epochs higher"
        candidates.append(("finetune", few_steps(tuned["steps"], tuned["tokens_per_step"], remedy)))
    return [f"{step}: WARNING {text}" for step, text in candidates if text is not None]


_PEAKS = {"A100": 312e12, "H100": 989e12}
"""Dense bf16 FLOP/s of one GPU, from NVIDIA's data sheets; `plan` assumes 40 % of it."""


_GPU_BYTES = 80 * 10**9
"""Memory of the GPU that `plan` has in mind, an A100 or H100; a run looks at the one it has."""


def data(settings: Settings, tokens: int, reports: Sequence[StepReport]) -> dict[str, Any]:
    """Tokens and shards there are, counted where the steps are made, else guessed from the corpus files' sizes."""
    made = [r.metrics for r in reports if r.kind == "rows" and r.metrics]
    if made and len(made) == len(settings.corpora()):
        there = sum(int(metrics["tokens"]) for metrics in made)
        shards = sum(int(metrics["shards"]) for metrics in made)
        basis = "counted"
    else:
        text_bytes = round(sum(corpus_bytes(source) for source in settings.corpora().values()))
        there = round(text_bytes / (per_token := guessed_bytes_per_token(settings)))
        shards = -(-text_bytes // settings.shards.shard_text_bytes)
        basis = f"guessed at {per_token} bytes a token from a sample of the files"
        if not text_bytes:
            named = [path for source in settings.corpora().values() for path in source.paths]
            basis = f"no text at {', '.join(named)}" if named else _unset(settings)
    return {"tokens": there, "shards": shards, "epochs": tokens / there if there else None, "basis": basis}


def _unset(settings: Settings) -> str:
    """What to set where no corpus names any text."""
    return " ".join(["set", *(f"'{corpus_key(step)}.paths=[DIR]'" for step in settings.corpora() or ["corpus"])])


def corpus_bytes(settings: CorpusSettings) -> float:
    """Bytes of training text of a corpus, estimated from a sample of its files; 0 while it does not exist."""
    try:
        files = corpus_files(settings)
    except Refusal:
        return 0.0
    with working(f"a sample of {len(files):,} files is read"):
        return text_bytes_of(files, settings.reader) * (1 - settings.held_out.fraction)


def guessed_bytes_per_token(settings: Settings) -> float:
    """Estimated bytes of text per token, by vocabulary size."""
    return bytes_per_token(settings.resolved_model().vocab_size or settings.tokenizer.vocab_size)


def disk(parameters: int, train: TrainSettings, reports: Sequence[StepReport]) -> dict[str, int]:
    """Bytes: checkpoints kept (fp32 weights and two moments each) and the final weights; artifacts there already."""
    return {
        "checkpoints": 12 * parameters * (train.checkpoint.keep + 1),
        "weights": (2 if train.saved_precision == "bf16" else 4) * parameters,
        "artifacts_made": sum(report.bytes or 0 for report in reports),
    }


def rows_bytes(there: dict[str, Any], vocab_size: int, reports: Sequence[StepReport]) -> int:
    """Bytes of all shards: counted where they exist, else their tokens' and a fifth more for provenance."""
    if there["basis"] == "counted":
        return sum(report.bytes or 0 for report in reports if report.kind == "rows")
    return round(int(there["tokens"] or 0) * (2 if vocab_size < 2**16 else 4) * 1.2)


def show(reports: Sequence[StepReport], costs: dict[str, Any]) -> None:
    """Two tables: the steps, and what training costs."""
    out = console.console()
    rows = [(r.name, r.state, r.digest[:16], console.shown_path(r.path)) for r in reports]
    out.print(console.table(None, ("step", "state", "digest", "path"), rows))
    out.print()
    memory, room = costs["memory_per_rank"], costs["disk"]
    tuned = costs["finetune"]
    lines = [
        (
            "parameters",
            f"{count(costs['parameters']['total'])} ({count(costs['parameters']['embedding'])} in embeddings)",
        ),
        (
            "tokens",
            f"{count(costs['tokens'])} = {costs['steps']:,} steps of {count(costs['tokens_per_step'])}"
            + (f", {tuned['epochs']:g} epochs ({tuned['basis']})" if costs["step"] == "finetune" else ""),
        ),
        ("learning rates", ", ".join(f"{name} {rate:.3g}" for name, rate in costs["learning_rates"].items() if rate)),
        ("batch", f"{costs['ranks']} ranks x {costs['micro_batch_rows']} rows x {costs['accumulation']} accumulated"),
        (
            "data",
            _data_words(costs["data"]) if costs["step"] == "pretrain" else "the conversations",
        ),
        (
            "FLOPs",
            f"{costs['flops']:.3g} = {costs['flops_per_token']:.3g} a token (forward and backward, masked as trained)",
        ),
        (
            "time on GPUs",
            ", ".join(f"{duration(s)} on {costs['ranks']} {gpu} at 40 % MFU" for gpu, s in costs["time"].items()),
        ),
        ("memory per rank", f"{size(memory['total'])} at ZeRO-{costs['zero_stage']}: " + _parts(memory)),
        (
            "disk",
            f"{size(room['checkpoints'])} of checkpoints, {size(room['weights'])} of weights, as much in the export, "
            f"{size(room['shards'])} of shards",
        ),
    ]
    if tuned is not None and costs["step"] == "pretrain":
        steps = f"{tuned['steps']:,} steps of {count(tuned['tokens_per_step'])}"
        lines.append(
            ("then finetune", f"{count(tuned['tokens'])} = {steps}, {tuned['epochs']:g} epochs ({tuned['basis']})")
        )
    out.print(console.table(None, (costs["step"], ""), lines))
    for line in costs["warnings"]:
        out.print(line, markup=False)


def _data_words(amount: dict[str, Any]) -> str:
    if not amount["tokens"]:
        return f"no corpus yet: {amount['basis']}"
    there = f"{count(amount['tokens'])} tokens in {amount['shards']} shards ({amount['basis']})"
    often = "; text read more often than some four times teaches little more" if amount["epochs"] > REPEATS else ""
    return f"{there}: {amount['epochs']:.2f} epochs{often}"


def _parts(memory: dict[str, float]) -> str:
    return ", ".join(f"{name} {size(value)}" for name, value in memory.items() if name != "total")


def memory_per_rank(parameters: int, *, ranks: int, stage: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state on one rank (see the module's docstring).

    In stages 1 and 2 DeepSpeed keeps a second fp32 copy of the part of the weights that a rank updates.
    """
    copy = 4 if stage in (1, 2) else 0
    return {
        "weights": 4 * parameters / (ranks if stage >= 3 else 1),
        "gradients": 4 * parameters / (ranks if stage >= 2 else 1),
        "optimizer": (8 + copy) * parameters / (ranks if stage >= 1 else 1),
    }
