"""The one exception the engine raises for a user's mistake or a machine's refusal."""

from __future__ import annotations

from conf.refusal import Legacy

LOST_MACHINE = 75
"""Exit code of a run that lost a machine, or Ray itself, and can go on elsewhere or later (sysexits' EX_TEMPFAIL). A
scheduler may requeue such a job; any other code but 0 needs a person."""


class EngineError(Legacy):
    """A problem a person can act on: the message names the value, the rule and the remedy.

    Anything with an ``exit_code`` is printed without a traceback and ends the command with that code. Only one
    positional argument, so that it survives pickling through worker processes.
    """

    exit_code = 2
