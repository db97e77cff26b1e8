"""Hide files of an artifact's folder that its manifest does not list, so that no step reads them.

Readers of an artifact (by name, pattern or existence of a file) get a folder with exactly the listed files: the folder
itself, or, where it has unlisted files, a folder of links.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.refusal import NO_VALUE, Refusal
from pipelines.engine.store.manifest import NAME


def listed(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """``folder``, or a folder of links to what the manifest lists. Raises Refusal where links cannot be made."""
    unlisted_files = unlisted(folder, manifest)
    if not unlisted_files:
        return folder
    view = folder.parents[1] / ".views" / f"{folder.parent.name}-{folder.name}"
    if not view.is_dir() or unlisted(view, manifest) or not all((view / path).is_file() for path in manifest["files"]):
        try:
            _link(folder, manifest, view)
        except OSError as error:
            raise Refusal(
                folder / unlisted_files[0],
                NO_VALUE,
                "is no part of the artifact in whose folder it lies, and no folder without it can be made "
                f"({error.strerror}: {view})",
                f"move it out of {folder}",
            ) from error
    return view


def unlisted(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Sorted relative paths in the folder that the manifest does not list; of folders only linked ones."""
    own = {NAME, *manifest["files"]}
    found = []
    for here, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        found += [os.path.relpath(os.path.join(here, name), folder) for name in (*names, *links)]
    return sorted(path for path in found if path not in own)


def _link(folder: Path, manifest: Mapping[str, Any], view: Path) -> None:
    draft = view.with_name(f".{view.name}.{uuid.uuid4().hex}")
    for path in (NAME, *manifest["files"]):
        link = draft / path
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.relpath(folder / path, link.parent), link)
    shutil.rmtree(view, ignore_errors=True)
    try:
        os.rename(draft, view)
    except FileExistsError:  # another process made it meanwhile
        shutil.rmtree(draft, ignore_errors=True)
