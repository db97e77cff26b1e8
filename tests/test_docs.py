"""The documentation's picture is drawn from what is there, and its walk is what runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import FrameType

import torch

from model.build import build_model
from tests.conftest import ROOT
from tests.model.configurations import LLAMA


def test_the_picture_of_the_families_is_what_the_presets_say() -> None:
    drawn = subprocess.run([sys.executable, "docs/draw.py", "--check"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert drawn.returncode == 0, "run: python docs/draw.py"


def test_the_walk_of_a_token_names_the_files_that_run() -> None:
    text = (ROOT / "docs" / "one-block.md").read_text(encoding="utf-8")
    walk = text.split("## Follow one token, in five files")[1].split("\n## ")[0]
    steps = re.findall(r"^\d\. `(model/\S+\.py)`", walk, re.MULTILINE)
    named = set(re.findall(r"`(model/\S+\.py)`", walk))
    model, ran = build_model(LLAMA).eval(), set()

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT / "model"):
            ran.add(path.relative_to(ROOT).as_posix())

    sys.setprofile(note)
    try:
        model(torch.zeros(1, 8, dtype=torch.int64))
    finally:
        sys.setprofile(None)
    assert len(steps) == 5
    assert ran == named - {"model/kernels/attention.py"}, "the oracle alone is named and does not run"
