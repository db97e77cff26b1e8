"""The bytes that each family is written as, kept: config.json whole, the weights by their sha256.

python -m tests.golden.exports           # writes them anew, after a change that is meant to move some
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from model.build import build_model
from model.interop import save_pretrained
from tests.model.configurations import PRESETS as FOLDER
from tests.model.configurations import preset_values
from tests.model.small_presets import tiny

PRESETS = [name for name in sorted(path.stem for path in FOLDER.glob("*.yaml")) if "max_seq_len" in preset_values(name)]
KEPT = Path(__file__).parent / "exports.json"


def exported(preset: str) -> dict[str, Any]:
    """What `save_pretrained` writes of a small model of this preset whose weights are counted through."""
    config = tiny(preset)
    state = build_model(config, device="meta").state_dict()
    numbers = {name: torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype) for name, x in state.items()}
    numbers |= {name: numbers[source] for name, source in config.tied_weights.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(numbers, config, Path(folder))
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    described = json.loads(files.pop("config.json"))
    described.pop("transformers_version", None)
    return {
        "config": described,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }


if __name__ == "__main__":
    text = json.dumps({name: exported(name) for name in PRESETS}, indent=1, sort_keys=True)
    KEPT.write_text(text + "\n")
