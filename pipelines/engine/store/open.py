"""From what a user writes after ``store=`` to a store."""

from __future__ import annotations

import os
from pathlib import Path

from conf.refusal import Refusal
from pipelines.engine.store.base import Store, storage_errors
from pipelines.engine.store.lease import TTL_SECONDS
from pipelines.engine.store.local import LocalStore

__all__ = ["Store", "open_store", "storage_errors"]


def open_store(url: str | Path, *, ttl_seconds: float = TTL_SECONDS) -> Store:
    """The store at a path or at ``s3://bucket/prefix``; nothing is written before something is made."""
    text = str(url)
    scheme = text.split("://", 1)[0] if "://" in text else "file"
    if scheme == "file":
        return LocalStore(Path(os.path.expanduser(text.removeprefix("file://"))).absolute(), ttl_seconds=ttl_seconds)
    if scheme == "s3":
        from pipelines.engine.store.object_store import ObjectStore  # fsspec is slow to import

        return ObjectStore(text, ttl_seconds=ttl_seconds)
    raise Refusal(
        "store",
        text,
        "a store is a folder or s3://bucket/prefix. Leases need writes that depend on what is there, and "
        f"{scheme}:// is not known to have them",
        "mount it as a folder, or use its S3 interface",
    )
