"""What may have become of a manifest or a lease; a store answers each with one sentence. For the tests of both stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipelines.engine.store.sealed import sealed

Change = Callable[[dict[str, Any]], Any]


def set_to(**changes: Any) -> Change:
    """Fields with other values, under the old seal."""
    return lambda value: {**value, **changes}


def resealed(**changes: Any) -> Change:
    """Fields with other values, under a seal of their own: somebody who knows how."""
    return lambda value: sealed({**{k: v for k, v in value.items() if k != "sha256"}, **changes})


def unsealed(**changes: Any) -> Change:
    """Fields with other values, as before there were seals."""
    return lambda value: {**{k: v for k, v in value.items() if k != "sha256"}, **changes}


def without(field: str) -> Change:
    """A field gone, under a seal of its own."""
    return lambda value: sealed({k: v for k, v in value.items() if k not in (field, "sha256")})


ANYWHERE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-20],
    "binary": lambda data: b"\xff\xfe\x00" + data,
    "another kind": lambda data: b'["a", "list"]',
    "a number": lambda data: b"7",
    "endless": lambda data: b"[" * 200_000,
    "digits": lambda data: b'{"token": ' + b"9" * 5000 + b"}",
    "a field twice": lambda data: b'{"metrics": {}, "token": 1,' + data.lstrip()[1:],
    "another object": lambda data: b'{"hello": "world"}',
}


def _json(change: Change) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(change(json.loads(data))).encode()


MANIFESTS = {
    **ANYWHERE,
    **{
        name: _json(change)
        for name, change in {
            "a better score": set_to(metrics={"bits_per_byte": 1.0}),
            "another file": set_to(files={"x": {"bytes": 1, "sha256": "0" * 64}}),
            "no files": without("files"),
            "no metrics": without("metrics"),
            "files in a list": resealed(files=[]),
            "a file outside": resealed(files={"../../x": {"bytes": 1, "sha256": "0" * 64}}),
            "a file without its size": resealed(files={"x": {"sha256": "0" * 64}}),
            "a token of letters": resealed(token="x"),
            "a token that is true": resealed(token=True),
            "a short digest": resealed(digest="abc"),
            "of a newer program": resealed(format=99),
            "unsealed": unsealed(),
            "unsealed, with a better score": unsealed(metrics={"bits_per_byte": 1.0}),
            "unsealed, format 1, though its lease is sealed": unsealed(format=1, metrics={"bits_per_byte": 1.0}),
            **{f"unsealed, format {v!r}": unsealed(format=v) for v in (True, 1.0, "1", None, 0, [1])},
            "a format that is true": resealed(format=True),
            "of no format": without("format"),
            "unsealed, with other files": unsealed(format=1, files={"x": {"bytes": 1, "sha256": "0" * 64}}),
            "unsealed, with another identity": unsealed(format=1, identity={"step": "letters"}),
        }.items()
    },
}
LEASES = {
    **ANYWHERE,
    **{
        name: _json(change)
        for name, change in {
            "another token": set_to(token=99),
            "unsealed": unsealed(),
            "a token of letters": unsealed(token="x"),
            "a token of letters, sealed": resealed(token="x"),
            "no state": without("state"),
            "an unknown state": resealed(state="asleep"),
            "held by nobody": resealed(state="held", owner=None),
            "held by a stranger": resealed(state="held", owner={"name": "me"}),
            "seconds of letters": resealed(seconds="long"),
        }.items()
    },
}
