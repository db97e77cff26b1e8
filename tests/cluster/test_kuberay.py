"""The RayJob manifest."""

from __future__ import annotations

import gzip
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kuberay import KubeRaySettings, render, submit
from conf.refusal import Refusal

ROOT = Path(__file__).parents[2]
COMMAND = ["run", "experiment=gpt2-124m", "corpus.paths=[s3://b/a,s3://b/c]"]


def settings(**changes: Any) -> KubeRaySettings:
    return KubeRaySettings(**{"image": "registry.example.org/athanor:1", "store": "s3://bucket/runs", **changes})


def manifest(**changes: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(render(settings(**changes), COMMAND))
    return loaded


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_job_survives_what_kuberay_does_to_long_jobs() -> None:
    job = manifest()
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 3
    assert spec["activeDeadlineSeconds"] > 0
    assert all(pod["terminationGracePeriodSeconds"] > 30 for pod in pods(job))
    assert spec["entrypoint"].endswith("'corpus.paths=[s3://b/a,s3://b/c]' store=s3://bucket/runs")


def test_the_job_can_be_asked_about_under_its_own_name() -> None:
    job = manifest()
    assert job["spec"]["jobId"] == job["metadata"]["name"]
    assert len(job["metadata"]["name"]) <= 47  # KubeRay adds a suffix, and a DNS label ends at 63


def test_workers_get_what_was_asked_and_the_head_runs_no_tasks() -> None:
    cluster = manifest(workers=4, gpus_per_worker=8, cpus_per_worker=96)["spec"]["rayClusterSpec"]
    group = cluster["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    assert limits == {"cpu": "96", "memory": "64Gi", "nvidia.com/gpu": "8"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_secret_is_a_reference_in_every_pod() -> None:
    job = manifest(secrets={"WANDB_API_KEY": "tracking/wandb"})
    for pod in pods(job):
        entry = pod["containers"][0]["env"][0]
        assert entry == {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "tracking", "key": "wandb"}}}


def test_a_store_on_a_volume_is_mounted_in_every_pod() -> None:
    job = manifest(store="/store/runs", claim="shared")
    for pod in pods(job):
        assert {"name": "store", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
        assert {"name": "store", "mountPath": "/store"} in pod["containers"][0]["volumeMounts"]


def test_code_at_a_url_becomes_the_working_folder() -> None:
    runtime = yaml.safe_load(manifest(code="s3://bucket/tree.zip")["spec"]["runtimeEnvYAML"])
    assert runtime == {"working_dir": "s3://bucket/tree.zip"}
    assert "runtimeEnvYAML" not in manifest()["spec"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "image: not given"),
        ({"store": None}, "store: not given"),
        ({"store": "/tmp/runs"}, "goes when the pod goes"),
        ({"store": "runs"}, "relative path"),
        ({"secrets": {"WANDB_API_KEY": "0123456789abcdef"}}, "never hold the value"),
        ({"grace_seconds": 30}, "grace_seconds = 30"),
        ({"memory_per_worker": "lots"}, "Kubernetes quantity"),
        ({"code": "./tree.zip"}, "must be a URL"),
        ({"workers": 0}, "workers = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_rule(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        manifest(**changes)


def test_a_value_in_place_of_a_secret_is_not_repeated() -> None:
    with pytest.raises(Refusal) as caught:
        settings(secrets={"WANDB_API_KEY": "0123456789abcdef"})
    assert "0123456789abcdef" not in str(caught.value)


def test_a_dry_run_prints_the_manifest_and_a_real_one_says_how_to_apply_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(settings(), COMMAND, dry_run=True) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "RayJob"
    with pytest.raises(Refusal, match="kubectl create"):
        submit(settings(), COMMAND, dry_run=False)


def header(**changes: Any) -> dict[str, str]:
    """The commands of the header by their words: what a person copies into a shell."""
    commands: dict[str, str] = {}
    word = ""
    for line in render(settings(**changes), COMMAND).splitlines():
        if not line.startswith("# ") or line.startswith("#         ("):
            continue
        word = line[2:10].strip() or word
        commands[word] = commands.get(word, "") + line[10:] + "\n"
    return commands


@pytest.mark.parametrize("auth", ["token", "disabled"])
def test_the_headers_commands_work_as_they_stand(auth: str, tmp_path: Path) -> None:
    """Typed into bash, with a kubectl that answers as Kubernetes would and a program that tells what it is given."""
    (tmp_path / "kubectl").write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '  *"get rayjob"*rayClusterName*) printf athanor-x7k2p ;;\n'
        '  *"get secret athanor-x7k2p"*auth_token*) printf c2VjcmV0 ;;\n'
        f'  *) echo "$*" >> {tmp_path}/asked ;;\n'
        "esac\n"
    )
    (tmp_path / "athanor").write_text('#!/bin/sh\necho "$* $RAY_AUTH_MODE $RAY_AUTH_TOKEN"\n')
    for program in ("kubectl", "athanor"):
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    commands, name = header(auth=auth), manifest()["metadata"]["name"]

    def typed(word: str) -> str:
        answer = subprocess.run(
            ["bash", "-ec", commands[word] + "wait"], env=environment, capture_output=True, text=True
        )
        assert (answer.returncode, answer.stderr) == (0, "")
        return answer.stdout

    assert typed("log") == f"logs {name} address=http://localhost:8265 {'token secret' if auth == 'token' else ' '}\n"
    assert "-n default port-forward service/athanor-x7k2p-head-svc 8265" in (tmp_path / "asked").read_text()
    (tmp_path / "asked").unlink()
    typed("again")  # the RayJob of an ended run has to go first: create refuses a name that is taken
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"-n default delete rayjob {name} --ignore-not-found",
        "-n default create -f job.yaml",
    ]


CRD = ROOT.parent / "shared/data/kuberay-crd/ray.io_rayjobs.yaml.gz"


@pytest.mark.skipif(not CRD.exists(), reason="needs KubeRay's custom resource definitions")
@pytest.mark.parametrize(
    "changes", [{}, {"gpus_per_worker": 8, "claim": "shared", "store": "/store/r", "code": "s3://b/t.zip"}]
)
def test_the_manifest_is_what_kuberays_own_schema_says(changes: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    definition = yaml.load(gzip.decompress(CRD.read_bytes()), yaml.CSafeLoader)
    schema = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    job = manifest(secrets={"WANDB_API_KEY": "tracking/wandb"}, node_selector={"zone": "1"}, **changes)
    spec = _closed(schema["properties"]["spec"])
    assert list(jsonschema.Draft202012Validator(spec).iter_errors(job["spec"])) == []
    misspelled = {**job["spec"], "entryPoint": job["spec"]["entrypoint"]}
    assert list(jsonschema.Draft202012Validator(spec).iter_errors(misspelled)) != []


def _closed(schema: Any) -> Any:
    """Without fields that Kubernetes would drop unread."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _closed(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        return {}
    if "properties" in schema and schema.get("type") == "object" and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema
