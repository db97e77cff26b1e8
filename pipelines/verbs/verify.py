"""`athanor verify`: compare a store with what was published.

athanor verify                          # the store runs/
athanor verify store=s3://bucket/runs
athanor verify --seal store=runs        # also seals manifests and leases from before there were seals

A seal is a checksum against damage and casual edits, not a signature: whoever can write to the store can compute it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from conf.refusal import Refusal
from pipelines.console import display as console
from pipelines.engine.store.open import open_store, storage_errors
from pipelines.engine.store.verify import findings
from pipelines.settings.compose import compose


def verify(overrides: Sequence[str], *, seal: bool) -> int:
    """Read every byte of a store and print what is damaged; 1 where anything is, else 0."""
    store = open_store(store_of(overrides, "verify"))
    out, damaged, artifacts, leases, unsealed = console.console(), 0, 0, 0, 0
    with storage_errors(store):
        for finding in findings(store, seal=seal):
            artifacts, leases = artifacts + (finding.kind == "artifact"), leases + (finding.kind == "lease")
            damaged += bool(finding.damage)
            unsealed += finding.unsealed
            for line in (*finding.damage, *finding.notes):
                out.print(line, markup=False)
            if finding.kind == "artifact" and not finding.damage:
                out.print(
                    f"{finding.place}: {finding.files} files, {console.size(finding.bytes)}, as published", markup=False
                )
            sys.stdout.flush()  # a large store takes its time
    results = [f"{damaged} damaged"] if damaged else []
    if unsealed:
        results.append(
            f"{unsealed} without a seal, whose metrics cannot be checked (athanor verify --seal "
            f"store={shlex.quote(store.url)} seals what is intact)"
        )
    total = f"{artifacts} artifacts and {leases} leases in {store.url}"
    out.print(f"{total}: {', '.join(results) or 'all as they were written'}", markup=False)
    return 1 if damaged else 0


def store_of(overrides: Sequence[str], verb: str) -> str:
    """The store of `store=`, or of an experiment's settings; runs/ without either."""
    if any(override.startswith("experiment=") for override in overrides):
        return compose(overrides).store
    unknown = [override for override in overrides if not override.startswith("store=")]
    if unknown:
        raise Refusal(verb, unknown[0], "it looks at a whole store", f"write athanor {verb} store=DIR")
    return next((override.partition("=")[2] for override in reversed(overrides)), "runs")
