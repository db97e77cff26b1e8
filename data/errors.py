"""The one exception of the data room."""

from __future__ import annotations

from conf.refusal import Legacy


class DataError(Legacy):
    """A user's mistake or a broken input: the offending value, the rule, and the remedy, in one paragraph.

    Takes a single message, so it survives pickling on its way home from a worker process.
    """

    exit_code = 2
