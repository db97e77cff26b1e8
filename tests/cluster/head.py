"""A real Ray head of one's own for a test: its own ports, its own folder, gone afterwards with every process it
started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 90.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """`dashboard` takes jobs; `address` takes drivers (RAY_ADDRESS); `folder` is Ray's temporary folder."""

    dashboard: str
    address: str
    folder: Path


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def ray_head(*, cpus: int = 2) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: Ray puts sockets below it
    gcs, dashboard, agent, client = free_ports(4)
    binaries = Path(sys.executable).parent
    command = [str(binaries / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PATH": f"{binaries}:{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        _await_dashboard(url, process, folder / "head.log")
        yield Head(dashboard=url, address=f"127.0.0.1:{gcs}", folder=folder)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _await_dashboard(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2).read()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray head did not start:\n{log.read_text()}") from None
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what this head started, by process id: `ray stop` would end every Ray on the machine."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)
    process.wait(timeout=10)
