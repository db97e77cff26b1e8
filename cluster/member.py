"""`python -m cluster.member [--warn PID] ray start …`: one node's Ray in a Slurm step, kept alive through Slurm's SIGTERM.

Slurm warns of a preemption (and `scancel --signal=TERM` does the same) by SIGTERM to every process of a job's steps, and
not to its batch script. Ray would go at once, and the run with it, before it could save. So Ray is started with SIGTERM
blocked, as every process it starts inherits; the warning goes to the batch script, which lets the run save and leave, and
then ends all of this with SIGUSR2.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 if SIGUSR2 requested the end, else the command's exit code, or 1 where that is 0."""
    batch_script = int(arguments[1]) if arguments[:1] == ["--warn"] else None
    command = arguments[2:] if batch_script is not None else arguments
    end_requests: list[int] = []

    def warn(number: int, frame: object) -> None:
        if batch_script is not None:
            os.kill(batch_script, signal.SIGTERM)

    signal.signal(signal.SIGTERM, warn)
    signal.signal(signal.SIGUSR2, lambda number, frame: end_requests.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ray = subprocess.Popen(list(command))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    code = ray.wait()
    return 0 if end_requests else code or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
