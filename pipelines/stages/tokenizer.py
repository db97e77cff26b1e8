"""Tokenizer: a SentencePiece vocabulary trained on the cleaned training documents, held-out text never seen.

Or, where training starts from a folder of weights that brings its tokenizer, that one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.tokenizers.training import TokenizerSettings
from pipelines.engine.step import Artifact, Context, Inputs


def run(settings: TokenizerSettings, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Writes the model, its vocabulary and the chat template. Several corpora are read one after the other."""
    return dict(ctx.call(train, settings, [corpus for _, corpus in sorted(inputs["corpus"].items())], out_dir))


@dataclass(frozen=True, kw_only=True)
class TakenTokenizer:
    """Where the tokenizer lies; its files say what it is, and beside them the model's configuration."""

    folder: str = field(metadata={"execution": True})
    config_ids: dict[str, int] = field(default_factory=dict, metadata={"absent_at_default": True})
    """See `data.tokenizers.huggingface.config_ids`; none for a tokenizer that this program made."""


PROBES = {
    "capital letters": "Stop the World",
    "punctuation": 'no! now? (yes), "it\'s"; a.b',
    "line breaks": "one\ntwo\n\nthree",
    "runs of spaces": "a  b    c",
    "tabs": "a\tb",
    "spaces around a text": " a ",
    "accents": "caf\u00e9",
    "decomposed accents": "cafe\u0301",
    "Chinese": "\u6f22\u5b57",
    "emoji": "\U0001f600",
}
"""Samples of text that must survive encoding and decoding."""


def take(settings: TakenTokenizer, inputs: Inputs, out_dir: Path, ctx: Context) -> dict[str, Any]:
    """Copies the tokenizer that belongs to weights from outside; what their configuration says of ids becomes a file."""
    import shutil

    from data.tokenizers.chat import template_fault
    from data.tokenizers.huggingface import IDS_FILES
    from data.tokenizers.sentencepiece import Tokenizer, tokenizer_files

    out_dir.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_files(Path(settings.folder)):
        shutil.copyfile(file, out_dir / file.name)
    if settings.config_ids:
        said = json.dumps(dict(sorted(settings.config_ids.items())), indent=2)
        (out_dir / IDS_FILES[0]).write_text(said + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(out_dir)
    lost = [name for name, text in PROBES.items() if tokenizer.decode(tokenizer.encode(text)) != text]
    if lost:
        ctx.log(
            f"it does not keep all text ({len(lost)} of {len(PROBES)} kinds tried come back changed): {', '.join(lost)}"
        )
    if (fault := template_fault(tokenizer)) is not None:
        ctx.log(f"only conversations need it, and here it does not work: {fault}")
    begins, ends, closes = map(tokenizer.piece, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_id))
    ctx.log(
        f"{tokenizer.vocab_size:,} pieces; documents begin with {begins}, end with {ends}, and answers end with {closes}"
    )
    return {"vocab_size": tokenizer.vocab_size, "kinds_of_text_lost": len(lost)}


def train(settings: TokenizerSettings, corpora: list[Artifact], out_dir: Path) -> dict[str, Any]:
    """Train in one worker process; returns the figures of the summary."""
    from data.tokenizers.training import train_tokenizer

    return train_tokenizer(_texts(corpora), settings, out_dir)


def _texts(corpora: list[Artifact]) -> Iterator[str]:
    from data.text.document import read_documents

    for corpus in corpora:
        for document in read_documents(corpus.path / "train"):
            yield document.text
