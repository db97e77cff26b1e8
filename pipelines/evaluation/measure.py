"""The measurements of the evaluate stage, each one a piece of work that some worker does on its own.

`measure(work, out_dir)` is what the workers run. Torch and lm-evaluation-harness are imported by the piece that needs
them: they cost seconds, and the stage itself is imported by every command that only plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from conf.refusal import Refusal
from data.rows.shard_set import ShardSet
from data.text.document import Document
from data.tokenizers.lost_text import lost_bits
from data.tokenizers.sentencepiece import Tokenizer
from pipelines.engine.step import Artifact, Inputs
from pipelines.evaluation import held_out
from pipelines.evaluation.baselines import COMPRESSORS, token_counts, unigram_nats
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.inference.generator import TextGenerator

if TYPE_CHECKING:
    from model.architecture import Transformer

BASE, FINETUNED = "base", "finetuned"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One piece: what to measure, with which artifacts, on which held-out documents or conversations (ids, in order)."""

    kind: Literal["score", "conversations", "tasks", "samples", "baselines"]
    settings: EvaluateSettings
    tokenizer: Artifact
    model: Artifact | None = None
    corpora: tuple[Artifact, ...] = ()
    shards: tuple[Artifact, ...] = ()
    instructions: Artifact | None = None
    ids: tuple[str, ...] = ()
    trained_tokens: int | None = None
    """Longest row the models were trained on, where that is known: further apart they have seen no two tokens."""
    folder: str = "."
    """Where under the stage's output this piece writes files, if it does."""


def plan_work(
    settings: EvaluateSettings,
    inputs: Inputs,
    ids: Sequence[str],
    groups: Sequence[Sequence[int]],
    conversation_groups: Sequence[Sequence[str]],
) -> dict[str, Work]:
    """Every piece of work by shard name, the long ones first, so that the last to finish is a short one.

    `groups`: places in `ids` of the documents that are scored together; `conversation_groups`: ids of conversations.
    """
    shards = tuple(inputs["rows"].values())
    baselines = Work(
        kind="baselines",
        settings=settings,
        tokenizer=inputs.one("tokenizer"),
        corpora=tuple(inputs["corpus"].values()),
        shards=shards,
        ids=tuple(ids),
        trained_tokens=max((ShardSet.open(artifact.path).seq_len for artifact in shards), default=None),
    )
    work: dict[str, Work] = {}
    for name, model in inputs["model"].items():
        of_model = replace(baselines, model=model, shards=())
        if settings.tasks:
            work[f"tasks-{name}"] = replace(of_model, kind="tasks", folder=f"tasks/{name}")
        for number, group in enumerate(groups):
            scored = tuple(ids[place] for place in group)
            work[f"score-{name}-{number:03d}"] = replace(of_model, kind="score", ids=scored)
        for number, chats in enumerate(conversation_groups):
            work[f"conversations-{name}-{number:03d}"] = replace(
                of_model, kind="conversations", instructions=inputs.one("conversations"), ids=tuple(chats)
            )
    for name, model in inputs["model"].items():
        work[f"samples-{name}"] = replace(baselines, kind="samples", model=model, shards=(), ids=())
    return work | ({"baselines": baselines} if ids else {})


def measure(work: Work, out_dir: Path) -> dict[str, Any]:
    """Do one piece of work; the result is JSON-able."""
    pieces = {
        "score": score,
        "conversations": conversations,
        "tasks": tasks,
        "samples": samples,
        "baselines": baselines,
    }
    return pieces[work.kind](work, out_dir)


def score(work: Work, out_dir: Path) -> dict[str, Any]:
    """Nats and tokens of each document under one model, and the windows they were taken over."""
    tokenizer = Tokenizer.load(work.tokenizer.path)
    return _scores(work, [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(_texts(work))])


def conversations(work: Work, out_dir: Path) -> dict[str, Any]:
    """Nats and tokens of the assistant's answers in each conversation under one model: the targets of fine-tuning.

    A conversation that the chat template refuses has no tokens; `refused` says the first such, and why.
    """
    from data.rows.instructions import load_conversations
    from data.tokenizers.chat import encode_chat

    assert work.instructions is not None
    tokenizer = Tokenizer.load(work.tokenizer.path)
    there = {c.id: c for c in load_conversations(work.instructions.path / "heldout.jsonl")}
    encoded: list[tuple[list[int], list[bool]]] = []
    refused = ""
    for conversation in (there[identity] for identity in work.ids):
        try:
            encoded.append(encode_chat(tokenizer, conversation.messages))
        except Refusal as refusal:
            refused = refused or f"{conversation.source} at {conversation.position}: {refusal}"
            encoded.append(([], []))
    ids, targets = [ids for ids, _ in encoded], [is_target for _, is_target in encoded]
    return {**_scores(work, ids, targets), "refused": refused}


def _scores(
    work: Work, sequences: Sequence[Sequence[int]], targets: Sequence[Sequence[bool]] | None = None
) -> dict[str, Any]:
    from pipelines.evaluation.scoring import score_sequences

    model = _model(work)
    context_tokens, stride_tokens = work.settings.windows(model.config.max_seq_len, work.trained_tokens)
    scores = score_sequences(
        model,
        sequences,
        targets=targets,
        context_tokens=context_tokens,
        stride_tokens=stride_tokens,
        tokens_per_batch=work.settings.tokens_per_batch,
    )
    return {
        "nats": [score.nats for score in scores],
        "tokens": [score.tokens for score in scores],
        "windows": {"context_tokens": context_tokens, "stride_tokens": stride_tokens},
    }


def baselines(work: Work, out_dir: Path) -> dict[str, Any]:
    """Compressed bytes per document, and nats per document under unigram models over the same tokens."""
    texts, tokenizer = _texts(work), Tokenizer.load(work.tokenizer.path)
    documents = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    encoded = [text.encode("utf-8") for text in texts]
    own = token_counts(documents, tokenizer.vocab_size)
    result: dict[str, Any] = {
        "compressed_bytes": {name: [COMPRESSORS[name](text) for text in encoded] for name in work.settings.compressors},
        "nats": {"self_unigram": unigram_nats(own, documents, added=0)},
        "training_tokens": 0,
        "lost_bits": [0] * len(texts),
    }
    if not tokenizer.keeps_text:
        result["lost_bits"] = [
            lost_bits(text, tokenizer.decode(ids)) for text, ids in zip(texts, documents, strict=True)
        ]
    if work.shards:
        counts = np.sum([ShardSet.open(artifact.path).target_counts() for artifact in work.shards], axis=0)
        result["nats"]["unigram"] = unigram_nats(counts, documents, added=1)
        result["training_tokens"] = int(counts.sum())
    return result


def tasks(work: Work, out_dir: Path) -> dict[str, Any]:
    """Harness tasks on one model; each example with its answers goes to tasks/."""
    from pipelines.evaluation.harness import HarnessModel
    from pipelines.evaluation.harness_tasks import run_tasks

    model, tokenizer = _model(work), Tokenizer.load(work.tokenizer.path)
    context_tokens, _ = work.settings.windows(model.config.max_seq_len, work.trained_tokens)
    harness = HarnessModel(model, tokenizer, max_length=context_tokens, tokens_per_batch=work.settings.tokens_per_batch)
    return {"tasks": run_tasks(harness, _documents(work), work.settings, out_dir / work.folder)}


def samples(work: Work, out_dir: Path) -> dict[str, Any]:
    """Completions of the fixed prompts and questions by one model, each from its own seed."""
    chosen = work.settings.samples
    generator = TextGenerator(_model(work), Tokenizer.load(work.tokenizer.path))
    asked = [(prompt, False) for prompt in chosen.prompts] + [(question, True) for question in chosen.questions]
    written = []
    for prompt, chat in asked:
        completion = generator.generate(prompt, chosen.generation, chat=chat)
        written.append({"prompt": prompt, "chat": chat, "text": completion.text, "finish": completion.finish})
    return {"samples": written}


def _model(work: Work) -> Transformer:
    """The model of this piece, on a GPU where the pieces are given one."""
    from pipelines.inference.weights import load_model

    assert work.model is not None
    device = "cuda" if work.settings.gpus_per_task else "cpu"
    return load_model(work.model.path / "model", precision=work.settings.precision, device=device)


def _documents(work: Work) -> list[Document]:
    """The documents of this piece, in the order of its ids."""
    return held_out.by_id([corpus.path for corpus in work.corpora], work.ids)


def _texts(work: Work) -> list[str]:
    return [document.text for document in _documents(work)]
