"""The real stages over a store in S3: made once, looked into, used, and found again by another machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import athanor, tiny

pytestmark = pytest.mark.slow

STEPS = ["corpus", "tokenizer", "shards", "pretrain"]


def states(printed: str) -> dict[str, str]:
    """{step: state} of the table that a run ends with."""
    return dict(re.findall(rf"^({'|'.join(STEPS)})\s+(\w+)\s", printed, re.MULTILINE))


def test_a_pretraining_whose_store_is_a_bucket(bucket: str, corpus_dir: Path, tmp_path: Path) -> None:
    words = [word for word in tiny(corpus_dir, Path("replaced")) if not word.startswith(("finetune", "store="))]
    words += ["finetune=none", f"store={bucket}/runs", "compute.cpus_per_rank=1"]
    first = athanor("run", *words, "--until", "pretrain")
    assert states(first.stdout) == dict.fromkeys(STEPS, "made"), first.stdout

    steps = {step["name"]: step for step in json.loads(athanor("status", *words, "--json").stdout)["steps"]}
    assert {name: steps[name]["state"] for name in STEPS} == dict.fromkeys(STEPS, "cached")
    assert all(steps[name]["path"].startswith(f"{bucket}/runs/{name}/") for name in STEPS)
    assert steps["pretrain"]["metrics"]["steps"] == 20

    rows = json.loads(athanor("trace", *words, "--step", "1", "--json").stdout)
    assert len(rows) == 16
    for piece in (piece for row in rows for piece in row["pieces"]):
        begin, end = piece["characters"]
        text = (corpus_dir.parent / piece["file"]).read_text()[piece["position"] :]
        assert text[begin:end] == piece["text"]

    ask = ("generate", *words, "--prompt", "def x = 1", "--max-tokens", "6", "--seed", "3")
    continued = athanor(*ask).stdout
    assert continued.startswith("def x = 1")

    elsewhere = str(tmp_path / "machine2")
    again = athanor("run", *words, "--until", "pretrain", ATHANOR_CACHE=elsewhere)
    assert states(again.stdout) == dict.fromkeys(STEPS, "cached"), again.stdout
    assert athanor(*ask, ATHANOR_CACHE=elsewhere).stdout == continued  # of what it downloads
