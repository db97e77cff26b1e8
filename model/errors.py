"""The one exception a user of the model room can cause."""


class ModelError(Exception):
    """An impossible model configuration or an unusable set of weights.

    The message names the offending value, the rule and the remedy in one paragraph.
    """

    exit_code = 2
