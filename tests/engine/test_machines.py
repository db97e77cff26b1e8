"""What fits on which machines, how long lost ones are waited for, and by which network ranks find one another."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable

import pytest

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.backends import machines
from pipelines.engine.backends.machines import (
    CapacityWait,
    Claim,
    Resources,
    check_feasible,
    forget_launchers,
    interface_with,
    lost_connection,
)
from pipelines.engine.backends.outcome import LOST_MACHINE, LostMachineError, WorkerDiedError
from pipelines.engine.backends.ray_health import RayGoneError

TWO = Resources(cpus=12, gpus=2, machines=((8.0, 2.0), (4.0, 0.0)))
ONE = Resources(cpus=8, gpus=2, machines=((8.0, 2.0),))


@pytest.mark.parametrize(
    ("cpus", "gpus", "fits"),
    [(1, 0, 12), (3, 0, 3), (5, 0, 1), (9, 0, 0), (4, 1, 2), (5, 1, 1), (0, 1, 2), (0, 0, 2048)],
)
def test_a_process_fits_on_one_machine_or_not_at_all(cpus: float, gpus: float, fits: int) -> None:
    assert TWO.fits(cpus=cpus, gpus=gpus) == fits


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        (Claim(cpus=1, gpus=3), "3 GPUs asked for where there are 2"),
        (Claim(cpus=5, gpus=0, copies=3), "3 × 5 CPUs asked for where there are 12"),
        # 12 CPUs there are, and no machine with room for the second: Ray would wait for ever without a word
        (
            Claim(cpus=6, gpus=0, copies=2),
            "2 × 6 CPUs and 2 × 0 GPUs asked for on machines of 8 CPUs 2 GPUs and 4 CPUs 0 GPUs",
        ),
    ],
)
def test_what_never_fits_is_refused_with_what_there_is(claim: Claim, says: str) -> None:
    with pytest.raises(Refusal, match=rf"^compute: {says}: it would wait for ever\. Ask for fewer workers"):
        check_feasible(TWO, cpus=claim.cpus, gpus=claim.gpus, copies=claim.copies)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(machines.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_lost_machine_is_waited_for_and_said_once_and_its_return_too(clock: Callable[[float], None]) -> None:
    there, said = [TWO], list[str]()
    capacity = CapacityWait(Claim(cpus=4, gpus=0, copies=3), lambda: there[0], wait_seconds=60, log=said.append)
    assert capacity.fits_now()
    there[0] = ONE
    assert capacity.fits_now()  # not asked again within LOOK_SECONDS
    for _ in range(5):
        clock(10)
        assert not capacity.fits_now()
    assert said == [
        "3 × 4 CPUs asked for where there are 8: a machine was lost. Waiting at most 60 s for it, or for another "
        "(compute.wait_seconds)."
    ]
    there[0] = TWO
    clock(3)
    assert capacity.fits_now()
    assert said[1:] == ["the machines are back after 43 s."]
    there[0] = ONE
    clock(100)
    assert not capacity.fits_now()  # the time to wait begins anew
    clock(60)
    with pytest.raises(LostMachineError, match="no other came within 60 s") as lost:
        capacity.fits_now()
    assert lost.value.exit_code == LOST_MACHINE


def test_who_waits_for_nothing_is_told_at_once(clock: Callable[[float], None]) -> None:
    said: list[str] = []
    capacity = CapacityWait(Claim(cpus=9, gpus=0), lambda: ONE, wait_seconds=0, log=said.append)
    with pytest.raises(LostMachineError):
        capacity.fits_now()
    assert said == []


def test_a_lost_machine_and_a_lost_ray_have_a_code_of_their_own() -> None:
    assert LostMachineError.exit_code == RayGoneError.exit_code == LOST_MACHINE == 75
    assert WorkerDiedError.exit_code == Refusal.exit_code == 2


def test_a_broken_connection_is_told_from_a_ranks_own_mistake() -> None:
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:1157: Connection reset by peer")
    in_torch = RuntimeError("Timed out")
    in_torch.add_note('in a worker process:\n  File "/x/torch/distributed/distributed_c10d.py", line 1')
    assert lost_connection(broken) and lost_connection(in_torch)
    assert not lost_connection(ValueError("a learning rate of -1"))
    assert not lost_connection(Refusal("connection", NO_VALUE, "a user's mistake"))


def test_other_launchers_words_are_forgotten_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "ROLE_RANK"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("RANK", "1")
    before = dict(os.environ)
    forget_launchers()
    assert {name for name in before if name not in os.environ} == {
        *("OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "ROLE_RANK")
    }


def test_an_address_is_known_by_its_interface() -> None:
    assert interface_with("127.0.0.1") == "lo"
    assert interface_with("198.51.100.77") is None  # an address of documentation
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    for address in own:
        assert interface_with(address) in {name for _, name in socket.if_nameindex()}
