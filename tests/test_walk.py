"""How many files a call passes through, in a real run with a real training step."""

from __future__ import annotations

import argparse
import inspect
import json
import random
from pathlib import Path

import pytest

from model.kernels import select
from pipelines import execution
from pipelines.__main__ import main
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.training import job
from tests.walk import Walks


@pytest.mark.slow
def test_a_command_reaches_the_loop_through_ten_files_and_a_step_the_attention_kernel_through_eight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "LocalBackend", lambda **_: LocalBackend(in_process=True))
    for module in (argparse, inspect, json, random):
        (tmp_path / f"{module.__name__}.py").write_text(Path(str(module.__file__)).read_text()[:20_000])
    overrides = [
        *("experiment=text", f"corpus.paths=[{tmp_path}/*.py]", "corpus.held_out.fraction=0.2", "model=tiny"),
        *("tokenizer.vocab_size=512", "shards.seq_len=32", "pretrain.global_batch_tokens=64", "pretrain.compile=off"),
        *("pretrain.total_tokens=128", f"store={tmp_path}/runs", "compute.backend=local"),
    ]
    walks = Walks(monkeypatch)
    walks.note(job, "train", start="pipelines/__main__.py")
    walks.note(select.Selection, "__call__", start="pipelines/training/loop.py", through="pipelines/training/zero.py")
    with pytest.raises(SystemExit) as left:
        main(["run", *overrides, "--until", "pretrain"])
    assert left.value.code == 0
    command, step = walks.found["train"], walks.found["__call__"]
    assert command[-1] == "pipelines/training/loop.py" and len(command) <= 10, command
    assert step[-1].startswith("model/kernels/") and "model/mixers/attention.py" in step and len(step) <= 8, step
