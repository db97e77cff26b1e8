"""What `athanor submit`, `logs` and `stop` call: one switchboard over the kinds of cluster.

settings = RaySettings(address="http://head:8265", store="s3://bucket/runs")
submit(settings, ["run", "experiment=gpt2-124m"])      # the job's exit code
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster import kuberay, ray_jobs, slurm
from cluster.kuberay import KubeRaySettings
from cluster.ray_jobs import JobStatus, RaySettings, logs, status, stop
from cluster.slurm import SlurmSettings

__all__ = ["KINDS", "ClusterSettings", "JobStatus", "logs", "status", "stop", "submit"]

ClusterSettings = RaySettings | SlurmSettings | KubeRaySettings

KINDS: dict[str, type[ClusterSettings]] = {"ray": RaySettings, "slurm": SlurmSettings, "kuberay": KubeRaySettings}
"""Settings class of each `cluster=KIND`; its values are in conf/cluster/KIND.yaml."""


def submit(settings: ClusterSettings, command: Sequence[str], *, dry_run: bool = False, follow: bool = True) -> int:
    """Run `athanor COMMAND` where `settings` say. The job's exit code if it is followed, otherwise 0.

    dry_run prints what would be sent (the job, the script, the manifest) and sends nothing. Only a Ray job can be
    followed. Raises Refusal for anything a person can mend.
    """
    match settings:
        case RaySettings():
            return ray_jobs.submit(settings, command, dry_run=dry_run, follow=follow)
        case SlurmSettings():
            return slurm.submit(settings, command, dry_run=dry_run)
        case KubeRaySettings():
            return kuberay.submit(settings, command, dry_run=dry_run)
