"""Our packages come before files of their names in the working folder, in every process that we start."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

from conf.refusal import Refusal
from pipelines.engine.backends import ray_train
from pipelines.engine.backends.gang import Gang
from pipelines.engine.backends.outcome import guarded, portable_call
from pipelines.engine.backends.search_path import PACKAGES, ROOT, portable, rooted


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A working folder with a file of each of our names, as nanoGPT's and Sphinx's have some; a folder counts too."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder')\n")
    (tmp_path / "data.py").unlink()
    (tmp_path / "data").mkdir()
    return tmp_path


def test_what_is_sent_to_another_process_finds_ours_whatever_stands_in_its_folder(crowded: Path) -> None:
    sent = cloudpickle.dumps(portable(importlib.util.find_spec))
    program = (
        "import pickle, sys\n"
        "find = pickle.load(sys.stdin.buffer)\n"
        f"print(*(find(name).origin for name in {PACKAGES}), sep='\\n')\n"
    )
    found = subprocess.run([sys.executable, "-c", program], input=sent, cwd=crowded, capture_output=True, check=True)
    assert found.stdout.decode().splitlines() == [str(Path(ROOT) / name / "__init__.py") for name in PACKAGES]


def test_a_process_that_has_imported_ours_goes_on_with_ours(crowded: Path) -> None:
    (crowded / "pipelines.py").unlink()  # Python itself would run it for `-m pipelines`
    program = "import pipelines, model, data, conf, cluster; print(model.__file__, conf.__file__, data.__file__)"
    found = subprocess.run([sys.executable, "-c", program], cwd=crowded, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(Path(ROOT) / name / "__init__.py") for name in ("model", "conf", "data")]


def test_only_what_shadows_is_overtaken(crowded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "other"), str(crowded), "/x"])
    rooted()()
    assert sys.path == [str(tmp_path / "other"), ROOT, str(crowded), "/x"]
    unpacked = [f"/tmp/ray/s/runtime_resources/py_modules_files/_ray_pkg_{n}" for n in (1, 2)]
    monkeypatch.setattr(sys, "path", [str(crowded), *unpacked])
    rooted()()
    assert sys.path == [*unpacked, str(crowded)]


def test_a_ranks_error_reads_as_a_sentence_and_is_a_users_again_in_the_driver(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        ray_train._ray_rank({"call": portable_call(guarded, (refuse,)), "search_path": []})
    assert str(raised.value) == "a rank ended with Refusal: rows = 0: at least one."
    # A process of Ray Train has nothing of ours to read it with.
    wire = pickle.dumps(raised.value)
    assert wire[:60].count(b"builtins") == wire[:60].count(b"RuntimeError") == 1
    gang = Gang(fn=print, config={}, workers=1, logs=tmp_path)
    cause = ray_train._cause(SimpleNamespace(worker_failures={0: pickle.loads(wire)}), gang)  # type: ignore[arg-type]
    assert (type(cause), str(cause)) == (Refusal, "rows = 0: at least one.")


def refuse() -> None:
    raise Refusal("rows", 0, "at least one")
