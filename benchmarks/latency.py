"""Seconds that `plan` and a fully cached `run` take, as a person waits for them: whole processes, start-up included.

    python benchmarks/latency.py experiment=demo store=runs [--repeat 5] [--write]

The experiment must have been run before. Limits: 3 s for plan, 8 s for a cached run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from hardware import machine, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["experiment=demo"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_intermixed_args()
    result: dict[str, object] = {"overrides": options.overrides, **machine()}
    for verb, limit in (("plan", 3.0), ("run", 8.0)):
        seconds = []
        for _ in range(options.repeat):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "pipelines", verb, *options.overrides], check=True, capture_output=True
            )
            seconds.append(round(time.perf_counter() - began, 2))
        result[verb] = {"median": statistics.median(seconds), "all": seconds, "limit": limit}
    print(json.dumps(result, indent=1))
    if options.write:
        write_result("latency", result)


if __name__ == "__main__":
    main()
