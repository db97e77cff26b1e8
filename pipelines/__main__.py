"""The command line: `athanor VERB …`, the same as `python -m pipelines VERB …`.

A verb is one entry of `VERBS`: its line of help, its options, its function in `verbs.py`. What else stands on the line are
Hydra overrides (`optim.lr=3e-4`, `model=small`), before or after the options. A user's mistake is an exception with
`exit_code = 2`, printed as one paragraph and never as a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

gc.disable()  # what imports make stays: looking for garbage among it takes a tenth of their time

from pipelines.engine.secrets import record_command  # noqa: E402
from pipelines.verbs import commands as verbs  # noqa: E402
from pipelines.verbs.help import cluster_help, settings_help  # noqa: E402

gc.freeze()
gc.enable()

DESCRIPTION = """\
Athanor: raw text to a trained, fine-tuned, evaluated and exported transformer.

start here
  athanor run experiment=demo                       the whole pipeline on this Python's own library, minutes on 2 cores
  athanor run experiment=text corpus.paths=DIR      the same on your own .txt .md .py .jsonl .parquet (also .gz, .zst)
  athanor plan experiment=gpt2-124m zero=2          steps, what is cached, tokens, FLOPs, memory per rank; runs nothing
  athanor run --help                                every experiment, group and setting

verbs (athanor VERB --help tells more)
"""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb: `options` adds its arguments, `function` does it and returns the exit code, `teaches` writes the end of
    its --help from the overrides that stand beside it."""

    help: str
    function: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    teaches: Callable[[Sequence[str]], str] | None = None


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="sweep: KEY=A,B,C; hydra/launcher=ray runs trials side by side"
    )
    parser.add_argument("--until", metavar="STEP", help="stop after this step and what it needs")


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seal", action="store_true", help="seal manifests and leases from before there were seals")


def _tag_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delete", metavar="NAME", help="forget a tag; what it stands for stays")


def _why_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", help="a step's name, e.g. pretrain")


def _trace_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, required=True, help="training step, counted from 1 as in metrics.jsonl")
    _json_option(parser)


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times"
    )
    parser.add_argument(
        "--chat", action="store_true", help="treat the prompt as a user's message to the fine-tuned model"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="STEP|DIR|tag:NAME",
        help="pretrain, finetune, an exported folder or a tag (default: the last made)",
    )
    parser.add_argument("--max-tokens", type=int, default=128, help="most new tokens (default 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens (default 0: all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="keep the smallest set of this probability (default 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    parser.add_argument(
        "--quantize",
        choices=["int8", "int4", "int8_dynamic"],
        help="fewer bits a weight: int8 or int4 weights, or int8 products too (default: as they are)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )


def _certify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["resume"], help="resume: kill training at a random step, continue, compare")


def _submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, send nothing")
    parser.add_argument("--no-follow", action="store_true", help="return at once; ask later with `athanor logs JOB`")


def _job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", help="the job's name as `athanor submit` printed it")


VERBS: dict[str, Verb] = {
    "run": Verb(
        help="make what is missing; again = instant", function=verbs.run, options=_run_options, teaches=settings_help
    ),
    "plan": Verb(
        help="show steps, what is cached, tokens, FLOPs, memory per rank, disk; run nothing",
        function=verbs.plan,
        options=_json_option,
        teaches=settings_help,
    ),
    "why": Verb(help="name the setting or input that makes a step run again", function=verbs.why, options=_why_options),
    "status": Verb(
        help="show every step's state, seconds, key figures, path (contents are checked by verify)",
        function=verbs.status,
        options=_json_option,
    ),
    "verify": Verb(
        help="compare everything in a store with what was published: verify store=DIR",
        function=verbs.verify,
        options=_verify_options,
    ),
    "tag": Verb(
        help="name an artifact: tag NAME STEP experiment=…; without a name, list the store's tags",
        function=verbs.tag,
        options=_tag_options,
    ),
    "generate": Verb(help="continue a prompt with a trained model", function=verbs.generate, options=_generate_options),
    "trace": Verb(help="show the documents in one training batch", function=verbs.trace, options=_trace_options),
    "certify": Verb(
        help="prove exact resume for your own configuration", function=verbs.certify, options=_certify_options
    ),
    "train": Verb(help="the pretrain step alone, under torchrun or python, without Ray", function=verbs.train),
    "submit": Verb(
        help="send a command to a cluster: submit cluster=ray address=URL -- run …",
        function=verbs.submit,
        options=_submit_options,
        teaches=cluster_help,
    ),
    "logs": Verb(help="follow a submitted job's log", function=verbs.logs, options=_job_options),
    "stop": Verb(help="stop a submitted job", function=verbs.stop, options=_job_options),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `athanor` command; leaves with the verb's exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # what the terminal's encoding lacks, and bytes of no encoding
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS)) + 2
        sys.stdout.write(DESCRIPTION + "".join(f"  {name:<{width}}{verb.help}\n" for name, verb in VERBS.items()))
        sys.exit(0)
    name = arguments[0]
    _check_verb(name)
    try:
        options = _parse(name, arguments[1:])
        verbs.check_secrets([*options.overrides, *options.command])  # before anything is written anywhere
        record_command(["athanor", *arguments])
        if name == "submit" and options.command:
            _check_verb(options.command[0])
            options.sent = _parse(options.command[0], options.command[1:])
        sys.exit(VERBS[name].function(options))
    except KeyboardInterrupt:
        _leave("interrupted; what is finished is kept, and the same command again continues from there.", 130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        if getattr(error, "exit_code", None) is None:
            raise
        _leave(str(error), error.exit_code)  # type: ignore[attr-defined]


def _check_verb(name: str) -> None:
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        _leave(
            f"{name!r} is no verb.{hint} The verbs are {', '.join(VERBS)}; `athanor --help` tells what each does.", 2
        )


def _parse(name: str, arguments: list[str]) -> argparse.Namespace:
    """Options of one verb; words after a lone `--` are `command`, the remaining words `overrides`."""
    verb = VERBS[name]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    wants_help = bool({"-h", "--help"} & set(arguments[:at]))
    parser = argparse.ArgumentParser(
        prog=f"athanor {name}",
        description=verb.help,
        epilog=verb.teaches([word for word in arguments[:at] if "=" in word]) if verb.teaches and wants_help else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.options(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings: experiment=demo optim.lr=3e-4 model=small"
    )
    options = parser.parse_intermixed_args(arguments[:at])
    options.command = arguments[at + 1 :]
    return options


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"athanor: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
