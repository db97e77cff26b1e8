"""Weights and configurations that the wider world reads: the one part of this room that touches files."""

from model.interop.adapters import save_adapter, save_virtual_tokens
from model.interop.convert import config_from_hf, family_of, from_hf, hf_config, to_hf
from model.interop.files import has_hf_class, load_pretrained, save_pretrained

__all__ = [
    "config_from_hf",
    "family_of",
    "from_hf",
    "has_hf_class",
    "hf_config",
    "load_pretrained",
    "save_adapter",
    "save_pretrained",
    "save_virtual_tokens",
    "to_hf",
]
