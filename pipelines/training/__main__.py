"""Train without Ray, from the run.json that a training step wrote:

python -m pipelines.training OUT_DIR/run.json
torchrun --nproc-per-node=2 -m pipelines.training OUT_DIR/run.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Train as the job in a file says, as the rank that the environment says this is; returns the exit code."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    from pipelines.training.job import run_rank

    try:
        figures = run_rank(json.loads(Path(arguments[0]).read_text()))
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        print(error, file=sys.stderr)
        return int(error.exit_code)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    from pipelines.training.ranks import leave

    leave(main(sys.argv[1:]))
