"""A disk that really is full: one clear error wherever it strikes, and everything continues once there is room."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("engine_program.py")

FILL_AND_RUN = """
mkdir -p "$1"
mount -t tmpfs -o size=1m none "$1"
head -c $((1048576 - $4)) /dev/zero > "$1/ballast"
"$2" "$3" "$1/store" --target 0 --backend in-process > "$1.first" 2>&1 && echo "it was not full" >> "$1.first"
rm "$1/ballast"
"$2" "$3" "$1/store" --target 0 --backend in-process > "$1.second" 2>&1
"""


def in_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount things which nobody else sees."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, "bash", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("free_bytes", [0, 8192, 45056])
def test_a_full_disk_is_one_clear_error_and_the_next_run_continues(tmp_path: Path, free_bytes: int) -> None:
    if shutil.which("unshare") is None or in_namespace("mount -t tmpfs none /mnt").returncode != 0:
        pytest.skip("no mount namespaces here")
    answer = in_namespace(FILL_AND_RUN, str(tmp_path / "disk"), sys.executable, str(PROGRAM), str(free_bytes))
    first, second = (tmp_path / "disk.first").read_text(), (tmp_path / "disk.second").read_text()
    assert ": the disk is full" in first and "Refusal: store = " in first, first
    assert "it continues" in first
    assert answer.returncode == 0, second
    assert "made walk" in second
