"""`python -m cluster.ready --nodes N --timeout SECONDS`: wait until the Ray cluster at RAY_ADDRESS has N live nodes.

Ray's own readiness test (`ray health-check`) is content with the head alone, and a run that starts before its workers
joined asks for resources that are not there yet.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time


def main() -> int:
    """Exit code 0 once all nodes are there, 1 when time is up, with the reason on the screen."""
    parser = argparse.ArgumentParser(description="wait until a Ray cluster has all its nodes")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--timeout", type=float, default=300.0)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.timeout
    alive, why = 0, "nothing answered"
    while time.monotonic() < deadline:
        try:
            alive = alive_nodes()
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            why = str(error).partition("\n")[0]
        else:
            if alive >= arguments.nodes:
                print(f"Ray has {alive} of {arguments.nodes} nodes", flush=True)
                return 0
            why = f"{alive} of {arguments.nodes} nodes joined"
        time.sleep(1.0)
    print(f"Ray was not ready after {arguments.timeout:.0f} s: {why}.", file=sys.stderr)
    return 1


def alive_nodes() -> int:
    """Live nodes of the cluster at RAY_ADDRESS, raising what Ray raises when there is none yet."""
    import ray

    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    return sum(bool(node["Alive"]) for node in ray.nodes())


if __name__ == "__main__":
    sys.exit(main())
