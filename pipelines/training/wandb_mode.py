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
"""For the server to say anything at all."""
INIT_SECONDS = 30.0
"""For a run to be taken in by a server that answers; Weights & Biases itself would wait 90."""

Mode = Literal["online", "offline", "off"]


def wandb_mode(settings: TrackingSettings) -> tuple[Mode, str]:
    """The mode and the reason for it, asking the server where that decides.

    A mode that the settings name is taken; `auto` follows WANDB_MODE, then goes online where there is a key and a server.
    """
    if settings.mode != "auto":
        return settings.mode, f"tracking.mode={settings.mode}"
    wished = os.environ.get("WANDB_MODE", "").strip().lower()
    if wished == "disabled" or os.environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes"):
        return "off", "WANDB_MODE=disabled" if wished == "disabled" else "WANDB_DISABLED is set"
    if wished in ("offline", "dryrun"):
        return "offline", f"WANDB_MODE={wished}"
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not _has_key(server):
        return "offline", "no key is set"
    if not _answers(server):
        return "offline", f"{server} does not answer"
    return "online", "a key is set"


def _has_key(server: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.exists() and (urlsplit(server).hostname or server) in netrc.read_text()


@functools.cache
def _answers(server: str) -> bool:
    """Whether a server says anything, be it an error; asked once in a process."""
    try:
        urllib.request.urlopen(server, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
