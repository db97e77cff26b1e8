"""Tokenizer: a SentencePiece vocabulary trained on the cleaned training documents, held-out text never seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.tokenizer import TokenizerSettings
from pipelines.engine.step import Artifact, Context


def run(settings: TokenizerSettings, inputs: Mapping[str, Artifact], out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Writes the model, its vocabulary and the chat template. Several corpora are read one after the other."""
    return dict(ctx.call(train, settings, [inputs[name] for name in sorted(inputs)], out_dir))


def train(settings: TokenizerSettings, corpora: list[Artifact], out_dir: Path) -> dict[str, Any]:
    """Train in one worker process; returns the figures of the summary."""
    from data.tokenizer import train_tokenizer

    return train_tokenizer(_texts(corpora), settings, out_dir)


def _texts(corpora: list[Artifact]) -> Iterator[str]:
    from data.document import read_documents

    for corpus in corpora:
        for document in read_documents(corpus.path / "train"):
            yield document.text
