"""Which held-out documents are scored, and how they are shared out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.refusal import NO_VALUE, Refusal
from data.text.document import Document, read_documents
from pipelines.evaluation.settings import EvaluateSettings

if TYPE_CHECKING:
    from data.rows.instructions import Conversation


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The documents of one corpus that are scored, out of how many that were held out."""

    documents: list[Document]
    available: int

    def card(self) -> dict[str, Any]:
        """What results.json says about the choice."""
        return {
            "available_documents": self.available,
            "scored_documents": len(self.documents),
            "chosen_by": "all" if len(self.documents) == self.available else "order of content hash",
        }


def choose(corpus: Path, settings: EvaluateSettings) -> HeldOut:
    """The held-out documents to score, in the order of their ids.

    An id hashes the text, so a cap takes a fixed part that has nothing to do with where a document stood: the longest
    run of ids whose text fits, one document at least. Raises Refusal when nothing was held out.
    """
    available = sorted(read_documents(corpus / "heldout"), key=lambda document: document.id)
    if not available:
        raise Refusal(
            corpus,
            NO_VALUE,
            "has no held-out documents, so there is nothing to evaluate on",
            "raise corpus.held_out.fraction or give a larger corpus",
        )
    chosen: list[Document] = []
    room = settings.max_bytes if settings.max_bytes is not None else math.inf
    for document in available[: settings.max_documents]:
        room -= len(document.text.encode("utf-8"))
        if chosen and room < 0:
            break
        chosen.append(document)
    return HeldOut(documents=chosen, available=len(available))


def choose_conversations(instructions: Path, settings: EvaluateSettings) -> tuple[list[Conversation], int]:
    """The held-out conversations to score, under the same caps and in the order of their ids; and how many there are."""
    from data.rows.instructions import load_conversations

    available = sorted(load_conversations(instructions / "heldout.jsonl"), key=lambda conversation: conversation.id)
    chosen: list[Conversation] = []
    room = settings.max_bytes if settings.max_bytes is not None else math.inf
    for conversation in available[: settings.max_documents]:
        room -= text_bytes(conversation)
        if chosen and room < 0:
            break
        chosen.append(conversation)
    return chosen, len(available)


def text_bytes(conversation: Conversation) -> int:
    """UTF-8 bytes of a conversation's messages."""
    return sum(len(message["content"].encode("utf-8")) for message in conversation.messages)


def unscored(chosen: Iterable[HeldOut]) -> str:
    """A line on held-out documents that a cap excludes from the scores; empty if there are none."""
    beyond = sum(part.available - len(part.documents) for part in chosen)
    return (
        f"left out {beyond:,}: held-out documents beyond evaluate.max_documents or evaluate.max_bytes" if beyond else ""
    )


def by_id(corpora: Iterable[Path], ids: Sequence[str]) -> list[Document]:
    """Held-out documents of several corpora, in the order of `ids`."""
    wanted = set(ids)
    found = {
        document.id: document
        for corpus in corpora
        for document in read_documents(corpus / "heldout")
        if document.id in wanted
    }
    return [found[identity] for identity in ids]


def group_by_bytes(sizes: Sequence[int], bytes_per_shard: int) -> list[list[int]]:
    """Places of the texts of each shard, by their bytes: one shard per `bytes_per_shard`, filled evenly."""
    groups: list[list[int]] = [[] for _ in range(max(1, min(len(sizes), -(-sum(sizes) // bytes_per_shard))))]
    filled = [0] * len(groups)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        emptiest = min(range(len(groups)), key=lambda group: (filled[group], group))
        groups[emptiest].append(index)
        filled[emptiest] += sizes[index]
    return groups
