"""Jobs on a running Ray cluster: submit, follow, ask again, stop. Ray's Jobs API is the only thing spoken.

The job is the cluster's from the moment it is accepted: whoever follows it may leave (Ctrl-C, a closed laptop) and ask
again later. Ray runs a job once and never retries it; that is right here, because the same command goes on from the
store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.command import check_command, check_store, given_store, job_name, shell_line
from cluster.tree import Package, pack, working_tree
from conf.refusal import NO_VALUE, Refusal

ANSWER_SECONDS = 4.0
"""How long an address may take to connect and, again, to answer before it counts as dead."""

PATIENCE_SECONDS = 60.0
"""How long a follower bears a cluster that stopped answering."""

_HOME_STORE = '"store=$HOME/athanor/runs"'
_UNDER_WAY = ("PENDING", "RUNNING")
_STOPPED_EXIT_CODE = 143
_COMMAND_NOT_FOUND = 127


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """A running Ray cluster and what a job brings to it."""

    kind: Literal["ray"] = "ray"
    """A Ray cluster that is running already."""
    address: str | None = None
    """The cluster's dashboard, http://HOST:8265; null: the address in RAY_API_SERVER_ADDRESS."""
    python: str = "python"
    """The Python interpreter on the head, with Athanor's dependencies installed."""
    pip: tuple[str, ...] = ()
    """Packages that Ray installs for the job before it starts, as pip names them."""
    tree: str | None = None
    """The checkout to ship; null: this one."""
    store: str | None = None
    """Where artifacts go if the command names no store; null: athanor/runs in a home shared by all machines."""
    pass_env: tuple[str, ...] = ()
    """Names (never values) of environment variables of this shell that the job gets, such as WANDB_API_KEY."""

    def __post_init__(self) -> None:
        if self.store is not None:
            check_store(self.store)
        for name in self.pass_env:
            if not name.isidentifier():
                raise Refusal(
                    "pass_env",
                    name.split("=", 1)[0],
                    "names of environment variables only, never values",
                    "set the variable in this shell and write 'pass_env=[NAME]'",
                )


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """What the cluster says of a job. `exit_code` is None until it ended."""

    job: str
    address: str
    state: Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
    exit_code: int | None
    message: str


def log_line(line: str) -> None:
    """To the person; the job's own log goes to standard output."""
    print(line, file=sys.stderr, flush=True)


def submit(settings: RaySettings, command: Sequence[str], *, dry_run: bool, follow: bool) -> int:
    """Ship the tree, start the job, follow its log. The job's exit code, or 0 when only submitted."""
    check_command(command)
    name, entrypoint = job_name(command, _store_text(settings, command)), _entrypoint(settings, command)
    tree = working_tree(settings.tree)
    with tempfile.TemporaryDirectory(prefix="athanor-") as scratch:
        package = pack(tree, Path(scratch) / "tree.zip")
        log_line(
            f"tree: {package.files} files of {tree}, {package.bytes / 2**20:.1f} MiB packed, {package.digest[:12]}"
        )
        log_line(f"store: {_store_text(settings, command)}")
        if dry_run:
            print(
                f"job: {name}\nentrypoint: {entrypoint}\npip: {list(settings.pip)}\npass_env: {list(settings.pass_env)}"
            )
            return 0
        jobs = RayJobs(_address(settings.address))
        job = jobs.start(name, entrypoint, _runtime_env(settings, package), package.digest)
    save_address(job, jobs.address)
    log_line(f"  athanor logs {job} address={jobs.address}\n  athanor stop {job} address={jobs.address}")
    return jobs.follow(job) if follow else 0


def logs(job: str, *, address: str | None = None, follow: bool = True) -> int:
    """Print the job's log from its beginning, and go on until it ends if `follow`. Its exit code; 0 while it runs."""
    jobs = RayJobs(address or saved_address(job))
    if follow:
        return jobs.follow(job)
    status = jobs.status(job)
    sys.stdout.write(jobs.log(job))
    return status.exit_code or 0


def stop(job: str, *, address: str | None = None) -> int:
    """Ask the job to end and wait until it did. 0, also when it had ended before."""
    jobs = RayJobs(address or saved_address(job))
    log_line(jobs.stop(job))
    return 0


def status(job: str, *, address: str | None = None) -> JobStatus:
    """What the cluster says of the job. Raises Refusal when it does not know it."""
    return RayJobs(address or saved_address(job)).status(job)


class RayJobs:
    """The jobs of one cluster. Any method raises Refusal when the cluster does not answer or does not know the
    job."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = _connect(address)

    def start(self, name: str, entrypoint: str, runtime_env: dict[str, Any], tree_digest: str) -> str:
        """The job's id. The same command already under way is joined, not started twice."""
        known = {details.submission_id: details for details in self._request(self._client.list_jobs)}
        attempt, job = 1, name
        while job in known:
            if _state(known[job]) in _UNDER_WAY:
                other = (known[job].metadata or {}).get("tree") != tree_digest
                log_line(f"{job} is already under way on {self.address} with the same command: following that one.")
                if other:
                    log_line(
                        f"  It runs the tree as it was then. To run today's: athanor stop {job}, then submit again."
                    )
                return job
            attempt += 1
            job = f"{name}-{attempt}"
        self._request(
            lambda: self._client.submit_job(
                entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env, metadata={"tree": tree_digest}
            )
        )
        log_line(f"submitted {job} to {self.address}")
        return job

    def follow(self, job: str) -> int:
        """Print the log until the job ends; its exit code. Ctrl-C leaves the job running and gives 130."""
        self.status(job)
        try:
            printed = self._print_until_end(job)
        except KeyboardInterrupt:
            log_line(
                f"\n{job} goes on without us.\n  athanor logs {job} address={self.address}\n  athanor stop {job} …"
            )
            return 130
        ended = self.status(job)
        sys.stdout.write(self.log(job)[printed:])
        sys.stdout.flush()
        advice = _advice(ended)
        if ended.exit_code and "ModuleNotFoundError: No module named" in self.log(job):
            advice += "\n  The head's `python` lacks a package: give python=/path/to/python of one that has Athanor's."
        log_line(f"{job}: {ended.state.lower()}, exit code {ended.exit_code}{advice}")
        return ended.exit_code or 0

    def stop(self, job: str) -> str:
        """End the job and wait until it did; what to tell the person."""
        before = self.status(job)
        if before.exit_code is not None:
            return f"{job} had already ended: {before.state.lower()}, exit code {before.exit_code}."
        self._request(lambda: self._client.stop_job(job))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.status(job).exit_code is None:
            if time.monotonic() > deadline:
                raise Refusal(
                    job,
                    NO_VALUE,
                    f"still runs on {self.address}, {PATIENCE_SECONDS:.0f} s after it was asked to stop",
                    "look at its dashboard, and stop it again",
                )
            time.sleep(0.5)
        return (
            f"{job} stopped. What it finished stays in the store; submitting the same command again goes on from there."
        )

    def status(self, job: str) -> JobStatus:
        """Where a job stands. Raises Refusal for a job the cluster does not know."""
        details = self._request(lambda: self._client.get_job_info(job), job)
        state = _state(details)
        return JobStatus(
            job=job,
            address=self.address,
            state=state,
            exit_code=_exit_code(state, details.driver_exit_code),
            message=details.message or "",
        )

    def log(self, job: str) -> str:
        """Everything the job printed so far."""
        return str(self._request(lambda: self._client.get_job_logs(job), job))

    def _print_until_end(self, job: str) -> int:
        """Print the log while the job lives; how many characters were printed. Survives a connection that breaks."""
        printed, last_answer_at = 0, time.monotonic()
        while True:
            printed = asyncio.run(self._tail(job, printed))
            try:
                if self.status(job).exit_code is not None:
                    return printed
                # The stream broke off: catch up over plain HTTP, which is all that some proxies let through.
                rest = self.log(job)[printed:]
                sys.stdout.write(rest)
                sys.stdout.flush()
                printed, last_answer_at = printed + len(rest), time.monotonic()
            except Refusal as refusal:
                if time.monotonic() - last_answer_at > PATIENCE_SECONDS:
                    raise Refusal(
                        job,
                        NO_VALUE,
                        f"{refusal} The job may go on without us",
                        f"ask for it later: athanor logs {job}",
                    ) from refusal
            time.sleep(1.0)

    async def _tail(self, job: str, printed: int) -> int:
        """Print the stream from character `printed` on, until it ends or breaks; the new count."""
        skip, stream = printed, self._client.tail_job_logs(job)
        while True:
            try:
                chunk = await anext(stream)
            except (
                Exception
            ):  # StopAsyncIteration, sockets, websockets: the caller asks the cluster what became of the job
                return printed
            new = chunk[skip:]
            skip = max(0, skip - len(chunk))
            sys.stdout.write(new)
            sys.stdout.flush()
            printed += len(new)

    def _request(self, request: Callable[[], Any], job: str | None = None) -> Any:
        """Ask the cluster; what it refuses is a Refusal."""
        try:
            return request()
        except (RuntimeError, OSError) as error:
            if job is not None and "status code 404" in str(error):
                raise Refusal(
                    job,
                    NO_VALUE,
                    f"{self.address} knows no such job. Jobs are forgotten when a cluster is restarted",
                    "what a job made is in its store",
                ) from error
            raise Refusal("address", self.address, f"the cluster refused: {_first_line(error)}") from error


def _connect(address: str) -> Any:
    """A client of the dashboard at `address`, or Refusal within twice ANSWER_SECONDS."""
    remedy = (
        "check with `ray status` on the head that the cluster runs and with `curl ADDRESS/api/version` that its "
        "dashboard can be reached from here (a tunnel: ssh -L 8265:localhost:8265 HOST)"
    )
    if not address.startswith(("http://", "https://")):
        raise Refusal(
            "address",
            address,
            "jobs are sent to the dashboard of the Ray head, not to its other ports",
            "give address=http://HOST:8265",
        )
    import requests  # Ray's own HTTP library; slow to import, like ray itself
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for chatty in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{chatty}").setLevel(logging.WARNING)
    try:
        # Ray's client waits for ever on a host that takes the connection and stays silent.
        requests.get(f"{address}/api/version", timeout=ANSWER_SECONDS)
        with _without_environment("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise Refusal(
            "address",
            address,
            "this Ray cluster asks for a token",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file that holds it",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise Refusal(
            "address", address, f"does not answer as a Ray dashboard: {_first_line(error)}", remedy
        ) from error


@contextmanager
def _without_environment(*names: str) -> Iterator[None]:
    """Ray lets these variables overrule an address given in so many words; here the given one counts."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _runtime_env(settings: RaySettings, package: Package) -> dict[str, Any]:
    missing = [name for name in settings.pass_env if name not in os.environ]
    if missing:
        raise Refusal(
            "pass_env",
            missing,
            "not set in this shell, so there is nothing to hand on",
            "export it, or leave it out",
        )
    if settings.pass_env:
        log_line(
            f"environment: {', '.join(settings.pass_env)} go with the job. Ray itself keeps the values with the job's "
            "record and in the head's log, for whoever can reach the dashboard or that disk. Setting them where the "
            "cluster's Ray is started avoids this."
        )
    runtime_env: dict[str, Any] = {"working_dir": str(package.path)}
    if settings.pip:
        runtime_env["pip"] = list(settings.pip)
    if settings.pass_env:
        runtime_env["env_vars"] = {name: os.environ[name] for name in settings.pass_env}
    return runtime_env


def _entrypoint(settings: RaySettings, command: Sequence[str]) -> str:
    if given_store(command) is not None:
        return shell_line(settings.python, command)
    if settings.store is not None:
        return shell_line(settings.python, [*command, f"store={settings.store}"])
    return f"{shell_line(settings.python, command)} {_HOME_STORE}"


def _store_text(settings: RaySettings, command: Sequence[str]) -> str:
    return given_store(command) or settings.store or "$HOME/athanor/runs on the head (several machines need store=…)"


def _state(details: Any) -> Any:
    return str(details.status.value)


def _exit_code(state: str, driver_exit_code: int | None) -> int | None:
    """A shell's exit code: 128 + n for a driver that signal n ended."""
    if state in _UNDER_WAY:
        return None
    if state == "STOPPED":
        return _STOPPED_EXIT_CODE
    if driver_exit_code is None:
        return 0 if state == "SUCCEEDED" else 1
    return driver_exit_code if driver_exit_code >= 0 else 128 - driver_exit_code


def _advice(ended: JobStatus) -> str:
    if ended.exit_code == _COMMAND_NOT_FOUND:
        return "\n  The head's Ray has no such command on its PATH: give python=/path/to/python of the head."
    if ended.state == "FAILED" and not ended.message.startswith("Job entrypoint command failed"):
        return f"\n  {ended.message}"
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def _address(address: str | None) -> str:
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise Refusal(
            "address", NO_VALUE, "no cluster named", "give the dashboard of the Ray head: address=http://HOST:8265"
        )
    return address.rstrip("/")


def save_address(job: str, address: str) -> None:
    """Note where the job went, so that `athanor logs JOB` needs no address. Not when the address carries a password."""
    if "@" not in address:
        folder = _address_folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / job).write_text(address + "\n")


def saved_address(job: str) -> str:
    """The address `save_address` noted, or the one in RAY_API_SERVER_ADDRESS."""
    note = _address_folder() / Path(job).name
    if note.is_file():
        return note.read_text().strip()
    if os.environ.get("RAY_API_SERVER_ADDRESS"):
        return _address(None)
    raise Refusal(
        job, NO_VALUE, "not submitted from this account", "add the dashboard where it runs: address=http://HOST:8265"
    )


def _address_folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "athanor" / "jobs"
