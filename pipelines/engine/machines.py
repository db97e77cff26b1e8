"""What a backend knows of the machines it runs on: how much fits, what is missing, and which network reaches the others."""

from __future__ import annotations

import fcntl
import math
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.engine.errors import EngineError
from pipelines.engine.outcome import LostMachineError

LOOK_SECONDS = 2.0
"""Between two questions about what machines there are."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What there is to run on, altogether; `machines` says (CPUs, GPUs) of each where they are several."""

    cpus: float
    gpus: float
    machines: tuple[tuple[float, float], ...] = ()

    def fits(self, *, cpus: float, gpus: float) -> int:
        """How many processes of this size fit at once, each on one machine."""
        return sum(
            int(min(there / each if each else math.inf for there, each in ((c, cpus), (g, gpus), (1024.0, 1.0))))
            for c, g in self.machines or ((self.cpus, self.gpus),)
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """So many processes at once, each of this size."""

    cpus: float
    gpus: float
    copies: int = 1

    def missing(self, there: Resources) -> str:
        """What is asked for and what there is; empty where it fits."""
        if there.fits(cpus=self.cpus, gpus=self.gpus) >= self.copies:
            return ""
        for name, each, total in (("GPU", self.gpus, there.gpus), ("CPU", self.cpus, there.cpus)):
            if each * self.copies > total:
                return f"{self._times(each)} {name}s asked for where there are {total:g}"
        sizes = " and ".join(f"{c:g} CPUs {g:g} GPUs" for c, g in there.machines)
        return f"{self._times(self.cpus)} CPUs and {self._times(self.gpus)} GPUs asked for on machines of {sizes}"

    def _times(self, each: float) -> str:
        return f"{self.copies} × {each:g}" if self.copies > 1 else f"{each:g}"


def check_feasible(there: Resources, *, cpus: float, gpus: float, copies: int = 1) -> int:
    """How many such processes fit at once, at most 1024. Raises EngineError if ``copies`` of them never will."""
    missing = Claim(cpus=cpus, gpus=gpus, copies=copies).missing(there)
    if missing:
        what = "GPUs" if "GPU" in missing else "CPUs"
        raise EngineError(
            f"{missing}: it would wait for ever. Ask for fewer workers, or for fewer {what} each, or run on a larger "
            "cluster."
        )
    return min(there.fits(cpus=cpus, gpus=gpus), 1024)


class Patience:
    """Waits for machines that were there and are not: says so once, and gives up after ``wait_seconds``."""

    def __init__(
        self, claim: Claim, resources: Callable[[], Resources], *, wait_seconds: float, say: Callable[[str], None]
    ) -> None:
        self._claim, self._resources, self._wait_seconds, self._say = claim, resources, wait_seconds, say
        self._short_since: float | None = None
        self._looked = -math.inf

    def enough(self) -> bool:
        """Whether what is claimed fits now; asks the cluster every LOOK_SECONDS. LostMachineError when time is up."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return self._short_since is None
        self._looked = now
        missing = self._claim.missing(self._resources())
        if not missing:
            if self._short_since is not None:
                self._say(f"the machines are back after {now - self._short_since:.0f} s.")
            self._short_since = None
            return True
        if self._short_since is None:
            self._short_since = now
            if self._wait_seconds:
                self._say(
                    f"{missing}: a machine was lost. Waiting at most {self._wait_seconds:g} s for it, or for another "
                    "(compute.wait_seconds)."
                )
        if now - self._short_since >= self._wait_seconds:
            raise LostMachineError(
                f"{missing}: a machine was lost, and no other came within {self._wait_seconds:g} s "
                "(compute.wait_seconds). What is finished is kept; run the same command again when there are machines, "
                "or with a smaller compute.ranks."
            )
        return False


_OF_CONNECTIONS = ("torch/distributed/", "gloo", "nccl", "connection", "broken pipe")


def lost_connection(error: BaseException) -> bool:
    """Whether a rank's error may be what the death of another looks like to it, and no mistake of its own."""
    if hasattr(error, "exit_code"):
        return False
    text = "\n".join([str(error), *getattr(error, "__notes__", ())]).lower()
    return any(word in text for word in _OF_CONNECTIONS)


LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "MV2_", "MPI_LOCAL", "TORCHELASTIC_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_")
"""Beginnings of variables by which mpirun and torchrun tell a process its place."""


def forget_launchers() -> None:
    """Drop what another launcher, in whose shell the run was started, says of this process's place: a rank's place is the
    one its backend gives it, and DeepSpeed and PyTorch would believe, or dispute over, the other."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]


def interface_with(address: str) -> str | None:
    """The network interface of this machine that has this IPv4 or IPv6 address; None where none has."""
    if ":" in address:
        return _ipv6_interfaces().get(socket.inet_pton(socket.AF_INET6, address).hex())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


_SIOCGIFADDR = 0x8915


def _ipv6_interfaces() -> dict[str, str]:
    try:
        with open("/proc/net/if_inet6") as table:
            return {line.split()[0]: line.split()[-1] for line in table}
    except OSError:
        return {}
