"""Which run a training is at Weights & Biases: the same one however often it resumes, another in another store; and the
scores of an evaluation stand in the runs of the trainings that they judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.stages.tracked import track_scores
from pipelines.training.job import run_rank
from pipelines.training.metrics import RUN_ID
from pipelines.training.settings import TrackingSettings
from tests.stages.conftest import InProcess, artifact
from tests.stages.grouping import scored
from tests.training.test_metrics import wandb_records

Make = Callable[..., dict[str, Any]]
OFFLINE = TrackingSettings(mode="offline", about={"experiment": "text", "command": "athanor run experiment=text"})


def run_of(records: list[Any]) -> Any:
    """What a .wandb file says of its run."""
    return next(record.run for record in records if record.HasField("run"))


@pytest.mark.slow
def test_a_run_resumes_under_its_id_and_the_same_training_elsewhere_is_another_run(job: Make, tmp_path: Path) -> None:
    clock = {"every_steps": 3, "every_seconds": None, "keep": 9, "keep_finished": True}
    train = {"tracking": {"mode": "offline", "about": OFFLINE.about}, "checkpoint": clock}

    def trained(out: str) -> list[Any]:
        run_rank({**job(out=out, **train), "label": "pretrain", "url": f"/store/pretrain/{out}d1g3s7"})
        return [run_of(wandb_records(file)) for file in sorted((tmp_path / out).rglob("*.wandb"))]

    [first] = trained("mine")
    shutil.rmtree(tmp_path / "mine/checkpoints/step-00000006")  # as if it had been killed after step 3
    (tmp_path / "mine/logs/finished.json").unlink()
    again, more = trained("mine")
    [other] = trained("hers")
    assert first.run_id == again.run_id == more.run_id != other.run_id
    assert first.display_name == "text pretrain mined1g3"
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert (config["experiment"], config["ranks"]) == ("text", 1) and config["parameters"] > 0


@pytest.mark.slow
def test_scores_go_into_the_runs_they_judge_with_tables(tmp_path: Path) -> None:
    results = {
        "scores": {"base": {"bits_per_byte": {"value": 1.5, "low": 1.4, "high": 1.6}, "perplexity": None}},
        "tasks": {
            "base": {"next_line": {"acc": {"value": 0.5, "low": None, "high": None}, "examples": 4}},
            "finetuned": {},
        },
    }
    samples = {"base": [{"prompt": "def ", "text": "f():", "finish": "length"}], "finetuned": []}
    models = {}
    for name in ("pretrain", "finetune"):
        folder = tmp_path / name
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / RUN_ID).write_text(f"id-of-{name}\n")
        models[name] = artifact(name, folder, {"steps": 7})
    out_dir = tmp_path / "evaluate"
    out_dir.mkdir()
    (out_dir / "results.json").write_text(json.dumps(results))
    (out_dir / "samples.json").write_text(json.dumps(samples))
    figures = {"bits_per_byte": 1.5, "finetuned_bits_per_byte": 1.4, "bits_per_byte_low": None}
    track_scores(OFFLINE, figures, scored(models), out_dir, InProcess(out_dir))  # type: ignore[arg-type]
    found = {}
    for name in models:
        [file] = (out_dir / "logs" / name).rglob("*.wandb")
        records = wandb_records(file)
        assert (run_of(records).run_id, run_of(records).job_type) == (f"id-of-{name}", name)
        found[name] = {
            "/".join(i.nested_key) or i.key: json.loads(i.value_json) for r in records for i in r.summary.update
        }
    assert found["pretrain"]["eval/bits_per_byte"] == found["finetune"]["eval/bits_per_byte"] == 1.5
    assert "eval/finetuned_bits_per_byte" not in found["pretrain"]
    assert found["finetune"]["eval/finetuned_bits_per_byte"] == 1.4
    logged = [json.loads(p.read_text()) for p in (out_dir / "logs" / "pretrain").rglob("*.table.json")]
    rows = sorted((table["columns"][0], table["data"]) for table in logged)
    assert rows == [
        ("prompt", [["def ", "f():", "length"]]),
        ("scorer", [["base", "bits_per_byte", 1.5, 1.4, 1.6]]),
        ("task", [["next_line", "acc", 0.5, None, None, 4]]),
    ]


@pytest.mark.slow
def test_scores_of_a_training_that_was_not_tracked_are_a_run_of_their_own(tmp_path: Path) -> None:
    pretrained = artifact("pretrain", tmp_path / "pretrain", {"steps": 7})
    out_dir = tmp_path / "evaluate"
    out_dir.mkdir()
    track_scores(
        replace(OFFLINE, mode="off"),
        {"bits_per_byte": 1.5},
        scored({"pretrain": pretrained}),
        out_dir,
        InProcess(out_dir),
    )
    assert not list(out_dir.rglob("*"))
    track_scores(OFFLINE, {"bits_per_byte": 1.5}, scored({"pretrain": pretrained}), out_dir, InProcess(out_dir))
    [file] = out_dir.rglob("*.wandb")
    assert run_of(wandb_records(file)).job_type == "evaluate"
