"""The command a job runs elsewhere: `python -m pipelines VERB …` with a store that outlives the job."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from conf.refusal import NO_VALUE, Refusal


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a job: `count` of them, with CPUs and GPUs of each; `settings` spells those that set these."""

    count: int
    cpus: int
    gpus: int
    settings: str


def given_store(command: Sequence[str]) -> str | None:
    """The value of the last `store=` override in `command`, or None. Raises Refusal for a relative path."""
    stores = [argument.split("=", 1)[1] for argument in command if argument.startswith("store=")]
    if not stores:
        return None
    check_store(stores[-1])
    return stores[-1]


def check_store(store: str) -> None:
    """Raise Refusal unless `store` is an absolute path or a URL."""
    if not (store.startswith("/") or "://" in store):
        raise Refusal(
            "store",
            store,
            "a relative path would lie in the job's own folder on a cluster and vanish with it",
            "give an absolute path that every machine of the cluster sees, or a URL such as s3://bucket/prefix",
        )


def check_command(command: Sequence[str]) -> None:
    """Raise Refusal unless there is a verb to run."""
    if not command or "=" in command[0] or command[0].startswith("-"):
        raise Refusal(
            "athanor submit",
            NO_VALUE,
            f"after `--` a verb must come first, and there is {shlex.join(command) or 'nothing'}",
            "write: athanor submit cluster=ray address=http://HOST:8265 -- run experiment=demo",
        )


def shell_line(python: str, command: Sequence[str]) -> str:
    """`python -m pipelines …`, quoted for a POSIX shell."""
    return shlex.join([python, "-m", "pipelines", *command])


def job_name(command: Sequence[str], *more: str) -> str:
    """A name that is the same for the same command: `athanor-<experiment or verb>-<8 hex>`, fit for a DNS label."""
    experiments = [argument.split("=", 1)[1] for argument in command if argument.startswith("experiment=")]
    stem = (
        re.sub(r"[^a-z0-9]+", "-", (experiments[-1] if experiments else command[0]).lower()).strip("-")[:30].strip("-")
    )
    digest = hashlib.sha256("\0".join([*command, *more]).encode()).hexdigest()[:8]
    return f"athanor-{stem or 'job'}-{digest}"
