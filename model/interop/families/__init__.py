"""The Hugging Face classes our configurations can become: one declarative table each, one file per kin."""

from model.interop.families.gpt2 import GPT2
from model.interop.families.llama import LLAMA, QWEN3
from model.interop.families.mamba import MAMBA

FAMILIES = (LLAMA, QWEN3, GPT2, MAMBA)
