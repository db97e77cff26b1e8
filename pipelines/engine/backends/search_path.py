"""Import our packages before others of the same names: many working folders have a `model.py`, `data/` or `conf.py`.

Python looks into the working folder first under `-m`, and so does every worker of Ray. Whichever process imports
`pipelines` puts our root before the first folder that has one of our names; a process that has to unpickle something of
ours before it could import anything is sent a function that needs nothing of ours to begin with.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("pipelines", "model", "data", "conf", "cluster")
ROOT = str(Path(__file__).parents[3])


def portable(fn: Callable[..., Any], root: str = ROOT) -> Callable[..., Any]:
    """`fn`, which is picklable by name, as a function that cloudpickle writes whole: it puts our root first, then calls
    `fn`, whatever the working folder of the unpickling process contains."""
    pickled, first = pickle.dumps(fn), rooted(root)

    def anywhere(*args: Any) -> Any:
        import pickle

        first()
        return pickle.loads(pickled)(*args)

    return anywhere


def rooted(root: str = ROOT) -> Callable[[], None]:
    """A function that puts our root first in the process that calls it."""
    names = PACKAGES

    # It imports all that it uses: cloudpickle writes a function inside a function by its code, not by its name.
    def own_root_first() -> None:
        """Put our root before the first folder of the search path that has one of our packages' names."""
        import os
        import sys

        # What Ray unpacked for this job lies in a folder of its own for each package.
        ours = [folder for folder in sys.path if "py_modules_files" in folder]
        ours = ours or ([root] if os.path.isdir(os.path.join(root, names[0])) else [])
        others = [folder for folder in sys.path if folder not in ours]
        for place, folder in enumerate(others):
            if any(os.path.exists(os.path.join(folder, name + end)) for name in names for end in ("", ".py")):
                sys.path[:] = others[:place] + ours + others[place:]
                return

    return own_root_first
