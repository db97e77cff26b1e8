"""Machines of one's own on this one: network, host name, /etc/hosts and processes apart, joined by a bridge.

    with network() as net:
        node = net.node("n1")                      # 10.213.7.11, host name n1, which resolves to 127.0.1.1 as on Debian
        process = node.start(["ray", "start", …])
        node.kill()                                # every process of it at once, as when a machine goes

Needs root, `ip`, `unshare` and `nsenter`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

PREFIX = "10.213.7."
BRIDGE = "athanor-br"
KNOWN = {f"n{n}": n for n in range(1, 9)} | {"controller": 9}
"""Names a machine can have, and its number."""


def available() -> bool:
    """Whether this account may make network namespaces here."""
    tools = all(shutil.which(name) for name in ("ip", "unshare", "nsenter"))
    if not tools or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", "athanor-probe"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", "athanor-probe"], capture_output=True)
    return made


@dataclass(kw_only=True)
class Node:
    """One machine. `init` is the process whose end is the end of all of its processes."""

    name: str
    address: str
    folder: Path
    init: subprocess.Popen[bytes]
    pid: int
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    def start(
        self,
        command: Sequence[str],
        *,
        log: str | None = None,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """A process of this machine; its output goes to `log` in the node's folder, if one is named."""
        output: IO[bytes] | None = (self.folder / log).open("ab") if log else None
        streams = {"stdout": output, "stderr": output} if output else {}
        process = subprocess.Popen(
            ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", "--pid", "--wdns=" + os.getcwd(), *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            **{**streams, **options},
        )
        if output:
            output.close()
        self.processes.append(process)
        return process

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run to its end, with its output."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)

    def kill(self) -> None:
        """End the machine: every process in it, without a word."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.init.wait(timeout=20)
        for process in self.processes:
            process.wait(timeout=20)
        _ip("link", "del", f"v-{self.name}", check=False)
        _ip("netns", "del", f"athanor-{self.name}", check=False)


@dataclass(kw_only=True)
class Network:
    """Nodes on one bridge; this machine is PREFIX1 on it."""

    folder: Path
    nodes: dict[str, Node] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of this machine, as the nodes see it."""
        return PREFIX + "1"

    def node(self, name: str, number: int) -> Node:
        """A new machine at PREFIX(10 + number)."""
        space, address = f"athanor-{name}", f"{PREFIX}{10 + number}"
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        _ip("netns", "add", space)
        _ip("link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", f"v-{name}", "master", BRIDGE, "up")
        for words in (
            ["addr", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            _ip("-n", space, *words)
        others = "".join(f"{PREFIX}{10 + n} {other}\n" for other, n in KNOWN.items() if other != name)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
        mounts = [
            f"mount --bind {folder / 'hosts'} /etc/hosts",
            "mount -t tmpfs tmpfs /sys/fs/cgroup",
        ]  # slurmd looks there
        body = "; ".join([f"hostname {name}", *mounts, "echo ready", "exec sleep infinity"])
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        init = subprocess.Popen(["ip", "netns", "exec", space, *unshare, "sh", "-c", body], stdout=subprocess.PIPE)
        assert init.stdout is not None
        assert init.stdout.readline() == b"ready\n"
        (pid,) = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()
        node = Node(name=name, address=address, folder=folder, init=init, pid=int(pid))
        self.nodes[name] = node
        return node


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A bridge and no nodes yet; all of it goes at the end. One at a time on this machine."""
    with Path("/tmp/athanor-machines.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _clear_leftovers()
        yield from _network(folder)


def _clear_leftovers() -> None:
    """Delete bridge and namespaces of a run that was killed before it could: whoever uses them holds the lock.

    Raises AssertionError where a process is left in one.
    """
    for name in KNOWN:
        space = f"athanor-{name}"
        if not Path("/run/netns", space).exists():
            continue
        inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
        assert not inside, f"processes {inside} of an earlier run are left in the namespace {space}: end them"
        _ip("link", "del", f"v-{name}", check=False)
        _ip("netns", "del", space, check=False)
    _ip("link", "del", BRIDGE, check=False)


def _network(folder: Path) -> Iterator[Network]:
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("addr", "add", f"{PREFIX}1/24", "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")
    net = Network(folder=folder)
    try:
        yield net
    finally:
        for node in net.nodes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.kill()
        _ip("link", "del", BRIDGE, check=False)


def wait_for(condition: Any, seconds: float, what: str) -> None:
    """Until `condition()` holds; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)
