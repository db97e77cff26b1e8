"""A RayJob manifest for KubeRay: a Ray cluster made for one run and removed after it.

`HTTPMode`, because the modes that follow the log from a pod of their own end healthy jobs when that pod is evicted. A
failed attempt is repeated on a fresh cluster and goes on from the store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import yaml

from cluster.command import Machines, check_command, check_store, given_store, job_name, shell_line
from conf.refusal import NO_VALUE, Refusal

_RAY_DRAIN_SECONDS = 30
"""How long a Ray node that was told to end may take to hand over; a pod killed within it leaves work half done."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_QUANTITY = re.compile(r"\d+(\.\d+)?([KMGTP]i?)?")


@dataclass(frozen=True, kw_only=True)
class KubeRaySettings:
    """A Ray cluster on Kubernetes that lives for one run."""

    kind: Literal["kuberay"] = "kuberay"
    """Kubernetes with the KubeRay operator."""
    image: str | None = None
    """Container image with Athanor's dependencies, and Athanor itself unless `code` is given."""
    namespace: str = "default"
    """Kubernetes namespace of the job."""
    code: str | None = None
    """URL of a zip of the checkout (s3://…, https://…); null: the image has it."""
    store: str | None = None
    """Where artifacts go if the command names no store: a URL, or a path below `claim_path`."""
    claim: str | None = None
    """Volume claim that every pod mounts, writable by many pods; null: none."""
    claim_path: str = "/store"
    """Path at which the volume claim is mounted."""
    ray_version: str | None = None
    """Ray's version in the image; null: the version installed here."""
    auth: Literal["token", "disabled"] = "token"
    """Whether the Ray cluster asks for a token; token needs KubeRay 1.5.1 or newer."""
    workers: int = 1
    """Number of worker pods."""
    cpus_per_worker: int = 8
    """CPUs of each worker pod."""
    memory_per_worker: str = "64Gi"
    """Memory of each worker pod, a Kubernetes quantity."""
    gpus_per_worker: int = 0
    """GPUs of each worker pod."""
    shared_memory: str = "16Gi"
    """Size of /dev/shm in each pod, a Kubernetes quantity."""
    head_cpus: int = 4
    """CPUs of the head pod, which runs the driver and none of the work."""
    head_memory: str = "16Gi"
    """Memory of the head pod, a Kubernetes quantity."""
    python: str = "python"
    """Python interpreter in the image."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Environment variables from Kubernetes secrets: VARIABLE: SECRET/KEY. The manifest holds no values."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that the pods' nodes must have: LABEL: VALUE."""
    service_account: str | None = None
    """Kubernetes service account of the pods; null: the namespace's default."""
    retries: int = 3
    """Number of fresh clusters after a failed attempt; each continues from the store."""
    deadline_seconds: int = 7 * 24 * 3600
    """Longest time for the whole job in seconds, retries included."""
    kept_seconds: int = 600
    """Seconds that the cluster stays after the end, for its logs."""
    grace_seconds: int = 120
    """Seconds from SIGTERM to SIGKILL of a pod."""

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker", "head_cpus", "deadline_seconds"):
            if getattr(self, name) < 1:
                raise Refusal(name, getattr(self, name), "must be at least 1")
        for name in ("gpus_per_worker", "retries", "kept_seconds"):
            if getattr(self, name) < 0:
                raise Refusal(name, getattr(self, name), "must not be negative")
        if self.grace_seconds <= _RAY_DRAIN_SECONDS:
            raise Refusal(
                "grace_seconds",
                self.grace_seconds,
                f"Ray takes up to {_RAY_DRAIN_SECONDS} s to leave a node",
                "give more than that",
            )
        for name in ("memory_per_worker", "shared_memory", "head_memory"):
            if not _QUANTITY.fullmatch(getattr(self, name)):
                raise Refusal(name, getattr(self, name), "a Kubernetes quantity, such as 64Gi")
        for variable, source in self.secrets.items():
            if not (variable.isidentifier() and re.fullmatch(r"[-.a-z0-9]+/[-._a-zA-Z0-9]+", source)):
                raise Refusal(
                    f"secrets.{variable}",
                    NO_VALUE,
                    "must name a Kubernetes secret as SECRET/KEY, never hold the value itself",
                    "make one: kubectl create secret generic tracking --from-literal=wandb=…, then "
                    "secrets.WANDB_API_KEY=tracking/wandb",
                )
        if not _NAME.fullmatch(self.namespace):
            raise Refusal("namespace", self.namespace, "lower-case letters, digits and dashes")
        if self.store is not None:
            check_store(self.store)

    @property
    def machines(self) -> Machines:
        """The machines the run gets."""
        return Machines(
            count=self.workers,
            cpus=self.cpus_per_worker,
            gpus=self.gpus_per_worker,
            settings=f"workers={self.workers} gpus_per_worker={self.gpus_per_worker} cpus_per_worker={self.cpus_per_worker}",
        )


def submit(settings: KubeRaySettings, command: Sequence[str], *, dry_run: bool) -> int:
    """Print the manifest. Raises Refusal without dry_run: a manifest is applied by hand."""
    manifest = render(settings, command)
    if not dry_run:
        raise Refusal(
            "cluster",
            "kuberay",
            "this kind writes manifests and does not apply them",
            "add --dry-run, keep the output as job.yaml, then `kubectl create -f job.yaml`",
        )
    print(manifest, end="")
    return 0


def render(settings: KubeRaySettings, command: Sequence[str]) -> str:
    """The RayJob as YAML, with a header that says how to apply, follow and remove it."""
    check_command(command)
    if settings.image is None:
        raise Refusal(
            "image",
            NO_VALUE,
            "not given",
            "name the container image that holds Athanor's dependencies: image=REGISTRY/NAME:TAG",
        )
    command = _with_store(settings, command)
    name = job_name(command)
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": settings.namespace, "labels": {"app.kubernetes.io/name": "athanor"}},
        "spec": {
            "submissionMode": "HTTPMode",
            "jobId": name,
            "entrypoint": shell_line(settings.python, command),
            **_runtime_env(settings),
            "backoffLimit": settings.retries,
            "activeDeadlineSeconds": settings.deadline_seconds,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": settings.kept_seconds,
            "rayClusterSpec": _cluster(settings),
        },
    }
    return _header(name, settings) + yaml.safe_dump(manifest, sort_keys=False, width=120)


def _with_store(settings: KubeRaySettings, command: Sequence[str]) -> list[str]:
    store = given_store(command) or settings.store
    if store is None:
        raise Refusal(
            "store",
            NO_VALUE,
            "not given, and pods share no disk",
            "give store=s3://bucket/prefix, or a volume claim and a path on it (claim=NAME store=/store/runs)",
        )
    if "://" not in store and (settings.claim is None or not store.startswith(settings.claim_path)):
        raise Refusal(
            "store",
            store,
            "a path inside a pod goes when the pod goes",
            f"give a URL, or a path below {settings.claim_path} together with claim=NAME of a volume that many pods can "
            "write",
        )
    return [*command] if given_store(command) else [*command, f"store={store}"]


def _runtime_env(settings: KubeRaySettings) -> dict[str, str]:
    if settings.code is None:
        return {}
    if "://" not in settings.code:
        raise Refusal("code", settings.code, "must be a URL that the pods can fetch, such as s3://bucket/athanor.zip")
    return {"runtimeEnvYAML": yaml.safe_dump({"working_dir": settings.code})}


def _cluster(settings: KubeRaySettings) -> dict[str, Any]:
    head = {"cpu": str(settings.head_cpus), "memory": settings.head_memory}
    worker = {"cpu": str(settings.cpus_per_worker), "memory": settings.memory_per_worker}
    if settings.gpus_per_worker:
        worker["nvidia.com/gpu"] = str(settings.gpus_per_worker)
    return {
        "rayVersion": settings.ray_version or version("ray"),
        "authOptions": {"mode": settings.auth},
        "headGroupSpec": {
            # No work on the head: the driver and Ray's bookkeeping live there, and their death ends the attempt.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": {"spec": _pod(settings, "ray-head", head, _HEAD_PORTS)},
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": settings.workers,
                "minReplicas": settings.workers,
                "maxReplicas": settings.workers,
                "rayStartParams": {},
                "template": {"spec": _pod(settings, "ray-worker", worker, {})},
            }
        ],
    }


def _pod(settings: KubeRaySettings, name: str, resources: dict[str, str], ports: dict[str, int]) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}}
    ]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if settings.claim is not None:
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": settings.claim}})
        mounts.append({"name": "store", "mountPath": settings.claim_path})
    container: dict[str, Any] = {
        "name": name,
        "image": settings.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": mounts,
    }
    if settings.secrets:
        container["env"] = [
            {
                "name": variable,
                "valueFrom": {"secretKeyRef": dict(zip(("name", "key"), source.split("/"), strict=True))},
            }
            for variable, source in settings.secrets.items()
        ]
    if ports:
        container["ports"] = [{"name": label, "containerPort": port} for label, port in ports.items()]
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "containers": [container],
        "volumes": volumes,
    }
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    if settings.service_account is not None:
        pod["serviceAccountName"] = settings.service_account
    return pod


_HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}


def _header(name: str, settings: KubeRaySettings) -> str:
    kubectl = f"kubectl -n {settings.namespace}"
    cluster = f"cluster=$({kubectl} get rayjob {name} -o jsonpath='{{.status.rayClusterName}}')"
    token = (
        "#         export RAY_AUTH_MODE=token\n"
        f"#         export RAY_AUTH_TOKEN=$({kubectl} get secret $cluster -o jsonpath='{{.data.auth_token}}' | base64 -d)\n"
        if settings.auth == "token"
        else ""
    )
    return f"""\
# apply   {kubectl} create -f job.yaml
# state   {kubectl} get rayjob {name}
# log     {cluster}
#         {kubectl} port-forward service/$cluster-head-svc 8265 &
{token}#         athanor logs {name} address=http://localhost:8265
# again   {kubectl} delete rayjob {name} --ignore-not-found && {kubectl} create -f job.yaml
#         (a RayJob stays when its run has ended, and create refuses its name; the run goes on from its store)
# remove  {kubectl} delete rayjob {name}
"""
