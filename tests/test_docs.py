"""The documentation's picture is drawn from what is there."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_the_picture_of_the_families_is_what_the_presets_say() -> None:
    drawn = subprocess.run([sys.executable, "docs/draw.py", "--check"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert drawn.returncode == 0, "run: python docs/draw.py"
