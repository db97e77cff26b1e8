"""Small shards that every training test reads, and jobs over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.rows.packing import TokenDocument, pack_stream
from data.rows.shards import ShardSettings, write_manifest, write_shard

SEQ_LEN, VOCAB_SIZE, ROWS_PER_STEP = 32, 256, 8
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 24,
    "n_layers": 2,
    "max_seq_len": SEQ_LEN,
    "mixer": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1},
    "ffn": {"kind": "dense", "d_ff": 56, "gated": True},
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with a pattern to learn: each token is followed by one of two others."""
    folder = tmp_path_factory.mktemp("training") / "shards"
    rng = np.random.default_rng(0)
    documents = []
    for i in range(60):
        tokens = [int(rng.integers(8, VOCAB_SIZE))]
        for _ in range(int(rng.integers(5, 80))):
            tokens.append(8 + (tokens[-1] * 7 + int(rng.integers(2))) % (VOCAB_SIZE - 8))
        documents.append(TokenDocument(id=str(i), source="made", position=i, tokens=np.array(tokens)))
    rows = pack_stream(documents, seq_len=SEQ_LEN, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)
    record = write_shard(
        rows, documents, folder, name="train-00000", rows_per_block=8, vocab_size=VOCAB_SIZE, counts=Counter()
    )
    write_manifest(folder, [record], settings=ShardSettings(seq_len=SEQ_LEN, rows_per_block=8), vocab_size=VOCAB_SIZE)
    return folder


@pytest.fixture
def job(shards: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """job(steps=6, lr=…, checkpoint={…}, …) is what a rank is given; other keywords are training settings."""

    def make(*, steps: int = 6, lr: float = 3e-3, out: str = "out", **train: Any) -> dict[str, Any]:
        return make_job(shards, tmp_path / out, steps=steps, lr=lr, **train)

    return make


def make_job(shards: Path, out_dir: Path, *, steps: int = 6, lr: float = 3e-3, **train: Any) -> dict[str, Any]:
    tokens = ROWS_PER_STEP * SEQ_LEN
    settings = {
        "total_tokens": steps * tokens,
        "global_batch_tokens": tokens,
        "clip_norm": 0.5,
        "compile": "off",
        "optim": {"kind": "adamw", "lr": lr},
        "checkpoint": {"every_steps": 3, "every_seconds": None, "keep": 9},
        **train,
    }
    return {
        "train": settings,
        "model": MODEL,
        "shards": {"made": str(shards)},
        "out_dir": str(out_dir),
        "digests": {"tokenizer": "t0"},
        "label": "test",
    }
