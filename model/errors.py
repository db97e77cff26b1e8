"""The one exception a user of the model room can cause, and the rule that most settings share."""


class ModelError(Exception):
    """An impossible model configuration or an unusable set of weights.

    The message names the offending value, the rule and the remedy in one paragraph.
    """

    exit_code = 2


def check_counts(part: str, config: object, *names: str) -> None:
    """Raise ModelError where one of these fields of `config` is below 1; null passes. part: where it stands: `mixer`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ModelError(f"{part}.{name} is {value}: it counts something and must be at least 1.")
