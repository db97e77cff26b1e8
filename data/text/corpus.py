"""The corpus from files to clean documents: read shards, decide globally what stays, write train/ and heldout/.

    build_corpus(settings, out_dir, map_shards)
        read    per shard   files -> documents that pass the filters, with MinHash signatures
        select  once        ids and signatures -> one verdict per document: train, held out, or why it goes
        write   per shard   documents + verdicts -> train/NNNNN.parquet, heldout/NNNNN.parquet

Every function of a shard is pure: its output depends on its payload alone, so shards may run anywhere, in any order,
twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from conf.refusal import Refusal, refuse_below
from data.text.decontaminate import HeldOutIndex, HeldOutSettings, is_held_out
from data.text.dedup import DedupSettings, MinHash, duplicates_to_drop, near_duplicate_pairs
from data.text.document import Document, DocumentWriter, read_documents
from data.text.filters import FilterSettings, filter_document
from data.text.left_out import EXCLUDED, left_out, nothing_left
from data.text.readers import MIN_CUT_CHARACTERS, ReaderSettings, ReadLog, exclude_files, read_file
from data.text.sources import SourceFile, list_files, python_library_files

MAX_SHARDS = 4096

# One verdict per document, in this order of precedence. Stored as uint8, so new ones go at the end.
VERDICTS = ("train", "held_out", "exact_duplicate", "near_duplicate", "near_duplicate_of_held_out")
TRAIN, HELD_OUT, EXACT, NEAR, NEAR_HELD_OUT = range(5)

MapShards = Callable[..., dict[str, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """A corpus: which files, how they are read, and what is kept."""

    kind: Literal["files", "python-library"] = "files"
    """files: the user's `paths`. python-library: sources and language reference of the Python that runs this."""
    paths: tuple[str, ...] = field(default=(), metadata={"execution": True, "path": True})
    """Folders, files or globs. Their contents and names make the corpus, not where they lie."""
    exclude: tuple[str, ...] = ()
    """Globs over the recorded names (as in python-library/encodings/cp*.py); `*` also crosses folders."""
    shard_bytes: int = 4 << 20
    """Files are read in shards of about this many bytes as they lie on disk; a file is never split over shards."""
    reader: ReaderSettings = field(default_factory=ReaderSettings)
    """How files become documents."""
    filters: FilterSettings = field(default_factory=FilterSettings)
    """Which documents are too poor to keep."""
    dedup: DedupSettings = field(default_factory=DedupSettings)
    """Which documents count as copies."""
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    """Which documents are kept for evaluation."""

    def __post_init__(self) -> None:
        refuse_below(self, 1, "shard_bytes")


def corpus_files(
    settings: CorpusSettings,
    skipped: Counter[str] | None = None,
    *,
    key: str = "corpus",
    on_progress: Callable[[int], None] = lambda files: None,
) -> list[SourceFile]:
    """Return the files of a corpus in name order; `skipped` and `on_progress` as in `list_files`.

    Raises Refusal, which calls the settings `key`, when there are none.
    """
    if settings.kind == "python-library":
        found = python_library_files()
    else:
        found = list_files(settings.paths, skipped, key=f"{key}.paths", on_progress=on_progress)
    files = exclude_files(found, settings.exclude)
    if skipped is not None:
        skipped[EXCLUDED] += len(found) - len(files)
    if not files:
        raise Refusal(
            f"{key}.exclude", list(settings.exclude), f"leaves none of the {len(found)} files", "exclude less"
        )
    return files


def plan_shards(files: Sequence[SourceFile], shard_bytes: int) -> list[tuple[SourceFile, ...]]:
    """Group files, in order, into shards of about `shard_bytes`, at most MAX_SHARDS. Depends on the files alone."""
    limit = max(shard_bytes, -(-sum(file.bytes for file in files) // MAX_SHARDS))
    shards: list[list[SourceFile]] = []
    size = 0
    for file in files:
        if not shards or size + file.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(file)
        size += file.bytes
    return [tuple(shard) for shard in shards]


def build_corpus(settings: CorpusSettings, out_dir: Path, map_shards: MapShards, *, scratch: Path) -> dict[str, Any]:
    """Make the whole corpus under `out_dir` (train/, heldout/, card.json) and return the card.

    `map_shards(fn, payloads, label=..., scratch=False)` runs `fn(payload, folder)` per shard and leaves the files that
    fn wrote in `out_dir`, or, when told scratch=True, in `scratch`: what only the next stage needs. Raises Refusal
    for an empty corpus.
    """
    skipped: Counter[str] = Counter()
    files = corpus_files(settings, skipped)
    shards = plan_shards(files, settings.shard_bytes)
    names = [f"{number:05d}" for number in range(len(shards))]
    read = map_shards(
        read_shard,
        {name: ReadTask(name=name, files=files, settings=settings) for name, files in zip(names, shards, strict=True)},
        label="read",
        scratch=True,
    )
    work = str(scratch / "work")
    chosen = map_shards(
        select, {"all": SelectTask(work=work, names=tuple(names), settings=settings)}, label="select", scratch=True
    )["all"]
    if not (chosen["train"] and chosen["held_out"]):
        dropped = {"dropped": {name: count for name, count in chosen.items() if count and name not in VERDICTS[:2]}}
        raise _nothing_left(_card(settings, read, {"all": {"kept": {}, **dropped}}, skipped), chosen, files)
    write = map_shards(
        write_shard, {name: WriteTask(name=name, work=work, settings=settings) for name in names}, label="write"
    )
    card = _card(settings, read, write, skipped)
    if card["train_documents"] == 0:
        raise _nothing_left(card, {**chosen, "train": 0}, files)
    card["left_out"] = left_out(card)
    (out_dir / "card.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return card


def in_process(out_dir: Path, scratch: Path) -> MapShards:
    """Return a `map_shards` that runs one shard after the other here: for tests, benchmarks and small corpora."""
    folders = {False: out_dir, True: scratch}

    def map_shards(
        fn: Callable[[Any, Path], dict[str, Any]],
        payloads: Mapping[str, Any],
        *,
        label: str,
        scratch: bool = False,
    ) -> dict[str, dict[str, Any]]:
        return {name: fn(payload, folders[scratch]) for name, payload in payloads.items()}

    return map_shards


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """Payload of `read_shard`."""

    name: str
    files: tuple[SourceFile, ...]
    settings: CorpusSettings


def read_shard(task: ReadTask, out_dir: Path) -> dict[str, Any]:
    """Read and filter one shard's files into work/read-NAME.parquet and, beside it, their signatures.

    Returns counts: files, documents and bytes read, dropped by reason, and the first malformed places.
    """
    settings = task.settings
    log, dropped = ReadLog.new(), Counter[str]()
    min_hash = MinHash(settings.dedup) if settings.dedup.near_duplicates else None
    signatures = []
    documents = text_bytes = 0
    work = out_dir / "work"
    with DocumentWriter(work / f"read-{task.name}.parquet") as writer:
        for file in task.files:
            for document in read_file(file, settings.reader, log):
                documents += 1
                text_bytes += len(document.text.encode("utf-8"))
                kept, reason = filter_document(document, settings.filters)
                if kept is None:
                    dropped[str(reason)] += 1
                    continue
                writer.write(kept)
                if min_hash is not None:
                    signatures.append(min_hash.signature(kept.text))
    width = settings.dedup.permutations
    table = np.stack(signatures) if signatures else np.zeros((0, width), np.uint32)
    np.save(work / f"signatures-{task.name}.npy", table)
    return {
        "documents_read": documents,
        "bytes_read": text_bytes,
        "dropped": dict(sorted(dropped.items())),
        "counts": {key: count for key, count in sorted(log.counts.items()) if count},
        "malformed": log.malformed,
    }


@dataclass(frozen=True, kw_only=True)
class SelectTask:
    """Payload of `select`."""

    work: str
    names: tuple[str, ...]
    settings: CorpusSettings


def select(task: SelectTask, out_dir: Path) -> dict[str, Any]:
    """Give every document its verdict, from ids and signatures alone, and index the held-out text.

    Writes work/verdicts-NAME.npy (uint8 per document, an index into VERDICTS) and work/held-out.npy. Returns how many
    documents got each verdict.
    """
    work, settings = Path(task.work), task.settings
    ids_by_shard = [
        pq.read_table(work / f"read-{name}.parquet", columns=["id"])["id"].to_pylist() for name in task.names
    ]
    verdicts = split_and_deduplicate(
        [identity for ids in ids_by_shard for identity in ids],
        [np.load(work / f"signatures-{name}.npy", mmap_mode="r") for name in task.names],
        settings,
    )
    out = out_dir / "work"
    out.mkdir(parents=True, exist_ok=True)
    start = 0
    for name, ids in zip(task.names, ids_by_shard, strict=True):
        np.save(out / f"verdicts-{name}.npy", verdicts[start : start + len(ids)])
        start += len(ids)
    index = HeldOutIndex.build(_held_out_documents(work, out, task.names), settings.held_out)
    np.save(out / "held-out.npy", index.to_array())
    return {name: int(np.count_nonzero(verdicts == code)) for code, name in enumerate(VERDICTS)}


def split_and_deduplicate(
    ids: Sequence[str], signatures: Sequence[NDArray[np.uint32]], settings: CorpusSettings
) -> NDArray[np.uint8]:
    """Return one verdict per document. Of copies the first stays; held-out documents stand before training documents.

    Near-duplicates within the held-out set are dropped as well: they would count one text twice in its score.
    """
    verdicts = np.zeros(len(ids), np.uint8)
    seen: set[str] = set()
    for number, identity in enumerate(ids):
        if identity in seen:
            verdicts[number] = EXACT
        seen.add(identity)
    kept = np.flatnonzero(verdicts != EXACT).tolist()
    held_out = [number for number in kept if is_held_out(ids[number], settings.held_out.fraction)]
    wanted = min(settings.held_out.min_documents, max(1, len(kept) // 5))
    if len(held_out) < wanted:
        held_out = sorted(kept, key=lambda number: ids[number])[:wanted]
    verdicts[held_out] = HELD_OUT
    if settings.dedup.near_duplicates:
        pairs = near_duplicate_pairs(signatures, settings.dedup)
        pairs = pairs[(verdicts[pairs] != EXACT).all(axis=1)]
        rank = np.arange(len(ids)) + np.where(verdicts == HELD_OUT, 0, len(ids))
        for copy, original in duplicates_to_drop(pairs, rank).items():
            verdicts[copy] = NEAR_HELD_OUT if verdicts[original] == HELD_OUT and verdicts[copy] == TRAIN else NEAR
    return verdicts


def _nothing_left(card: Mapping[str, Any], chosen: Mapping[str, int], files: Sequence[SourceFile]) -> Refusal:
    cuttable = any(file.format == "text" and file.bytes > MIN_CUT_CHARACTERS for file in files)
    return nothing_left(card, train=chosen["train"], held_out=chosen["held_out"], cuttable=cuttable)


def _held_out_documents(work: Path, verdict_dir: Path, names: Sequence[str]) -> Iterator[Document]:
    for name in names:
        verdicts = np.load(verdict_dir / f"verdicts-{name}.npy")
        if (verdicts == HELD_OUT).any():
            for document, verdict in zip(read_documents(work / f"read-{name}.parquet"), verdicts, strict=True):
                if verdict == HELD_OUT:
                    yield document


@dataclass(frozen=True, kw_only=True)
class WriteTask:
    """Payload of `write_shard`."""

    name: str
    work: str
    settings: CorpusSettings


def write_shard(task: WriteTask, out_dir: Path) -> dict[str, Any]:
    """Write one shard's part of train/ and heldout/, leaving out training documents too close to held-out ones.

    Returns documents and bytes per split, and dropped by reason. A split without documents in this shard gets no file.
    """
    work = Path(task.work)
    index = HeldOutIndex.from_array(np.load(work / "held-out.npy"), task.settings.held_out)
    verdicts = np.load(work / f"verdicts-{task.name}.npy")
    dropped, kept = Counter[str](), Counter[str]()
    writers: dict[str, DocumentWriter] = {}
    for document, verdict in zip(read_documents(work / f"read-{task.name}.parquet"), verdicts, strict=True):
        if verdict > HELD_OUT:
            dropped[VERDICTS[verdict]] += 1
            continue
        split = "heldout" if verdict == HELD_OUT else "train"
        reason = index.contaminates(document.text) if verdict == TRAIN else None
        if reason is not None:
            dropped[reason] += 1
            continue
        if split not in writers:
            writers[split] = DocumentWriter(out_dir / split / f"{task.name}.parquet")
        writers[split].write(document)
        kept[f"{split}_documents"] += 1
        kept[f"{split}_bytes"] += len(document.text.encode("utf-8"))
    for writer in writers.values():
        writer.close()
    return {"kept": dict(sorted(kept.items())), "dropped": dict(sorted(dropped.items()))}


def _card(
    settings: CorpusSettings,
    read: Mapping[str, dict[str, Any]],
    write: Mapping[str, dict[str, Any]],
    skipped: Counter[str],
) -> dict[str, Any]:
    """What a person wants to know about the corpus: counts in, counts out, and where every missing document went."""
    dropped, counts, kept = Counter[str](), Counter[str](), Counter[str]()
    for result in read.values():
        dropped.update(result["dropped"])
        counts.update(result["counts"])
    for result in write.values():
        dropped.update(result["dropped"])
        kept.update(result["kept"])
    recorded = asdict(settings)
    del recorded["paths"]
    return {
        "settings": recorded,
        "files": counts.pop("files", 0),
        "documents_read": sum(result["documents_read"] for result in read.values()),
        "bytes_read": sum(result["bytes_read"] for result in read.values()),
        **{key: kept[key] for key in ("train_documents", "train_bytes", "heldout_documents", "heldout_bytes")},
        "dropped_documents": sum(dropped.values()),
        "dropped": dict(sorted(dropped.items())),
        "repaired": dict(sorted(counts.items())),
        "skipped_files": dict(sorted(skipped.items())),
        "malformed": [place for result in read.values() for place in result["malformed"]][
            : ReadLog.MAX_MALFORMED_SHOWN
        ],
    }
