"""What every step of the shipped experiments is made from, and its digest, kept: a refactoring must move none of them.

python -m tests.golden.identities        # writes them anew, after a change that is meant to move some

`weights/` is a tiny Llama with a byte-level tokenizer, as transformers saved them: what `init_from` cases begin with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.engine.files import FileHashes
from pipelines.engine.resolve import resolve
from pipelines.graph import build
from pipelines.settings.compose import compose

FOLDER = Path(__file__).parent / "identities"
WEIGHTS = Path(__file__).parent / "weights"

TEXT = "It was the best of times, it was the worst of times.\n"
CHAT = '{"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]}\n'

CASES = {
    "demo": ("experiment=demo", "corpus=text"),  # the corpus of its own is this Python's library, and so another digest
    "demo-30min": ("experiment=demo-30min", "corpus=text"),
    "text": ("experiment=text",),
    "gpt2-124m": ("experiment=gpt2-124m",),
    "llama-1b": ("experiment=llama-1b",),
    "llama-8b": ("experiment=llama-8b",),
    "t5-small": ("experiment=text", "model=t5-small", "objective=span_denoising", "optim=adamw", "finetune=none"),
    "bart-base": ("experiment=text", "model=bart-base", "objective=text_infilling", "optim=adamw", "finetune=none"),
    "bert-base": ("experiment=text", "model=bert-base", "objective=masked_token", "optim=adamw", "finetune=none"),
    "mixtral-tiny": ("experiment=text", "model=mixtral-tiny", "optim=adamw"),
    "mamba-130m": ("experiment=text", "model=mamba-130m", "optim=adamw"),
    "chat": ("experiment=text", "finetune=chat", "finetune.data.paths=[CHATS]"),
    "chat-lora": ("experiment=text", "finetune=chat-lora", "finetune.data.paths=[CHATS]"),
    "init-pretrain": ("experiment=text", "pretrain.init_from=WEIGHTS", "shards.seq_len=64"),
    "init-finetune": (
        *("experiment=text", "finetune=chat", "finetune.data.paths=[CHATS]", "finetune.init_from=WEIGHTS"),
        *("shards.seq_len=64", "finetune.train.global_batch_tokens=512"),
    ),
    "two-sources": (
        *("experiment=text", "sources={a: {kind: files, paths: [TEXTS]}, b: {kind: files, paths: [TEXTS]}}"),
        "mixture.phases=[{weights: {a: 1.0, b: 3.0}}]",
    ),
}
"""Overrides by name; TEXTS, CHATS and WEIGHTS stand for files that are written here or lie beside."""


@cache
def _files() -> dict[str, str]:
    folder = Path(tempfile.mkdtemp())
    texts, chats = folder / "texts", folder / "chats.jsonl"
    texts.mkdir()
    (texts / "a.txt").write_text(TEXT)
    chats.write_text(CHAT)
    return {"TEXTS": str(texts), "CHATS": str(chats), "WEIGHTS": str(WEIGHTS)}


def identities(case: str) -> dict[str, dict[str, Any]]:
    """{step: {digest, and the payload that was hashed}} of a case."""
    files, overrides = _files(), [*CASES[case]]
    if case != "two-sources":
        overrides.append("corpus.paths=[TEXTS]")
    for name, path in files.items():
        overrides = [override.replace(name, path) for override in overrides]
    hashes = FileHashes(Path(tempfile.mkdtemp()) / "hashes.json")
    nodes = resolve(list(build(compose(overrides)).values()), hashes).nodes
    return {node.name: {"digest": node.digest, **json.loads(json.dumps(node.identity))} for node in nodes}


def kept(case: str) -> dict[str, dict[str, Any]]:
    """The identities that are kept."""
    content: dict[str, dict[str, Any]] = json.loads((FOLDER / f"{case}.json").read_text())
    return content


def moved(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Each place where two plain values differ, with both."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from moved(before.get(key, "absent"), after.get(key, "absent"), f"{where}.{key}".lstrip("."))
    elif before != after:
        yield f"{where}: {before!r} -> {after!r}"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        text = json.dumps(identities(case), indent=1, ensure_ascii=False)
        (FOLDER / f"{case}.json").write_text(text + "\n", encoding="utf-8")
