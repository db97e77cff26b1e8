"""Whether a run is tracked online, offline or not at all, and why."""

from __future__ import annotations

import functools
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pipelines.training.settings import TrackingSettings

ANSWER_SECONDS = 5.0
"""Timeout of the server's first response."""
INIT_SECONDS = 30.0
"""Timeout of creating a run on a reachable server; Weights & Biases itself would wait 90."""

Mode = Literal["online", "offline", "off"]


def wandb_mode(settings: TrackingSettings) -> tuple[Mode, str]:
    """The mode and its reason; probes the server where needed.

    A configured mode wins; `auto` follows WANDB_MODE, then is online if there is a key and a reachable server.
    """
    if settings.mode != "auto":
        return settings.mode, f"tracking.mode={settings.mode}"
    requested = os.environ.get("WANDB_MODE", "").strip().lower()
    if requested == "disabled" or os.environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes"):
        return "off", "WANDB_MODE=disabled" if requested == "disabled" else "WANDB_DISABLED is set"
    if requested in ("offline", "dryrun"):
        return "offline", f"WANDB_MODE={requested}"
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not _has_key(server):
        return "offline", "no key is set"
    if not _answers(server):
        return "offline", f"{server} does not answer"
    return "online", "a key is set"


def _has_key(server: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", os.path.expanduser("~/.netrc")))  # Path.home() raises where there is no home
    return netrc.exists() and (urlsplit(server).hostname or server) in netrc.read_text()


@functools.cache
def _answers(server: str) -> bool:
    """Whether a server responds, even with an error; probed once per process."""
    try:
        urllib.request.urlopen(server, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
