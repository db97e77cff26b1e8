"""A real Slurm of one's own: a controller on this machine and daemons on nodes of their own (`nodes.py`).

    with slurm(net, nodes=2) as cluster:
        job = cluster.sbatch(script)
        cluster.state(job)                          # PENDING, RUNNING, COMPLETED …

Needs `slurmctld`, `slurmd` and the commands (Debian: slurm-wlm). Accounts are not checked (auth/none): for proofs only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.nodes import Network, Node, wait_for

CONFIGURATION = """\
ClusterName=athanor
SlurmctldHost=controller({controller})
AuthType=auth/none
CredType=cred/none
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,requeue_delay=1
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
KillWait=10
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{machines}
PartitionName=low Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=high Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def available() -> bool:
    """Whether Slurm's programs are here."""
    return all(shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in ("slurmctld", "slurmd", "sbatch"))


@dataclass(kw_only=True)
class Slurm:
    """The cluster; `environment` is what its commands need."""

    folder: Path
    net: Network
    nodes: dict[str, Node]
    configuration: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.configuration)}

    def command(self, *words: str, **options: object) -> str:
        """Output of one of Slurm's commands."""
        answer = subprocess.run(words, env=self.environment, capture_output=True, text=True, **options)  # type: ignore[call-overload]
        assert answer.returncode == 0, f"{words}: {answer.stdout}{answer.stderr}"
        return str(answer.stdout).strip()

    def sbatch(self, script: str, *options: str) -> str:
        """The number of a new job."""
        return self.command("sbatch", "--parsable", *options, input=script)

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.command("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def idle(self) -> int:
        """How many nodes have nothing running or ending on them; 0 while the controller starts."""
        command = ["sinfo", "-N", "-h", "-p", "low", "-o", "%T"]
        answer = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return answer.stdout.split().count("idle")

    def wait(self, job: str, states: set[str], seconds: float) -> str:
        wait_for(lambda: self.state(job) in states, seconds, f"job {job} in {states}")
        return self.state(job)


@contextlib.contextmanager
def slurm(net: Network, *, nodes: int) -> Iterator[Slurm]:
    """Start it with nodes n1, n2 … and wait until they are idle."""
    folder = net.folder / "slurm"
    (folder / "state").mkdir(parents=True)
    machines = {f"n{number}": net.node(f"n{number}", number) for number in range(1, nodes + 1)}
    controller = net.node("controller", 9)
    configuration = folder / "slurm.conf"
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    configuration.write_text(
        CONFIGURATION.format(
            controller=controller.address,
            folder=folder,
            names=",".join(machines),
            machines="\n".join(
                f"NodeName={name} NodeAddr={machine.address} CPUs=2 CoresPerSocket=2 RealMemory=8000 State=UNKNOWN"
                for name, machine in machines.items()
            ),
        )
    )
    cluster = Slurm(folder=folder, net=net, nodes=machines, configuration=configuration)
    # The controller is to be on the host that its configuration names.
    controller.start(
        ["/usr/sbin/slurmctld", "-D", "-f", str(configuration)], log="out", environment=cluster.environment
    )
    for name, machine in machines.items():
        start_daemon(cluster, name, machine)
    wait_for(lambda: cluster.idle() == nodes, 20, "every node idle")
    yield cluster


def start_daemon(cluster: Slurm, name: str, machine: Node) -> None:
    """slurmd on a node."""
    (cluster.folder / f"spool-{name}").mkdir(exist_ok=True)
    command = ["/usr/sbin/slurmd", "-D", "-N", name, "-f", str(cluster.configuration)]
    machine.start(command, log="slurmd.out", environment=cluster.environment)
