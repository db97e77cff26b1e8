"""Secrets are never written: recognised by names of environment variables and by patterns of values.

A value is one of the environment's if its variable's name says so (`WANDB_API_KEY`, `GITHUB_PAT`, `DB_PASSWORD`), or if it
is a URL with a password in it (`DATABASE_URL=postgres://me:PASSWORD@host`): then the password is. Independently
of the environment, a value with the pattern of a known service's token is one too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from conf.refusal import NO_VALUE, Refusal

_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|BEARER|COOKIE|(?:^|_)(?:PAT|PASS|PWD|AUTH|DSN)(?:_|$)", re.IGNORECASE
)
_KEY = re.compile(r"KEY", re.IGNORECASE)  # of databases, keyboards and maps too
_NO_SECRETS = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK", "TOKENIZERS_PARALLELISM", "RAY_AUTH_MODE", "GPG_KEY"})
"""Variables whose names match and whose values are public: folders, sockets, switches, the key that signs Python."""
_SWITCHES = frozenset({"false", "enabled", "disabled", "optional", "required", "default"})
_NUMBER = re.compile(r"[-+\d_.,eE]{1,15}")
SHORTEST = 6
"""Characters of the shortest value that counts as a secret: shorter ones occur everywhere by chance."""
FOUND_ANYWHERE = 12
"""From this length on a value is searched for inside words too; a shorter one only as a whole word."""

_URL_PASSWORD = re.compile(r"(?<![\w+.-])[a-z][a-z0-9+.-]*://[^\s/?#:@\"']*:([^\s/?#@\"'<]+)@", re.IGNORECASE)
_URL_KEY = re.compile(
    r"://[^\s\"']*[?&](?:api_?key|(?:\w+_)?token|sig|(?:x-amz-)?signature|password|secret|key)=([^\s&#\"'<]{6,})",
    re.IGNORECASE,
)
_LOOKS = {
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{20,}",
    "a GitLab token": r"glpat-[A-Za-z0-9_-]{16,}",
    "a Hugging Face token": r"hf_[A-Za-z0-9]{24,}",
    "an API key": r"sk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}",
    "an AWS access key": r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "a Google key": r"AIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"xox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a PyPI token": r"pypi-[A-Za-z0-9_-]{32,}",
    "an npm token": r"npm_[A-Za-z0-9]{36}",
    "a Stripe key": r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "a JSON web token": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_LOOK = re.compile("|".join(f"(?P<look{number}>(?<![A-Za-z0-9]){look})" for number, look in enumerate(_LOOKS.values())))


COMMAND = "ATHANOR_COMMAND"
"""Environment variable with the typed command line, for workers in other processes."""


def record_command(words: Sequence[str]) -> None:
    """Set COMMAND to a command line, with secrets redacted."""
    os.environ[COMMAND] = without_secrets(shlex.join(words))


def refuse_secrets(value: Any, where: str) -> None:
    """Raise Refusal, about ``where``, if any text in plain data holds a secret: from the environment, or by its pattern."""
    written = json.dumps(value, default=str)
    kind = next((kind for kind, _ in _by_looks(written)), None)
    variable = next((name for name, secret in _of_environment().items() if secret.search(written)), None)
    if kind is None and variable is None:
        return
    found = f"the value of the environment variable {variable}"
    if kind is not None:
        found = kind if variable is None else f"{kind} ({found})"
    remedy = "what needs it reads the environment itself"
    if variable is None:
        remedy = "put it into an environment variable of what needs it"
    raise Refusal(
        where,
        NO_VALUE,
        f"contains {found}. Secrets are never written to disk",
        f"leave it out of the settings; {remedy}",
    )


def without_secrets(value: Any) -> Any:
    """Plain data with secrets redacted."""
    written = json.dumps(value)
    for name, secrets in _of_environment().items():
        written = secrets.sub(f"<{name}>", written)
    for kind, secret in list(_by_looks(written)):
        written = written.replace(secret, f"<{kind}>")
    return json.loads(written)


def _by_looks(written: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of everything in a text with the pattern of a secret."""
    kinds = list(_LOOKS)
    for match in _LOOK.finditer(written):
        yield kinds[int(str(match.lastgroup).removeprefix("look"))], match[0]
    for what, in_url in (("a password inside a URL", _URL_PASSWORD), ("a key inside a URL", _URL_KEY)):
        yield from ((what, match[1]) for match in in_url.finditer(written))


def _of_environment() -> dict[str, re.Pattern[str]]:
    """{variable: pattern that finds its secret in JSON}."""
    found = {}
    for name, value in os.environ.items():
        if name == COMMAND:  # what it repeats has a reason of its own
            continue
        texts = [_pattern(secret) for secret in _secrets_of(name, value.strip()) if len(secret) >= SHORTEST]
        if texts:
            found[name] = re.compile("|".join(texts))
    return found


def _pattern(secret: str) -> str:
    text = re.escape(json.dumps(secret)[1:-1])
    return text if len(secret) >= FOUND_ANYWHERE else rf"(?<![\w-]){text}(?![\w-])"


def _secrets_of(name: str, value: str) -> set[str]:
    """The secrets in an environment variable."""
    in_url = {match[1] for look in (_URL_PASSWORD, _URL_KEY) for match in look.finditer(value)}
    if in_url or "://" in value:
        return in_url | {unquote(secret) for secret in in_url}
    named = _NAME.search(name) or (_KEY.search(name) and (len(value) >= FOUND_ANYWHERE or not value.isalpha()))
    # A path to a file of keys is no key, a number (MAX_TOKENS) and a switch are none either.
    public = value.startswith(("/", "~", "./")) or value.lower() in _SWITCHES or _NUMBER.fullmatch(value)
    return {value} if named and not public and name not in _NO_SECRETS else set()
