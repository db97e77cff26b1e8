"""What tests of the whole pipeline share: a small corpus, a configuration that runs in seconds, the command line."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from conf.files import machine_cache
from pipelines.__main__ import main
from pipelines.engine.backends.search_path import PACKAGES

# The same examples every time: a run says what a change did. HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("athanor", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "athanor"))

ROOT = Path(__file__).parents[1]

# Compiled code is kept between sessions: 12 s and more without, 3 s with it.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(machine_cache() / "inductor"))
if "ATHANOR_CACHE" not in os.environ:  # of this machine's user; workers and commands inherit ours
    os.environ["ATHANOR_CACHE"] = tempfile.mkdtemp(prefix="athanor-cache-")
    atexit.register(shutil.rmtree, os.environ["ATHANOR_CACHE"], ignore_errors=True)

TINY = (
    "experiment=text",
    "corpus.reader.max_document_characters=2000",
    "corpus.held_out.fraction=0.1",
    "tokenizer=default",
    "tokenizer.vocab_size=512",
    "shards.seq_len=64",
    "shards.rows_per_block=16",
    "shards.shard_text_bytes=60000",
    "model=tiny",
    "pretrain.total_tokens=20480",
    "pretrain.global_batch_tokens=1024",
    "pretrain.checkpoint.every_steps=5",
    "pretrain.compile=off",
    "finetune=library",
    "finetune.data.max_conversations=60",
    "finetune.too_long=truncate",
    "finetune.train.global_batch_tokens=512",
    "finetune.train.total_tokens=4096",
    "finetune.train.compile=off",
    "evaluate.tasks=[]",
    "evaluate.max_bytes=20000",
    "evaluate.stride_tokens=32",
    "evaluate.bootstrap_resamples=50",
    "evaluate.samples.generation.max_new_tokens=8",
    "tracking=off",
)
"""Overrides under which every step of the pipeline runs, in seconds."""

LOCAL = "compute.backend=local"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests of Ctrl-C, and what they start, are to hear it

METRICS_KEYS = {
    *("step", "loss", "grad_norm", "lr", "tokens", "rows", "batch_digest", "step_seconds", "data_seconds"),
    *("step_tokens", "targets", "tokens_per_second", "mfu", "z_loss", "aux_loss", "skipped", "time"),
}
"""Of a row of metrics.jsonl, for a model without experts: whoever reads these files counts on them."""


LONGEST = (
    "test_pipeline.py",
    "test_ray_backend.py",
    "test_start.py",
    "test_objective.py",
    "test_ray_jobs.py",
    "test_loop.py",
    "test_sweep.py",
    "test_pipeline_s3.py",
    "test_families.py",
    "test_experts.py",
    "test_topologies.py",
)
"""Files of minutes, longest first; begun last, one would keep a single worker busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what names a dependency that moved, then the longest; workers take whole files, whose tests share fixtures."""
    order = ("test_ray_private.py", "test_hydra_private.py", *LONGEST)
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else len(order))


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 kB of this Python's own modules, under stable names."""
    import asyncio
    import email
    import json

    folder = tmp_path_factory.mktemp("corpus") / "text"
    folder.mkdir()
    for package in (json, email, asyncio):
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py"))[:8]:
            (folder / f"{package.__name__}-{path.name}").write_bytes(path.read_bytes())
    return folder


def tiny(corpus_dir: Path, store: Path, *more: str) -> list[str]:
    """The tiny configuration over a corpus, with its artifacts in `store`."""
    return [*TINY, f"corpus.paths=[{corpus_dir}]", f"store={store}", *more]


def athanor(
    *arguments: str, check: bool = True, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, from the repository's root; in another folder, as `athanor` does."""
    result = subprocess.run(
        [sys.executable, *(["-m"] if cwd is None else ["-P", "-m"]), "pipelines", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    if check:
        assert result.returncode == 0, result.stderr[-4000:]
    return result


def crowded(folder: Path) -> Path:
    """A working folder with a file of each of our packages' names, as nanoGPT's and Sphinx's have some."""
    for name in PACKAGES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder')\n")
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> pytest.CaptureResult[str]:
    """What a command prints (out, err); run in this process, which has paid for its imports."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    said = capsys.readouterr()
    assert left.value.code == 0, said.err[-4000:]
    return said


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on stderr when it refuses."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert "Traceback" not in said
    return said[said.index("athanor: ") :]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server process on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket; this process and its children talk to the server, and cache under tmp_path."""
    environment = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "ATHANOR_CACHE": str(tmp_path / "machine1"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    import s3fs

    name = f"bucket-{os.urandom(6).hex()}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    s3fs.S3FileSystem.clear_instance_cache()
    return f"s3://{name}"
