"""A batch script for Slurm that starts Ray on its nodes by hand, runs the command once all joined, and ends with its
code.

`ray symmetric-run` would be shorter; it can fail and still exit 0. Here each part is a step one can see: the head, the
workers, the wait, the driver, the cleanup. A job that is preempted or reaches its time limit goes back into the queue
and the same command goes on from the store.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.command import Machines, check_command, check_store, given_store, job_name, shell_line
from cluster.tree import working_tree
from conf.refusal import NO_VALUE, Refusal

LOST_MACHINE_EXIT_CODE = 75
"""Of a run that lost a machine, or Ray itself, and can go on (LOST_MACHINE of `pipelines/engine/backends/outcome.py`)."""


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """A Slurm allocation and what runs in it."""

    kind: Literal["slurm"] = "slurm"
    """A Slurm cluster."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 0
    """Number of GPUs of each node that the job takes."""
    cpus_per_node: int = 8
    """Number of CPUs of each node that the job takes."""
    memory: str = "0"
    """Memory of each node that the job takes, in Slurm's notation (64G); 0: all of it."""
    time_limit: str = "1-00:00:00"
    """Longest time the job may run, in Slurm's notation: minutes, HH:MM:SS or D-HH:MM:SS."""
    partition: str | None = None
    """Slurm partition; null: the cluster's default."""
    account: str | None = None
    """Slurm account that the job is charged to; null: the user's default."""
    qos: str | None = None
    """Slurm quality of service; null: the user's default."""
    constraint: str | None = None
    """Features that the nodes must have, in Slurm's notation (a100&nvlink); null: any node."""
    store: str | None = None
    """Where artifacts go if the command names no store: an absolute path on the shared file system, or a URL."""
    logs: str | None = None
    """Folder of the job's log, `.` for that of sbatch's call; null: `logs` in the store, or `.` where that is a URL."""
    tree: str | None = None
    """Checkout on the shared file system, which is run in place; null: this one."""
    python: str | None = None
    """Python interpreter on the shared file system; null: this one."""
    setup: tuple[str, ...] = ()
    """Shell lines that the first node runs before anything else, such as `module load cuda`."""
    network: str | None = None
    """Beginning of the addresses in the network that Ray uses, such as 10.1.; null: each node's first address."""
    ready_seconds: int = 300
    """Longest wait for Ray to start on every node, in seconds."""
    grace_seconds: int = 120
    """Warning before the time limit in seconds, in which the run saves and ends."""
    max_requeues: int = 20
    """Times the job goes back into the queue after a lost machine, a preemption or the time limit."""

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_node", "ready_seconds"):
            if getattr(self, name) < 1:
                raise Refusal(name, getattr(self, name), "must be at least 1")
        for name in ("gpus_per_node", "max_requeues"):
            if getattr(self, name) < 0:
                raise Refusal(name, getattr(self, name), "must not be negative")
        if self.grace_seconds < 30:
            raise Refusal("grace_seconds", self.grace_seconds, "Slurm rounds to half a minute", "give at least 30")
        if not re.fullmatch(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", self.time_limit):
            raise Refusal(
                "time_limit", self.time_limit, "not a time of Slurm's", "write minutes, HH:MM:SS or D-HH:MM:SS"
            )
        if self.network is not None and not re.fullmatch(r"[0-9a-fA-F.:]+", self.network):
            raise Refusal("network", self.network, "the first characters of an address, such as 10.1")
        for name in ("partition", "account", "qos", "constraint", "memory"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,&|*\[\]()-]+", value):
                raise Refusal(name, value, "not a Slurm name; it would break the line of the script it stands in")
        if self.store is not None:
            check_store(self.store)

    @property
    def machines(self) -> Machines:
        """The machines the run gets."""
        return Machines(
            count=self.nodes,
            cpus=self.cpus_per_node,
            gpus=self.gpus_per_node,
            settings=f"nodes={self.nodes} gpus_per_node={self.gpus_per_node} cpus_per_node={self.cpus_per_node}",
        )


def submit(settings: SlurmSettings, command: Sequence[str], *, dry_run: bool) -> int:
    """Print the script, or hand it to sbatch. Raises Refusal where there is no sbatch or it refuses."""
    check_command(command)
    command = _with_store(settings, command)
    if not dry_run and shutil.which("sbatch") is None:
        raise Refusal(
            "sbatch",
            NO_VALUE,
            "was not found: this machine does not belong to a Slurm cluster",
            "run the same line on one that does; or write the script with --dry-run, carry it there, and `sbatch` it",
        )
    settings = _with_log_folder(settings, command)
    script = render(settings, command)
    if dry_run:
        print(script, end="")
        return 0
    answer = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise Refusal("sbatch", NO_VALUE, f"refused the script: {answer.stderr.strip()}", "see it whole with --dry-run")
    job = answer.stdout.strip().split(";")[0]
    log = Path.cwd() / _log_folder(settings, command) / f"{job_name(command)}-{job}.log"
    print(f"submitted Slurm job {job}\n  tail -F {log}\n  squeue -j {job}\n  scancel {job}", file=sys.stderr)
    return 0


def _with_log_folder(settings: SlurmSettings, command: Sequence[str]) -> SlurmSettings:
    """Make the log's folder, which Slurm does not: a job whose log cannot be opened ends at once, and without one.

    Where it cannot be made here, the log goes to the folder that sbatch is called from, which is there.
    """
    folder = _log_folder(settings, command)
    mount = folder.parent.parent if settings.logs is None else folder.parent
    reason = f"{mount} is not on this machine"
    if mount.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return settings
        except OSError as error:
            reason = error.strerror or str(error)
    print(
        f"log: {folder} cannot be made from here ({reason}), so the log goes to the folder sbatch is called from.",
        file=sys.stderr,
    )
    return replace(settings, logs=".")


def render(settings: SlurmSettings, command: Sequence[str]) -> str:
    """The whole batch script for `athanor COMMAND`."""
    check_command(command)
    command = _with_store(settings, command)
    tree = working_tree(settings.tree)
    python = settings.python or sys.executable
    values = {
        "TREE": shlex.quote(str(tree)),
        "PYTHON": shlex.quote(python),
        "RAY": shlex.quote(str(Path(python).parent / "ray") if "/" in python else "ray"),
        "SETUP": "\n".join(settings.setup) or ":  # nothing to set up",
        "ADDRESS": _own_address(settings.network),
        "CPUS": str(settings.cpus_per_node),
        "GPUS": str(settings.gpus_per_node),
        "READY": str(settings.ready_seconds),
        "REQUEUES": str(settings.max_requeues),
        "LOST": str(LOST_MACHINE_EXIT_CODE),
        "COMMAND": shell_line("$python", command).replace("'$python'", '"$python"'),
    }
    body = re.sub(r"@([A-Z]+)@", lambda match: values[match.group(1)], _SCRIPT)
    return "\n".join(["#!/usr/bin/env bash", *_directives(settings, command), body])


def _with_store(settings: SlurmSettings, command: Sequence[str]) -> list[str]:
    if given_store(command) is not None:
        return [*command]
    if settings.store is None:
        raise Refusal(
            "store",
            NO_VALUE,
            "not given, and the nodes of a Slurm job share only a file system",
            "give store=/shared/path or a URL",
        )
    return [*command, f"store={settings.store}"]


def _directives(settings: SlurmSettings, command: Sequence[str]) -> list[str]:
    log = _log_folder(settings, command) / "%x-%j.log"
    options = {
        "job-name": job_name(command),
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": settings.cpus_per_node,
        "gpus-per-node": settings.gpus_per_node or None,
        "mem": settings.memory,
        "time": settings.time_limit,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint and f'"{settings.constraint}"',
        "output": f'"{log}"',
        "open-mode": "append",
        "signal": f"B:USR1@{settings.grace_seconds}",
    }
    return [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None] + ["#SBATCH --requeue"]


def _log_folder(settings: SlurmSettings, command: Sequence[str]) -> Path:
    store = given_store(command) or settings.store or ""
    beside = Path(store) / "logs" if store.startswith("/") else Path()
    folder = Path(settings.logs) if settings.logs else beside
    if not (folder.is_absolute() or folder == Path()) or '"' in str(folder):
        raise Refusal(
            "logs",
            folder,
            "the log lies in a folder that every node sees",
            "give an absolute path without quotes in it, or . for the folder that sbatch is called from",
        )
    return folder


def _own_address(network: str | None) -> str:
    pick = f"grep -m1 '^{re.escape(network)}'" if network else "head -n1"
    return f"$(hostname -I | tr ' ' '\\n' | {pick})"


_SCRIPT = r"""
set -u -o pipefail

# ---- what runs
cd @TREE@ || exit 1
python=@PYTHON@
ray=@RAY@
@SETUP@

# ---- one Ray per job, closed to other users, with ports and folders of its own
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | sha256sum | cut -d' ' -f1)
export RAY_AUTH_TOKEN
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # nothing to hand over when the run is over
export SRUN_CPUS_PER_TASK=@CPUS@  # srun stopped taking this from the batch job in Slurm 22.05
head_node=$(hostname -s)          # the batch script runs on the first node of the allocation
head_address=@ADDRESS@
port=$((20000 + SLURM_JOB_ID % 10000 * 3))
export RAY_ADDRESS="$head_address:$port"
ray_folder="/tmp/ray-$SLURM_JOB_ID"
resources=(--num-cpus=@CPUS@ --num-gpus=@GPUS@)
if [ -z "$head_address" ]; then
    echo "no address of $head_node fits; see network=" >&2
    exit 1
fi

# ---- the end: whatever happens, Ray goes and the exit code stays; a run that can go on goes back into the queue
steps=()
driver=""
warned=""
interrupted=""
ender=""  # ends a run that Ray's death has left hanging
again=""  # why the job is to go back into the queue
end_run() {  # the first warning counts: a second signal would have the run leave without saving
    interrupted=yes
    [ -n "$warned" ] && return
    warned=$1
    [ -z "$driver" ] && exit @LOST@
    kill -TERM "$driver" 2>/dev/null
}
lose_ray() {  # nothing can be saved without Ray: ranks hang, or are gone
    end_run "a part of Ray ended"
    (sleep 10; kill -KILL "$driver" 2>/dev/null) & ender=$!
}
finish() {
    code=$?
    trap - EXIT
    trap '' USR1 USR2 TERM
    [ -n "$ender" ] && kill "$ender" 2>/dev/null
    [ -n "$warned" ] && [ "$code" -ne 0 ] && again=$warned
    [ "$code" -eq @LOST@ ] && again=${again:-a machine was lost}
    for step in "${steps[@]}"; do kill -USR2 "$step" 2>/dev/null; done
    (sleep 10; kill -KILL "${steps[@]}" 2>/dev/null) & killer=$!
    for step in "${steps[@]}"; do wait "$step"; done
    kill -KILL "$killer" 2>/dev/null
    wait "$killer" 2>/dev/null
    timeout 10 srun --overlap --ntasks-per-node=1 --nodes="$SLURM_JOB_NUM_NODES" rm -rf "$ray_folder" 2>/dev/null
    [ -n "$again" ] && requeue "$again"
    exit "$code"
}
requeue() {  # only what still runs: a cancelled job stays cancelled, one that Slurm preempts for good is queued by Slurm
    scontrol show job "$SLURM_JOB_ID" | grep -q "JobState=RUNNING" || return
    if [ "${SLURM_RESTART_COUNT:-0}" -ge @REQUEUES@ ]; then
        echo "$1, and this was restart ${SLURM_RESTART_COUNT:-0}: not queued again (max_requeues)" >&2
        return
    fi
    echo "$1: back into the queue, the run goes on from its store"
    scontrol requeue "$SLURM_JOB_ID"
}
trap finish EXIT
trap 'end_run "time is up"' USR1
trap 'end_run "preempted"' TERM
trap lose_ray USR2

await_nodes() {  # gives up as soon as a part of Ray ends, not only when the time is over
    "$python" -m cluster.ready --nodes "$1" --timeout @READY@ &
    ready=$!
    wait -n "$ready" "${steps[@]}" && ! kill -0 "$ready" 2>/dev/null && return 0
    kill "$ready" 2>/dev/null
    return 1
}
watch_steps() {  # signals this script when a part of Ray ends
    while sleep 1; do
        for step in "${steps[@]}"; do
            kill -0 "$step" 2>/dev/null || { kill -USR2 $$; return; }
        done
    done
}

# ---- the head, then every other node; cluster.member keeps Ray from ending at a warning, and passes that on
srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" \
    "$python" -m cluster.member --warn $$ \
    "$ray" start --head --block --node-ip-address="$head_address" --port="$port" \
    --ray-client-server-port="$((port + 1))" --dashboard-port="$((port + 2))" --dashboard-agent-listen-port=0 \
    --temp-dir="$ray_folder" --disable-usage-stats "${resources[@]}" &
steps+=($!)
if ! await_nodes 1; then
    echo "the Ray head on $head_node did not start; its messages are above" >&2
    exit 1
fi
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    workers=$((SLURM_JOB_NUM_NODES - 1))
    srun --overlap --nodes="$workers" --ntasks="$workers" --ntasks-per-node=1 --exclude="$SLURMD_NODENAME" \
        --kill-on-bad-exit=1 "$python" -m cluster.member \
        "$ray" start --block --address="$RAY_ADDRESS" --dashboard-agent-listen-port=0 --temp-dir="$ray_folder" \
        --disable-usage-stats "${resources[@]}" &
    steps+=($!)
fi
if ! await_nodes "$SLURM_JOB_NUM_NODES"; then
    echo "not every node joined Ray; nothing was run" >&2
    exit 1
fi

# ---- the run
@COMMAND@ &
driver=$!
watch_steps &
watcher=$!
while :; do  # a signal interrupts `wait`, whose code then is the signal's and not the driver's
    interrupted=""
    wait "$driver"
    code=$?
    [ -z "$interrupted" ] && break
done
kill "$watcher" 2>/dev/null
if [ "$warned" = "a part of Ray ended" ] && [ "$code" -ne 0 ]; then
    echo "a part of Ray ended before the run did; its messages are above" >&2
    code=@LOST@
fi
exit "$code"
"""
