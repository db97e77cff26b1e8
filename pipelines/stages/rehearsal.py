"""Dry-run the export of imported weights, so that what it would refuse is refused before training.

    rehearse(config, Path("weights/qwen"), cache)      # seconds; instant if it passed before on this machine

transformers is slow to import, so what passed is remembered in the machine's cache, by everything it depends on: the
tokenizer's files, the configuration, transformers' version and our own code. The export compares all of it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from data.tokenizers.sentencepiece import Tokenizer, tokenizer_files
from model.config import ModelConfig
from model.interop import has_hf_class, hf_config

ROOT = Path(__file__).parents[2]
PIECES = 4000
"""Of the vocabulary, spelled in one text and compared."""


def rehearse(config: ModelConfig, tokenizer_dir: Path | None, cache: Path) -> None:
    """Raise unless transformers builds such a model and its tokenizer agrees with ours on this folder's files.

    tokenizer_dir: None where the tokenizer is of our own making. cache: this machine's folder.
    Raises Refusal as the step would after all training.
    """
    described = hf_config(config) if has_hf_class(config) else None
    passed = cache / "rehearsed" / _key(described, tokenizer_dir)
    if passed.is_file():
        return
    _rehearse(config, described, tokenizer_dir)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next command some seconds
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()


def _rehearse(config: ModelConfig, described: dict[str, object] | None, tokenizer_dir: Path | None) -> None:
    from data.tokenizers.export import export_tokenizer
    from pipelines.stages.conformance import SAMPLE, build_empty, check_tokens, read_tokenizer

    with tempfile.TemporaryDirectory() as made:
        if described is not None:
            (Path(made) / "config.json").write_text(json.dumps(described), encoding="utf-8")
            build_empty(config, Path(made))
        if tokenizer_dir is None:
            return
        export_tokenizer(tokenizer_dir, Path(made), max_tokens=config.max_seq_len)
        tokenizer = Tokenizer.load(tokenizer_dir)
        ids = range(*tokenizer.text_ids)
        spoken = "".join(tokenizer.decode([number]) for number in ids[:: max(1, len(ids) // PIECES)])
        check_tokens(tokenizer, read_tokenizer(Path(made)), [SAMPLE, spoken])


def _key(described: dict[str, object] | None, tokenizer_dir: Path | None) -> str:
    """Digest of everything that the result depends on."""
    code = sorted(path for room in ("data", "model", "pipelines/stages") for path in (ROOT / room).rglob("*.py"))
    files = tokenizer_files(tokenizer_dir) if tokenizer_dir is not None else []
    depends = {
        "model": described,
        "tokenizer": {file.name: _sha256(file) for file in files},
        "packages": {name: version(name) for name in ("transformers", "tokenizers", "torch")},
        "code": {str(file.relative_to(ROOT)): _sha256(file) for file in code},
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
