"""Claim: deduplication runs at least ten times faster per core than datatrove's MinHash on the same text.

    python benchmarks/corpus.py [PATH ...] [--datatrove PYTHON] [--write]

One process, one thread, MB of UTF-8 text per second of CPU time, best of three. Without PATH: this Python's own
library. `--datatrove` names the Python of an environment with datatrove, spacy and nltk, kept apart from this one; it
runs, over the same documents from one jsonl, its Gopher repetition and quality filters and its four MinHash stages
(5-word shingles, its default 14 bands of 8). Only MinHash compares like with like, and there ours also checks each
candidate; the filters differ (datatrove's split words with spaCy and look at more statistics), so their ratio is not
given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hardware import machine, write_result

from data.text.corpus import CorpusSettings, build_corpus, in_process
from data.text.dedup import DedupSettings, MinHash, near_duplicate_pairs
from data.text.document import read_documents
from data.text.filters import FilterSettings, filter_document
from data.text.readers import ReaderSettings
from data.tokenizers.sentencepiece import Tokenizer
from data.tokenizers.training import TokenizerSettings, train_tokenizer

DATATROVE = """
import json, sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster
from datatrove.pipeline.dedup import MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig

source, work = sys.argv[1:]
config = MinhashConfig(hash_config=HashConfig(precision=64), n_grams=5)

def run(name, tasks, *steps):
    began = time.process_time()
    LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, logging_dir=f"{work}/logs-{name}").run()
    return time.process_time() - began

signatures, buckets, removed = (f"{work}/{name}" for name in ("signatures", "buckets", "removed"))
seconds = {"filter": run("filter", 1, JsonlReader(source), GopherRepetitionFilter(), GopherQualityFilter())}
seconds["minhash"] = run("signatures", 1, JsonlReader(source), MinhashDedupSignature(signatures, config))
seconds["minhash"] += run("buckets", config.num_buckets, MinhashDedupBuckets(signatures, buckets, config=config))
seconds["minhash"] += run("cluster", 1, MinhashDedupCluster(buckets, removed, config=config))
output = JsonlWriter(f"{work}/kept", compression=None)
seconds["minhash"] += run("write", 1, JsonlReader(source), MinhashDedupFilter(removed), output)
print(json.dumps(seconds))
"""


def best(run: Callable[[], Any], repeat: int = 3) -> float:
    """Least CPU time of several runs."""
    seconds = []
    for _ in range(repeat):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


def ours(settings: CorpusSettings, work: Path) -> tuple[dict[str, float], float, Path]:
    """(seconds by part, megabytes of text, a jsonl of all documents before anything was dropped)."""
    seconds: dict[str, float] = {}

    def whole() -> None:
        for folder in (work / "out", work / "scratch"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        inner = in_process(work / "out", work / "scratch")

        def timed(fn: Any, payloads: Mapping[str, Any], *, label: str, scratch: bool = False) -> Any:
            began = time.process_time()
            result = inner(fn, payloads, label=label, scratch=scratch)
            seconds[label] = min(seconds.get(label, 1e9), time.process_time() - began)
            return result

        build_corpus(settings, work / "out", timed, scratch=work / "scratch")

    seconds["corpus step"] = best(whole)
    documents = [d for file in sorted((work / "scratch/work").glob("read-*.parquet")) for d in read_documents(file)]
    megabytes = sum(len(d.text.encode()) for d in documents) / 1e6

    def minhash() -> None:
        signer = MinHash(DedupSettings())
        near_duplicate_pairs([np.stack([signer.signature(d.text) for d in documents])], DedupSettings())

    seconds["filter"] = best(lambda: [filter_document(d, FilterSettings()) for d in documents])
    seconds["minhash"] = best(minhash)
    texts = [d.text for d in read_documents(work / "out/train")]
    seconds["tokenizer training"] = best(lambda: train_tokenizer(texts, TokenizerSettings(), work / "tokenizer"), 1)
    tokenizer = Tokenizer.load(work / "tokenizer")
    seconds["tokenizer encoding"] = best(lambda: tokenizer.encode_batch(texts), 2)
    lines = work / "jsonl/documents.jsonl"
    lines.parent.mkdir()
    lines.write_text("".join(json.dumps({"text": d.text, "id": d.id}) + "\n" for d in documents), encoding="utf-8")
    return seconds, megabytes, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--datatrove", metavar="PYTHON")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    settings = (
        CorpusSettings(paths=tuple(options.paths))
        if options.paths
        else CorpusSettings(kind="python-library", reader=ReaderSettings(max_document_characters=None))
    )
    with tempfile.TemporaryDirectory() as folder:
        seconds, megabytes, lines = ours(settings, Path(folder))
        result: dict[str, Any] = {
            **machine(),
            "megabytes": round(megabytes, 2),
            "athanor_mb_per_second": {part: round(megabytes / s, 2) for part, s in seconds.items()},
        }
        if options.datatrove:
            command = [options.datatrove, "-c", DATATROVE, str(lines.parent), f"{folder}/datatrove"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peer = json.loads(output.strip().splitlines()[-1])
            result["datatrove_mb_per_second"] = {part: round(megabytes / s, 2) for part, s in peer.items()}
            result["minhash_times_faster"] = round(peer["minhash"] / seconds["minhash"], 1)
    print(json.dumps(result, indent=1))
    if options.write:
        write_result("corpus", result)


if __name__ == "__main__":
    main()
