"""The one exception a user of the model room can cause, and the rule that most settings share."""

from __future__ import annotations

from conf.refusal import Legacy


class ModelError(Legacy):
    """An impossible model configuration or an unusable set of weights.

    The message names the offending value, the rule and the remedy in one paragraph.
    """

    exit_code = 2


LARGEST = {"n_layers": 2_000, "d_model": 2**20, "vocab_size": 2**28, "n_heads": 2**16, "n_experts": 2**16}
"""Of some counts: beyond these even computing a model's cost takes long (2 ms a layer). The deepest published have
1,000 layers, the widest 20,000 channels."""


def check_counts(part: str, config: object, *names: str) -> None:
    """Raise ModelError where one of these fields of `config` is below 1 or beyond LARGEST; null passes. part: `mixer`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ModelError(f"{part}.{name} is {value}: it counts something and must be at least 1.")
        if value is not None and value > (most := LARGEST.get(name, 2**31)):
            raise ModelError(f"{part}.{name} is {value}: no model is that large; at most {most:,} can be built.")
