"""What worker processes of the backend tests run; importable by name where this folder is in the path."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from conf.refusal import Refusal


class PickyError(Exception):
    """A user's error as rooms declare them."""

    exit_code = 2


class UnportableError(Exception):
    """Cannot be unpickled: its constructor takes two arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def double(number: int) -> int:
    return 2 * number


def where(_: Any) -> tuple[int, str]:
    return os.getpid(), os.environ.get("OMP_NUM_THREADS", "")


def mark_the_beginning() -> None:
    """What a backend calls in each fork before anything else."""
    os.environ["BEGUN_WITH"] = os.environ.get("OMP_NUM_THREADS", "")


def beginnings(module: str) -> dict[str, Any]:
    return {
        "is loaded": module in sys.modules,
        "begun with OMP_NUM_THREADS": os.environ.get("BEGUN_WITH"),
        "WHILE": os.environ.get("WHILE"),
    }


def hold_a_semaphore(number: int) -> int:
    """As importing a library may, whose module keeps it (tqdm's lock)."""
    _held.append(multiprocessing.RLock())
    return number


_held: list[Any] = []


def sleep_and_tell(seconds: float, folder: str) -> int:
    Path(folder, str(os.getpid())).touch()
    time.sleep(seconds)
    return os.getpid()


def raise_picky(_: Any) -> None:
    raise PickyError("learning rate -1 must be positive; set optim.lr")


def raise_unportable(_: Any) -> None:
    raise UnportableError("one", "two")


def divide(number: int) -> float:
    return 1 / number


def die_until(marks: str, times: int) -> str:
    """Die by SIGKILL so many times, then answer."""
    marker = Path(marks) / f"death{len(list(Path(marks).iterdir()))}"
    if len(list(Path(marks).iterdir())) < times:
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


def rank_environment(config: dict[str, Any]) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names}
    others = ("OMPI_", "PMI_", "TORCHELASTIC_", "GROUP_RANK")
    found["of other launchers"] = " ".join(name for name in os.environ if name.startswith(others))
    Path(config["folder"], f"rank{found['RANK']}").write_text(str(found))
    return found


def sum_over_ranks(config: dict[str, Any]) -> float:
    """One all-reduce, as a training loop would start it under any launcher."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = torch.tensor([float(os.environ["RANK"]) + 1])
    dist.all_reduce(total)
    return float(total)


def die_once_in_a_collective(config: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 is killed the first time while rank 0 waits for it; the second time both finish."""
    import torch
    import torch.distributed as dist

    folder = Path(config["folder"])
    attempt = len(list(folder.glob("attempt*")))
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == "1":
        (folder / f"attempt{attempt}").touch()
        if attempt < config["deaths"]:
            os.kill(os.getpid(), signal.SIGKILL)
    total = torch.ones(1)
    dist.all_reduce(total)
    return {"attempt": attempt, "total": float(total)}


def fail_in_rank_1(config: dict[str, Any]) -> None:
    """One rank finds a user's mistake; the other waits for it for ever."""
    print("a line for the log", flush=True)
    if os.environ["RANK"] == "1":
        raise Refusal("rows", 3, "cannot be shared by 2 ranks")
    time.sleep(600)


def wait_for_ever(config: dict[str, Any]) -> None:
    Path(config["folder"], f"pid{os.getpid()}").touch()
    time.sleep(600)


def rank_0_dies_until(config: dict[str, Any]) -> str:
    print("last words", flush=True)
    return die_until(config["folder"], config["times"])


def sleep_in_rank(config: dict[str, Any]) -> None:
    time.sleep(config["seconds"])
