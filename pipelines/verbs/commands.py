"""What each verb of the command line does: settings, then the engine or a room, then what to print."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.refusal import NO_VALUE, Refusal, Shown
from pipelines.console import display as console
from pipelines.engine import explain, runner
from pipelines.engine.events import StepReport
from pipelines.engine.secrets import refuse_secrets
from pipelines.engine.store.open import open_store
from pipelines.execution import execute, find_artifact, get_step, require_artifact
from pipelines.graph import build
from pipelines.settings.compose import compose, section

if TYPE_CHECKING:
    from cluster.submit import ClusterSettings


def run(arguments: argparse.Namespace) -> int:
    """`athanor run`: make what is missing, print what was made and what to type next."""
    if arguments.multirun:
        from pipelines.verbs.sweep import sweep

        return sweep(arguments.overrides, arguments.until)
    settings = compose(arguments.overrides)
    steps = build(settings)
    targets = [get_step(steps, arguments.until)] if arguments.until else list(steps.values())
    reports = execute(settings, targets)
    out = console.console()
    out.print()
    console.print_steps(reports)
    out.print()
    prompt = (*settings.evaluate.samples.prompts, "Once ")[0].partition("\n")[0]
    prompt = prompt if settings.writes_from_left_to_right() else ""
    # Not through rich, which would break a long command into lines that a shell does not take.
    until = ["--until", arguments.until] if arguments.until else []
    sys.stdout.write(_next_words(arguments.overrides, until, reports, prompt) + "\n")
    return 0


def check_secrets(overrides: Sequence[str]) -> None:
    """Refuse overrides with a secret in them: settings are written into manifests, notes and jobs. Raises Refusal."""
    for override in overrides:
        key, _, value = override.partition("=")
        refuse_secrets(value or key, f"{key}=…" if value else "the command line")


ENDINGS = {
    "end": "the model",
    "stop": "a stop text",
    "length": "--max-tokens",
    "context": "the model's context",
}
"""What ended a completion, as a person who typed the command calls it."""


def _next_words(overrides: Sequence[str], until: Sequence[str], reports: Sequence[StepReport], prompt: str) -> str:
    """What to type next, whole commands for a shell; `prompt` is empty for a model that continues none."""
    paths = {report.name: console.shown_path(report.path) for report in reports}
    models = [report.name for report in reports if report.kind == "model"]
    same = shlex.join(overrides)
    lines = []
    if "report" in paths:
        lines.append(f"open     {shlex.quote(paths['report'] + '/report.html')}")
    if prompt and models:
        lines.append(f"try      athanor generate {same} --prompt {shlex.quote(prompt)}")
    if "pretrain" in paths:
        lines.append(f"look     athanor trace {same} --step 1")
    if "export" in paths:
        loader = "AutoModelForCausalLM" if prompt else "AutoModel"
        lines.append(f"load     transformers.{loader}.from_pretrained({paths['export'] + '/model'!r})")
    only_tuned = "finetune" in paths and "pretrain" not in paths
    change, step = ("finetune.train.optim.lr", "finetune") if only_tuned else ("optim.lr", "pretrain")
    lines.append(f"change   athanor run {shlex.join([*overrides, f'{change}=1e-3', *until])}")
    lines.append(f"why      athanor why {step} {same} {change}=1e-3")
    return "\n".join(lines)


def plan(arguments: argparse.Namespace) -> int:
    """`athanor plan`: what would run and what it would cost."""
    from pipelines.verbs import plan as planning

    settings = compose(arguments.overrides)
    steps = build(settings, corpus_may_be_missing=True)
    reports = runner.plan(list(steps.values()), store=open_store(settings.store), checked=True)
    _log_unsealed(reports, settings.store)
    costs = planning.estimate(settings, reports)
    if arguments.json:
        console.print_json({"steps": steps_json(reports), "costs": costs})
    else:
        planning.show(reports, costs)
    return 0


def why(arguments: argparse.Namespace) -> int:
    """`athanor why STEP`: the field, input or file that makes a step run again."""
    overrides = list(arguments.overrides)
    settings = compose(overrides)
    step = get_step(build(settings), arguments.step)
    console.console().print(str(explain.why(step, store=open_store(settings.store))), markup=False)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """`athanor status`: every step's state now."""
    settings = compose(arguments.overrides)
    reports = runner.status(list(build(settings).values()), store=open_store(settings.store))
    _log_unsealed(reports, settings.store)
    if arguments.json:
        console.print_json({"steps": steps_json(reports)})
    else:
        console.print_steps(reports)
    return 0


def _log_unsealed(reports: Sequence[StepReport], store: str) -> None:
    """Log one line if artifacts predate sealed manifests."""
    urls = [str(report.path) for report in reports if not report.sealed]
    if urls:
        sys.stderr.write(f"[{runner.unsealed_line(urls, store)}]\n")


def verify(arguments: argparse.Namespace) -> int:
    """`athanor verify`: every byte of a store against its checksum; 1 if one is damaged."""
    from pipelines.verbs.verify import verify as compare

    return compare(arguments.overrides, seal=arguments.seal)


def tag(arguments: argparse.Namespace) -> int:
    """`athanor tag`: names for artifacts."""
    from pipelines.verbs.tags import tag as give_or_list

    return give_or_list(arguments.overrides, delete=arguments.delete)


def steps_json(reports: Sequence[StepReport]) -> list[dict[str, Any]]:
    """What programs are told of steps; `status --json` promises these keys."""
    fields = ("name", "digest", "state", "path", "metrics", "seconds")
    return [{name: getattr(report, name) for name in fields} for report in reports]


def generate(arguments: argparse.Namespace) -> int:
    """`athanor generate`: continue prompts with the last model made, or with the one `--from` names."""
    from pipelines.inference.generator import GenerateSettings, TextGenerator

    if not arguments.prompt:
        raise Refusal(
            "--prompt",
            NO_VALUE,
            "there is none",
            "add --prompt 'def ' (may be given several times), or --chat --prompt 'a question'",
        )
    step, model_dir, tokenizer_dir = _model_folders(arguments)
    if arguments.chat and step == "pretrain":
        sys.stderr.write("[a pretrained model, not fine-tuned on conversations: it continues the chat as text]\n")
    generator = TextGenerator.open(model_dir, tokenizer_dir)
    if arguments.quantize:
        sys.stderr.write(f"[{generator.quantize(arguments.quantize)}]\n")
    settings = GenerateSettings(
        max_new_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )
    for prompt in map(_as_utf8, arguments.prompt):
        generator.room(prompt, chat=arguments.chat)  # a prompt that is too long is refused before it is repeated
        sys.stdout.write("" if arguments.chat else prompt)
        done = generator.generate(prompt, settings, chat=arguments.chat, on_text=_write_now)
        sys.stdout.write("\n")
        sys.stderr.write(
            f"[{done.tokens} tokens, {done.tokens_per_second:.0f} tokens/s, ended by {ENDINGS[done.finish]}]\n"
        )
    return 0


def _as_utf8(prompt: str) -> str:
    """A prompt with U+FFFD for bytes that are not UTF-8, which a command line holds as lone surrogates; logged if any."""
    from data.tokenizers.base import SURROGATES

    text, replaced = SURROGATES.subn("\ufffd", prompt)
    if replaced:
        sys.stderr.write(f"[a prompt is not UTF-8 throughout: U+FFFD stands for {replaced} of its bytes]\n")
    return text


def _model_folders(arguments: argparse.Namespace) -> tuple[str | None, Path, Path | None]:
    """The step that made the weights, if one did, and where they and the tokenizer lie: a folder that is both, or a step's
    artifact and the tokenizer's."""
    from pipelines.stages.checksums import check_checksums

    if arguments.source and Path(arguments.source).is_dir():
        check_checksums(Path(arguments.source))
        return None, Path(arguments.source), None
    if arguments.source and arguments.source.startswith("tag:"):
        from pipelines.verbs.tags import tagged_model

        return tagged_model(arguments.source, arguments.overrides)
    if arguments.source and ("/" in arguments.source or not arguments.overrides):
        raise Refusal(
            "--from",
            Shown(arguments.source),
            "no such folder",
            "name an exported folder that is there, or a step and the experiment that made it: athanor generate "
            "experiment=demo --from pretrain --prompt 'def '",
        )
    settings = compose(arguments.overrides)
    steps = build(settings)
    trained = [name for name, step in steps.items() if step.kind == "model"][::-1]
    wanted = arguments.source or next((name for name in trained if find_artifact(settings, steps[name])), trained[-1])
    words = arguments.overrides
    model = require_artifact(settings, get_step(steps, wanted), words, rechecked=("model/*",)) / "model"
    return wanted, model, require_artifact(settings, steps["tokenizer"], words, rechecked=("*",))


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def certify(arguments: argparse.Namespace) -> int:
    """`athanor certify resume`: kill and continue a scaled-down copy of this configuration, compare, tell."""
    from pipelines.verbs.certify import certify_resume

    return certify_resume(arguments.overrides)


def trace(arguments: argparse.Namespace) -> int:
    """`athanor trace --step N`: from a training step back to files, documents, characters, text."""
    from data.loader import order_over
    from data.rows.shard_set import ShardSet
    from data.tokenizers.sentencepiece import Tokenizer
    from data.trace import trace_step

    settings, words = compose(arguments.overrides), arguments.overrides
    steps = build(settings)
    pretrain_step, run_settings = get_step(steps, "pretrain"), settings.pretraining()
    rows_steps = pretrain_step.inputs["rows"]
    shard_sets = {source: ShardSet.open(require_artifact(settings, step, words)) for source, step in rows_steps.items()}
    corpora = {
        source: require_artifact(settings, step.inputs["corpus"]["corpus"], words) / "train"
        for source, step in rows_steps.items()
    }
    tokens_per_step = run_settings.train.global_batch_tokens
    if arguments.step > (last := run_settings.train.total_tokens // tokens_per_step):
        raise Refusal("--step", arguments.step, f"this run has {last:,} steps", f"name one from 1 to {last}")
    rows = trace_step(
        shard_sets,
        order_over(shard_sets, order=run_settings.order, mixture=run_settings.mixture),
        step=arguments.step,
        rows_per_step=tokens_per_step // settings.shards.seq_len,
        tokenizer=Tokenizer.load(require_artifact(settings, steps["tokenizer"], words)),
        corpora=corpora,
    )
    if arguments.json:
        console.print_json([dataclasses.asdict(row) for row in rows])
        return 0
    out = console.console()
    for row in rows:
        out.print(
            f"row {row.global_row}  {row.source} epoch {row.epoch}  {row.shard} block {row.block} row {row.row}",
            markup=False,
        )
        for piece in row.pieces:
            span = (
                f"characters {piece.characters[0]}-{piece.characters[1]}"
                if piece.characters
                else f"token {piece.first_token}"
            )
            text = piece.text if len(piece.text) <= 80 else piece.text[:60] + " … " + piece.text[-16:]
            out.print(
                f"  {piece.start:>5}-{piece.stop:<5} {piece.file} at {piece.position}, {span}  {text!r}", markup=False
            )
    return 0


def train(arguments: argparse.Namespace) -> int:
    """`athanor train`: the pretrain step in the processes torchrun started (or in this one), without Ray.

    Its inputs are made first, by rank 0 with the local backend; the result is published as `athanor run` would.
    """
    from pipelines.verbs.torchrun import pretrain

    return pretrain(compose(arguments.overrides))


def submit(arguments: argparse.Namespace) -> int:
    """`athanor submit`: hand a command to a cluster; the job's exit code if its log is followed."""
    from cluster.submit import submit as send
    from pipelines.verbs.travel import prepare_command

    if not arguments.command:
        raise Refusal(
            "submit",
            NO_VALUE,
            "there is no command to submit",
            "put it after two dashes: submit cluster=ray address=URL -- run experiment=demo",
        )
    settings = cluster_settings(arguments.overrides)
    command, lines = prepare_command(settings, arguments.command, arguments.sent)
    for line in lines:
        sys.stderr.write(line + "\n")
    return send(settings, command, dry_run=arguments.dry_run, follow=not arguments.no_follow)


def logs(arguments: argparse.Namespace) -> int:
    """`athanor logs JOB`: follow a submitted job; its exit code."""
    from cluster.submit import logs as follow

    return follow(arguments.job, address=_address(arguments.overrides))


def stop(arguments: argparse.Namespace) -> int:
    """`athanor stop JOB`: end a submitted job; what it has made is kept."""
    from cluster.submit import stop as end

    return end(arguments.job, address=_address(arguments.overrides))


def cluster_settings(overrides: Sequence[str]) -> ClusterSettings:
    """Settings of `submit`: conf/cluster/KIND.yaml with KEY=VALUE on top. Raises Refusal for a mistake in them."""
    from cluster.submit import KINDS

    if strays := [word for word in overrides if "=" not in word]:
        raise Refusal(
            "submit", strays[0], "no setting of a cluster", "write KEY=VALUE, and the command after two dashes"
        )
    values = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in overrides)}
    kind = values.pop("cluster", None)
    if kind not in KINDS:
        near = difflib.get_close_matches(kind or "", KINDS, n=1)
        advice = f"add cluster=KIND, one of {', '.join(KINDS)}"
        advice = f"did you mean cluster={near[0]}? Else {advice}" if near else advice
        raise Refusal("cluster", Shown(kind) if kind else None, "no such cluster" if kind else "none is chosen", advice)
    return section(KINDS[kind], f"cluster/{kind}", values)


def _address(overrides: Sequence[str]) -> str | None:
    """`address=URL` of a job's cluster, or None: then the note that submit left says where the job is."""
    values = dict(word.partition("=")[::2] for word in overrides)
    if (kind := values.pop("cluster", "ray")) != "ray":
        raise Refusal("cluster", Shown(kind), "only jobs of cluster=ray can be asked about", "leave it out")
    if unknown := set(values) - {"address"}:
        raise Refusal(
            ", ".join(sorted(unknown)),
            NO_VALUE,
            "no setting of a job",
            "there are address=URL of the cluster's dashboard and cluster=ray",
        )
    return values.get("address")
