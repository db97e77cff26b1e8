"""Weights on disk to a model that is ready to be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from model.architecture import Transformer
from model.build import build_model
from model.interop import load_pretrained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(folder: Path, *, precision: Literal["fp32", "bf16"] = "fp32", device: str = "cpu") -> Transformer:
    """The model of a folder of safetensors and config.json, in evaluation mode. Raises Refusal if there is none."""
    config, state = load_pretrained(folder)
    model = build_model(config, device="meta", dtype=DTYPES[precision])
    placed = {name: tensor.to(device=device, dtype=DTYPES[precision]) for name, tensor in state.items()}
    model.load_state_dict(placed, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)
