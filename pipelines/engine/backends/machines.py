"""Machines of a backend: how many processes fit, which resources are missing, which network interface to use."""

from __future__ import annotations

import fcntl
import math
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.backends.outcome import LostMachineError

LOOK_SECONDS = 2.0
"""Between two looks at the cluster's resources."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """CPUs and GPUs in total; `machines`: (CPUs, GPUs) of each, if several."""

    cpus: float
    gpus: float
    machines: tuple[tuple[float, float], ...] = ()

    def fits(self, *, cpus: float, gpus: float) -> int:
        """How many processes of this size fit at once, each on one machine."""
        return sum(
            int(min(free / each if each else math.inf for free, each in ((c, cpus), (g, gpus), (1024.0, 1.0))))
            for c, g in self.machines or ((self.cpus, self.gpus),)
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Resources for `copies` processes at once, each of this size."""

    cpus: float
    gpus: float
    copies: int = 1

    def missing(self, available: Resources) -> str:
        """Message with requested and available resources; empty if the claim fits."""
        if available.fits(cpus=self.cpus, gpus=self.gpus) >= self.copies:
            return ""
        for name, each, total in (("GPU", self.gpus, available.gpus), ("CPU", self.cpus, available.cpus)):
            if each * self.copies > total:
                return f"{self._times(each)} {name}s asked for where there are {total:g}"
        sizes = " and ".join(f"{c:g} CPUs {g:g} GPUs" for c, g in available.machines)
        return f"{self._times(self.cpus)} CPUs and {self._times(self.gpus)} GPUs asked for on machines of {sizes}"

    def _times(self, each: float) -> str:
        return f"{self.copies} × {each:g}" if self.copies > 1 else f"{each:g}"


def check_feasible(available: Resources, *, cpus: float, gpus: float, copies: int = 1) -> int:
    """How many such processes fit at once, at most 1024. Raises Refusal if ``copies`` of them never will."""
    missing = Claim(cpus=cpus, gpus=gpus, copies=copies).missing(available)
    if missing:
        what = "GPUs" if "GPU" in missing else "CPUs"
        raise Refusal(
            "compute",
            NO_VALUE,
            f"{missing}: it would wait for ever",
            f"ask for fewer workers, or for fewer {what} each, or run on a larger cluster",
        )
    return min(available.fits(cpus=cpus, gpus=gpus), 1024)


class CapacityWait:
    """Waits for lost machines: logs once, and gives up after ``wait_seconds``."""

    def __init__(
        self, claim: Claim, resources: Callable[[], Resources], *, wait_seconds: float, log: Callable[[str], None]
    ) -> None:
        self._claim, self._resources, self._wait_seconds, self._log = claim, resources, wait_seconds, log
        self._short_since: float | None = None
        self._looked = -math.inf

    def fits_now(self) -> bool:
        """Whether the claim fits now; queries the cluster every LOOK_SECONDS. Raises LostMachineError when time is up."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return self._short_since is None
        self._looked = now
        missing = self._claim.missing(self._resources())
        if not missing:
            if self._short_since is not None:
                self._log(f"the machines are back after {now - self._short_since:.0f} s.")
            self._short_since = None
            return True
        if self._short_since is None:
            self._short_since = now
            if self._wait_seconds:
                self._log(
                    f"{missing}: a machine was lost. Waiting at most {self._wait_seconds:g} s for it, or for another "
                    "(compute.wait_seconds)."
                )
        if now - self._short_since >= self._wait_seconds:
            raise LostMachineError(
                "compute.wait_seconds",
                self._wait_seconds,
                f"{missing}: a machine was lost, and no other came within {self._wait_seconds:g} s. What is finished is "
                "kept",
                "run the same command again when there are machines, or with a smaller compute.ranks",
            )
        return False


_CONNECTION_ERRORS = ("torch/distributed/", "gloo", "nccl", "connection", "broken pipe")


def lost_connection(error: BaseException) -> bool:
    """Whether a rank's error may be caused by the death of another rank."""
    if hasattr(error, "exit_code"):
        return False
    text = "\n".join([str(error), *getattr(error, "__notes__", ())]).lower()
    return any(part in text for part in _CONNECTION_ERRORS)


LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "MV2_", "MPI_LOCAL", "TORCHELASTIC_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_")
"""Prefixes of variables by which mpirun and torchrun set a process's rank."""


def forget_launchers() -> None:
    """Unset rank variables of another launcher in whose shell the run was started: the backend assigns ranks, and
    DeepSpeed and PyTorch would read the launcher's or fail on the contradiction."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]


def interface_with(address: str) -> str | None:
    """Name of this machine's network interface with an IPv4 or IPv6 address; None if there is none."""
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
