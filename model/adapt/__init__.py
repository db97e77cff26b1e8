"""Training few weights of a model: attached from outside, through parameter roles, to any family.

    attach_lora(model, LoraConfig(rank=8))         low-rank updates, mergeable
    attach_bottlenecks(model, BottleneckConfig())  a small network behind each sublayer
    attach_prompt(model, PromptConfig(tokens=20))  learned embeddings of virtual tokens
    attach_prefix(model, PrefixConfig(tokens=20))  learned keys and values before every layer's own
    freeze(model, ("frontend.*",))                 named parts stay as they are

What is attached has the role `adapter` and is all that is trained from then on.
"""

from model.adapt.bottleneck import BottleneckConfig, attach_bottlenecks
from model.adapt.freeze import freeze, trained_state
from model.adapt.lora import LORA_A, LORA_B, LoraConfig, adapted_layers, attach_lora, merged
from model.adapt.prefix import PrefixConfig, attach_prefix
from model.adapt.prompt import PromptConfig, attach_prompt, with_prompt

__all__ = [
    "LORA_A",
    "LORA_B",
    "BottleneckConfig",
    "LoraConfig",
    "PrefixConfig",
    "PromptConfig",
    "adapted_layers",
    "attach_bottlenecks",
    "attach_lora",
    "attach_prefix",
    "attach_prompt",
    "freeze",
    "merged",
    "trained_state",
    "with_prompt",
]
