"""How many files a call passes through, in a real run with a real training step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import execution
from pipelines.__main__ import main
from pipelines.engine.backends.local_backend import LocalBackend
from tests.walk import Walk, walks

COMMAND_TO_LOOP = Walk("pipelines/__main__.py", "pipelines/training/loop.py")
LOOP_TO_KERNEL = Walk("pipelines/training/loop.py", "model/kernels/", through="model/mixers/attention.py")


@pytest.mark.slow
def test_a_command_reaches_the_loop_through_ten_files_and_a_step_the_attention_kernel_through_eight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "LocalBackend", lambda: LocalBackend(in_process=True))
    texts = [{"text": f"Document {number}: {number * number} is the square of {number}. " * 40} for number in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    overrides = [
        *("experiment=text", f"corpus.paths=[{tmp_path}/text.jsonl]", "corpus.held_out.fraction=0.2", "model=tiny"),
        *("tokenizer.vocab_size=384", "shards.seq_len=32", "pretrain.global_batch_tokens=64", "pretrain.compile=off"),
        *(
            "pretrain.total_tokens=128",
            f"store={tmp_path}/runs",
            "compute.backend=local",
            "corpus.dedup.near_duplicates=false",
        ),
    ]

    def run() -> None:
        with pytest.raises(SystemExit) as left:
            main(["run", *overrides, "--until", "pretrain"])
        assert left.value.code == 0

    command, step = walks(run, [COMMAND_TO_LOOP, LOOP_TO_KERNEL])
    assert command[0] == "pipelines/__main__.py" and len(command) <= 10, command
    assert step[0] == "pipelines/training/loop.py" and len(step) <= 8, step
