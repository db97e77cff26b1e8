"""The steps of an experiment, wired: this screen is the whole pipeline.

    steps = build(compose(["experiment=demo"]))
    list(steps)      # corpus tokenizer shards instructions pretrain finetune evaluate export report

Each step is a plain function in `stages/`; what it is made from (settings, inputs, files) decides its digest.
"""

from __future__ import annotations

from pathlib import Path

from data.readers import corpus_files
from pipelines.engine.step import Step
from pipelines.settings import Settings
from pipelines.stages import corpus, evaluate, export, finetune, instructions, pretrain, report, shards, tokenizer
from pipelines.stages.launch import Launch

LOGS = ("metrics.jsonl", "logs/*", "ds_config.json", "run.json", "checkpoints/*")
"""Written by training, true of one run only: timings, world size. They stay out of the content digest."""


def build(s: Settings) -> dict[str, Step]:
    """Every step by name, each after what it needs. Raises DataError for a corpus that is not there."""
    launch = Launch.of(s.compute, zero=s.zero, tracking=s.tracking)
    corpora: dict[str, Step] = {}
    for name, source in s.corpora().items():
        files = tuple(Path(path) for path in corpus_files(source))
        corpora[name] = Step(name=name, run=corpus.run, version=1, settings=source, files={"text": files})

    tokens = Step(name="tokenizer", run=tokenizer.run, version=1, settings=s.tokenizer, inputs=corpora)

    rows = {
        name.replace("corpus", "shards"): Step(
            name=name.replace("corpus", "shards"),
            run=shards.run,
            version=1,
            settings=s.shards,
            inputs={"corpus": step, "tokenizer": tokens},
        )
        for name, step in corpora.items()
    }

    base = Step(
        name="pretrain",
        run=pretrain.run,
        version=1,
        settings=pretrain.Pretraining.of(s, launch),
        inputs={**rows, "tokenizer": tokens},
        volatile=LOGS,
        resumes=True,
        cpus=launch.cpus,
        gpus=launch.gpus,
    )
    steps = [*corpora.values(), tokens, *rows.values()]
    models = {"pretrain": base}

    if s.finetune is not None:
        pairs = Step(
            name="instructions",
            run=instructions.run,
            version=1,
            settings=s.finetune.data,
            inputs={**corpora, "tokenizer": tokens},
            files=instructions.files(s.finetune.data),
        )
        models["finetune"] = Step(
            name="finetune",
            run=finetune.run,
            version=1,
            settings=finetune.Finetuning.of(s, launch),
            inputs={"pretrain": base, "instructions": pairs, "tokenizer": tokens},
            volatile=LOGS,
            resumes=True,
            cpus=launch.cpus,
            gpus=launch.gpus,
        )
        steps.append(pairs)
    steps += models.values()

    held_out = {**corpora, **rows, "tokenizer": tokens, **models}
    scores = Step(name="evaluate", run=evaluate.run, version=1, settings=s.evaluate, inputs=held_out)
    exported = Step(
        name="export", run=export.run, version=1, settings=s.export, inputs={**corpora, "tokenizer": tokens, **models}
    )
    steps += [scores, exported]
    steps.append(
        Step(name="report", run=report.run, version=1, settings=report.ReportSettings(), inputs={x.name: x for x in steps})
    )
    return {step.name: step for step in steps}
