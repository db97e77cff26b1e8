"""The steps of an experiment, wired: this screen is the whole pipeline.

    steps = build(compose(["experiment=demo"]))
    list(steps)      # corpus tokenizer shards instructions pretrain finetune evaluate export report

Each step is a plain function in `stages/`; what it is made from (settings, inputs, files) decides its digest.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from conf.files import machine_cache
from conf.refusal import Refusal
from data.rows.instructions import InstructionSettings, instruction_files
from data.tasks.settings import check_pieces
from data.text.corpus import CorpusSettings, corpus_files
from data.text.sources import SourceFile
from data.tokenizers.sentencepiece import Tokenizer
from pipelines.engine.step import Groups, StageFn, Step
from pipelines.engine.waiting import working
from pipelines.evaluation.measure import BASE
from pipelines.settings.derive import Settings, corpus_key
from pipelines.stages import (
    corpus,
    denoise,
    evaluate,
    export,
    finetune,
    instructions,
    rehearsal,
    report,
    shards,
    start,
    tokenizer,
    tracked,
    train,
)
from pipelines.stages.launch import VOLATILE

LEAVES = ("tokenizer/*/*", "model/*/model/*")
"""Files that an export publishes, by group, input and file; every byte is verified first."""
LABELS = {"finetune": "finetuned"}
"""What evaluation calls the model of a training; the first model is its base."""


def build(s: Settings, *, corpus_may_be_missing: bool = False) -> dict[str, Step]:
    """Every step by name, each after what it needs.

    Raises Refusal for a corpus that is not there, unless it may be missing: `plan` tells costs before there is text.
    """
    steps: dict[str, Step] = {}

    def add(name: str, kind: str, run: StageFn, settings: Any, inputs: Groups, **more: Any) -> Step:
        steps[name] = Step(name=name, kind=kind, run=run, settings=settings, inputs=inputs, **{"version": 1, **more})
        return steps[name]

    corpora = {
        name: add(
            name,
            "corpus",
            corpus.run,
            source,
            {},
            version=2,
            files={"text": text_of(name, source, corpus_may_be_missing)},
        )
        for name, source in s.corpora().items()
    }
    begun, weights = {}, s.open_start()
    if weights is not None:
        begun["start"] = add("start", "start", start.run, weights.settings, {}, files={"weights": weights.weights})
    brought = None
    if weights is not None and weights.tokenizer:
        brought = Tokenizer.load(weights.tokenizer_folder)
        taken = tokenizer.TakenTokenizer(folder=str(weights.tokenizer_folder), config_ids=weights.config_ids)
        check_pieces(s.objective, brought, s.shards.seq_len)
        pieces = add("tokenizer", "tokenizer", tokenizer.take, taken, {}, files={"tokenizer": weights.tokenizer})
    else:
        pieces = add("tokenizer", "tokenizer", tokenizer.run, s.resolved_tokenizer(), {"corpus": corpora})
    of_tokenizer = {"tokenizer": {"tokenizer": pieces}}
    rows = {
        source_of(name): add(
            "shards" + name.removeprefix("corpus"),
            "rows",
            shards.run,
            s.shards,
            {"corpus": {"corpus": step}, **of_tokenizer},
            keys={"corpus/corpus": "corpus"},
            version=2,
            self_checking=("*.tar",),
        )
        for name, step in corpora.items()
    }
    chats: dict[str, Step] = {}
    if s.finetune is not None:
        chats["instructions"] = add(
            "instructions",
            "conversations",
            instructions.run,
            s.finetune.rows(s.shards.seq_len),
            {"corpus": corpora if s.finetune.data.kind == "functions" else {}, **of_tokenizer},
            version=2,
            files={"conversations": conversations_of(s.finetune.data)},
            self_checking=("*.tar",),
        )
    training = {"volatile": VOLATILE, "resumes": True, "cpus": s.compute.cpus, "gpus": s.compute.gpus}
    if s.pretrains:
        sources = {"rows": rows, **of_tokenizer, "begin": begun}
        # Conversations that cannot be tuned on are refused before hours of pretraining.
        begins_after = {**training, "after": tuple(chats.values())}
        models = {"pretrain": add("pretrain", "model", train.run, s.pretraining(), sources, **begins_after)}
    else:
        s.resolved_model()  # raises where folder, rows and tokenizer do not fit
        models = {"pretrain": begun["start"]}
    if (tuned := s.finetuning()) is not None and s.finetune is not None:
        conversations = {"conversations": chats["instructions"]}
        sources = {"conversations": conversations, **of_tokenizer, "begin": {"pretrain": models["pretrain"]}}
        training |= {
            "keys": {"begin/pretrain": "pretrain"},
            "check": partial(finetune.check_conversations, s.finetune, s.shards.seq_len, s.compute.ranks),
            "check_inputs": partial(train.check_rows, tuned),
        }
        models["finetune"] = add("finetune", "model", train.run, tuned, sources, **training)

    held_out: dict[str, dict[str, Step]] = {"corpus": corpora, "rows": rows, **of_tokenizer}
    held_out["model"] = {LABELS.get(name, BASE): step for name, step in models.items()}
    held_out["conversations"] = chats
    as_pretrain = {"keys": {f"model/{name}": "pretrain" for name in ("pretrain", BASE)}}
    if corpora and not s.writes_from_left_to_right():
        asked = denoise.DenoiseSettings(evaluate=s.evaluating(), objective=s.objective, seq_len=s.shards.seq_len)
        given = {group: held_out[group] for group in ("corpus", "tokenizer", "model")}
        add("evaluate", "evaluation", denoise.run, asked, given, version=2, volatile=tracked.VOLATILE, **as_pretrain)
    elif corpora or s.finetune is not None:
        tasks = {"tasks": evaluate.task_files(s.evaluate)}

        def check_evaluation() -> None:
            longest = s.tokenizer.max_piece_characters
            evaluate.check_prompts(s.evaluate.samples, s.resolved_model().max_seq_len, brought, longest)
            evaluate.check_tasks(s.evaluate, s.evaluation_windows())

        add(
            "evaluate",
            "evaluation",
            evaluate.run,
            s.evaluating(),
            held_out,
            version=2,
            files=tasks,
            volatile=tracked.VOLATILE,
            check=check_evaluation,
            **as_pretrain,
        )
    export.check_source(s.export, models)
    foreign = None
    if weights is not None:
        foreign = partial(
            rehearsal.rehearse,
            s.resolved_model(),
            weights.tokenizer_folder if weights.tokenizer else None,
            machine_cache(),
        )
    proof = {"corpus": corpora, **of_tokenizer, "model": models}
    add("export", "export", export.run, s.export, proof, version=2, rechecked=LEAVES, check=foreign, **as_pretrain)
    by_kind: dict[str, dict[str, Step]] = {}
    for step in steps.values():
        by_kind.setdefault(step.kind, {})[step.name] = step
    # Volatile, as it shows seconds. A report is made after failures too, and lists them.
    add(
        "report",
        "report",
        report.run,
        s.report,
        by_kind,
        version=2,
        volatile=("report.html",),
        despite=s.report.without,
    )
    return steps


def source_of(corpus_step: str) -> str:
    """The source of a corpus step, as `mixture` names it: `corpus-books` → books, `corpus` → corpus."""
    return corpus_step.removeprefix("corpus-")


def text_of(step: str, source: CorpusSettings, may_be_missing: bool) -> tuple[Path, ...]:
    """The files of a corpus step, or none where it may be missing and is."""
    try:
        with working(f"{step}: the files in {corpus_key(step)}.paths are listed") as how_far:
            return paths(
                corpus_files(source, key=corpus_key(step), on_progress=lambda files: how_far(f"{files:,} so far"))
            )
    except Refusal:
        if may_be_missing:
            return ()
        raise


def conversations_of(source: InstructionSettings) -> tuple[Path, ...]:
    """The user's files of conversations."""
    with working("instructions: the files in finetune.data.paths are listed"):
        return paths(instruction_files(source))


def paths(files: list[SourceFile]) -> tuple[Path, ...]:
    """Files from outside, which enter a step's digest by their content."""
    return tuple(Path(file.path) for file in files)
