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
    import torch.distributed as dist

    from pipelines.training.job import run_rank

    try:
        figures = run_rank(json.loads(Path(arguments[0]).read_text()))
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        print(error, file=sys.stderr)
        return int(error.exit_code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(figures, indent=1))
    return 0


def leave(code: int) -> None:
    """End this process at once, its work done and told.

    A rank that ends the usual way was seen to abort in a C++ destructor now and then ("terminate called without an active
    exception"), a thread of the process group's store still running; torchrun then calls a finished run failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
