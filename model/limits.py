"""How large a model may be."""

from __future__ import annotations

from conf.refusal import Refusal

LARGEST = {"n_layers": 2_000, "d_model": 2**20, "vocab_size": 2**28, "n_heads": 2**16, "n_experts": 2**16}
"""Of some counts: beyond these even computing a model's cost takes long (2 ms a layer). The deepest published have
1,000 layers, the widest 20,000 channels."""


def check_counts(config: object, *names: str) -> None:
    """Raises Refusal where one of these fields of `config` is below 1 or beyond LARGEST; null passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise Refusal(name, value, "it counts something and must be at least 1")
        if value is not None and value > (most := LARGEST.get(name, 2**31)):
            raise Refusal(name, value, "no model is that large", f"at most {most:,} can be built")
