"""The exceptions of the training room."""

from __future__ import annotations

from conf.refusal import Legacy


class TrainingError(Legacy):
    """A user's mistake or a run that cannot go on: the offending value, the rule, the remedy, in one paragraph."""

    exit_code = 2


class TrainingStopped(TrainingError):  # noqa: N818  (not an error: it was asked for)
    """A signal asked the ranks to leave; a checkpoint holds everything up to the step the message names."""

    exit_code = 143
