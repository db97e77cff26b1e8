"""Weights and configurations that the wider world reads: the one part of this room that touches files."""

from model.interop.adapters import adapted_weights, save_adapter, save_virtual_tokens
from model.interop.convert import config_from_hf, family_of, from_hf, hf_config, to_hf
from model.interop.files import (
    checkpoint_files,
    has_hf_class,
    load_imported,
    load_pretrained,
    read_config,
    save_pretrained,
)

__all__ = [
    "adapted_weights",
    "checkpoint_files",
    "config_from_hf",
    "family_of",
    "from_hf",
    "has_hf_class",
    "hf_config",
    "load_imported",
    "load_pretrained",
    "read_config",
    "save_adapter",
    "save_pretrained",
    "save_virtual_tokens",
    "to_hf",
]
