"""The one exception this room raises for a user's mistake or a cluster's refusal."""

from __future__ import annotations

from conf.refusal import Legacy


class ClusterError(Legacy):
    """A submission that cannot be made, or a job that cannot be reached: the value, the rule, the remedy."""

    exit_code = 2
