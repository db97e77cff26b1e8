"""`athanor verify`: is everything in the store what was published?

athanor verify                          # the store runs/
athanor verify store=s3://bucket/runs
athanor verify --seal store=runs        # also seals manifests and leases from before there were seals
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipelines import console
from pipelines.engine.store import open_store, storage_errors
from pipelines.engine.verify import findings
from pipelines.overrides import SettingsError
from pipelines.settings import compose


def verify(overrides: Sequence[str], *, seal: bool) -> int:
    """Read every byte of a store, print what is not as it was written; 1 where anything is damaged, else 0."""
    store = open_store(_store_of(overrides))
    out, damaged, artifacts, leases = console.console(), 0, 0, 0
    with storage_errors(store):
        for found in findings(store, seal=seal):
            artifacts, leases = artifacts + (not found.is_lease), leases + found.is_lease
            damaged += bool(found.damage)
            for line in (*found.damage, *found.notes):
                out.print(line, markup=False)
            if not found.is_lease and not found.damage:
                out.print(
                    f"{found.place}: {found.files} files, {console.size(found.bytes)}, as published", markup=False
                )
            sys.stdout.flush()  # a large store takes its time
    total = f"{artifacts} artifacts and {leases} leases in {store.url}"
    out.print(f"{total}: {f'{damaged} damaged' if damaged else 'all as they were written'}", markup=False)
    return 1 if damaged else 0


def _store_of(overrides: Sequence[str]) -> str:
    """The store that `store=` names, or that of an experiment's settings."""
    if any(word.startswith("experiment=") for word in overrides):
        return compose(overrides).store
    strange = [word for word in overrides if not word.startswith("store=")]
    if strange:
        raise SettingsError(f"{strange[0]!r}: verify looks at a whole store; write athanor verify store=DIR.")
    return next((word.partition("=")[2] for word in reversed(overrides)), "runs")
