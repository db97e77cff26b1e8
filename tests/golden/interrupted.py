"""The store of a training that an earlier Athanor began and that was stopped half-way: a newer one goes on with it.

python -m tests.golden.interrupted       # makes it anew, where a release has to strand running jobs

The archive holds the texts, the artifacts of corpus, tokenizer and rows, and the attempt of `pretrain` with its checkpoints.
`losses.json` beside it has the losses of the same training left alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent / "interrupted"
ARCHIVE, LOSSES = FOLDER / "store.tar.xz", FOLDER / "losses.json"
STEPS = 400
WORDS = "the furnace fed itself and held its heat for weeks while nobody watched it burn low or bright"


def overrides(folder: Path, store: Path) -> list[str]:
    """The experiment over the texts in `folder`."""
    return [
        *("experiment=text", f"corpus.paths=[{folder / 'texts'}]", f"store={store}", "compute.backend=local"),
        *("corpus.held_out.fraction=0.1", "tokenizer.vocab_size=384", "shards.seq_len=32", "shards.rows_per_block=16"),
        *("model=tiny", "model.d_model=16", "model.n_layers=1", "model.ffn.d_ff=32", "optim=adamw", "optim.lr=3e-3"),
        *(f"pretrain.total_tokens={STEPS * 256}", "pretrain.global_batch_tokens=256", "pretrain.compile=off"),
        *("pretrain.precision=fp32", "pretrain.checkpoint.every_steps=50", "pretrain.checkpoint.keep=1"),
        *("finetune=none", "tracking=off"),
    ]


def unpack(folder: Path) -> None:
    """The texts and the store as they were left, under `folder`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


def losses(pretrain: Path) -> list[float]:
    """The loss of every step."""
    return [json.loads(row)["loss"] for row in (pretrain / "metrics.jsonl").read_text().split("\n") if row]


def _texts(folder: Path) -> None:
    """Documents over few words, the same in every Python."""
    draw = random.Random(0).random
    words = WORDS.split(" ")
    folder.mkdir(parents=True)
    for number in range(60):
        lines = (" ".join(words[int(draw() * len(words))] for _ in range(12)) for _ in range(12))
        (folder / f"{number:02}.txt").write_text("\n".join(f"{line}." for line in lines) + "\n")


def _command(folder: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines", "run", *overrides(folder, store), "--until", "pretrain"]


def _make() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _texts(folder / "texts")
        whole = folder / "whole"
        subprocess.run(_command(folder, whole), check=True)
        [metrics] = (whole / "pretrain").glob("*/metrics.jsonl")
        process = subprocess.Popen(_command(folder, folder / "store"))
        while not list((folder / "store").rglob(f"step-{STEPS // 2:08}")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.wait()
        assert not list((folder / "store" / "pretrain").glob("*/manifest.json")), "the training got to its end"
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir()
        LOSSES.write_text(json.dumps(losses(metrics.parent)) + "\n")
        shutil.rmtree(whole)
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            for name in ("texts", "store"):
                archive.add(folder / name, arcname=name, filter=_plain)
    print(f"{ARCHIVE}: {os.path.getsize(ARCHIVE):,} bytes")


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    _make()
