"""Which run a training is at Weights & Biases: the same one however often it resumes, another for other settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.order import OrderSettings
from model.config import ModelConfig
from model.peft import LoraConfig
from pipelines.engine.step import Artifact
from pipelines.engine.typed import from_plain
from pipelines.stages import finetune, pretrain
from pipelines.stages.finetune import FinetuneRun
from pipelines.stages.launch import ComputeSettings
from pipelines.stages.pretrain import PretrainSettings
from pipelines.training.loop import Run
from pipelines.training.settings import TrackingSettings, TrainSettings, ZeroSettings
from tests.stages.conftest import InProcess, artifact, save_model
from tests.training.conftest import MODEL, SEQ_LEN, VOCAB_SIZE, make_job


class Gang(InProcess):
    """A context whose one rank is this process."""

    def gang(self, fn: Callable[[dict[str, Any]], Any], config: dict[str, Any], **_: Any) -> Any:
        return fn(config)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """What the training loop is told; it trains nothing."""
    told: list[Run] = []

    def train(*, run: Run, **_: Any) -> dict[str, Any]:
        told.append(run)
        return {}

    monkeypatch.setattr("pipelines.training.job.train", train)
    return told


def train_settings(shards: Path, out_dir: Path) -> TrainSettings:
    return from_plain(TrainSettings, make_job(shards, out_dir)["train"], "train")


def test_a_fine_tuning_is_one_run_however_often_it_resumes_and_another_with_other_settings(
    shards: Path, tmp_path: Path, runs: list[Run]
) -> None:
    save_model(tmp_path / "pretrain" / "model", seed=0, vocab_size=VOCAB_SIZE)
    (tmp_path / "instructions").mkdir()
    (tmp_path / "instructions" / "rows").symlink_to(shards)
    counts = {"rows": 64, "tokens": 64 * SEQ_LEN, "padding": 0}
    inputs: dict[str, Artifact] = {
        "pretrain": artifact("pretrain", tmp_path / "pretrain", {}),
        "instructions": artifact("instructions", tmp_path / "instructions", counts),
    }
    train = train_settings(shards, tmp_path)
    base = FinetuneRun(
        train=train, epochs=1.0, lora=None, freeze=(), order=OrderSettings(), compute=ComputeSettings(device="cpu")
    )
    same = [base, base, replace(base, train=replace(train, zero=ZeroSettings(stage=1), tracking=TrackingSettings()))]
    others = [
        replace(base, train=replace(train, optim=replace(train.optim, lr=0.5))),
        replace(base, train=replace(train, seed=9)),
        replace(base, epochs=0.5),
        replace(base, lora=LoraConfig()),
        replace(base, order=OrderSettings(seed=7)),
    ]
    for number, settings in enumerate([*same, *others]):
        out_dir = tmp_path / str(number)
        out_dir.mkdir()
        finetune.run(settings, inputs, out_dir, Gang(out_dir))
    ids = [run.run_id for run in runs]
    assert len(set(ids[: len(same)])) == 1
    assert len(set(ids)) == 1 + len(others)


def test_a_pretraining_in_another_order_is_another_run(shards: Path, tmp_path: Path, runs: list[Run]) -> None:
    settings = PretrainSettings(model=from_plain(ModelConfig, MODEL, "model"), train=train_settings(shards, tmp_path))
    for seed in (0, 0, 1):
        changed = replace(settings, order=OrderSettings(seed=seed))
        pretrain.run(changed, {"shards": artifact("shards", shards, {})}, tmp_path, Gang(tmp_path))
    ids = [run.run_id for run in runs]
    assert ids[0] == ids[1] != ids[2]
