"""Claim: the loader gives at least 20 million tokens per second and core.

    python benchmarks/loader.py [--seq-len 1024] [--seconds 5] [--write]

Every loader reads the same packed rows in one process with one torch thread, and yields int64 tokens and targets in
micro-batches of 8 rows. Ours also makes document numbers and positions, checks sha256, and hashes every row.

    athanor               data.loader.Loader, its thread included
    webdataset            the same tars through webdataset: decode, unbatch, shuffle 2000 rows, batch
    nanogpt               its get_batch: random crops of a memory-mapped stream (no epochs, no documents)
    mosaicml-streaming    the same rows as MDS through StreamingDataset and StreamingDataLoader, if it is installed

CPU seconds are those of the whole process, so a helping thread counts. Best of three runs each, interleaved.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from data.loader import open_loader
from data.order import OrderSettings
from data.rows.packing import TokenDocument, pack_stream
from data.rows.shard_set import ShardSet
from data.rows.shards import ShardSettings, write_manifest, write_shard

MICRO_BATCH_ROWS = 8
VOCAB_SIZE = 32_000


def write_rows(folder: Path, seq_len: int, tokens: int) -> float:
    """Random documents of log-normal length (mean about 1,100 tokens) in four shards; returns tokens per CPU second."""
    rng = np.random.default_rng(0)
    records, seconds, packed = [], 0.0, 0
    for number in range(4):
        documents: list[TokenDocument] = []
        held = 0
        while held < tokens // 4:
            ids = rng.integers(8, VOCAB_SIZE, size=max(1, int(rng.lognormal(6.5, 1.0))), dtype=np.uint16)
            documents.append(TokenDocument(id=f"{number}-{held}", source="random", position=held, tokens=ids))
            held += len(ids)
        began = time.process_time()
        rows = pack_stream(documents, seq_len=seq_len, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)
        records.append(
            write_shard(
                rows,
                documents,
                folder,
                name=f"train-{number:05d}",
                rows_per_block=64,
                vocab_size=VOCAB_SIZE,
                counts=Counter(),
            )
        )
        seconds += time.process_time() - began
        packed += held
    write_manifest(folder, records, settings=ShardSettings(seq_len=seq_len), vocab_size=VOCAB_SIZE)
    return packed / seconds


def athanor(folder: Path, world_size: int = 1) -> Iterator[int]:
    """Tokens per micro-batch, as rank 0 of `world_size`."""
    rows_per_step = world_size * 4 * MICRO_BATCH_ROWS
    with open_loader(
        {"rows": folder},
        rows_per_step=rows_per_step,
        micro_batch_rows=MICRO_BATCH_ROWS,
        world_size=world_size,
        order=OrderSettings(),
    ) as loader:
        for step in loader:
            for micro_batch in step.micro_batches:
                yield micro_batch["tokens_BT"].numel()


def webdataset_rows(folder: Path) -> Iterator[int]:
    """The usual pipeline over the same tars."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def rows(blocks: Iterator[dict[str, Any]]) -> Iterator[torch.Tensor]:
        for block in blocks:
            yield from torch.from_numpy(block["tokens.npy"].astype(np.int64))

    while True:
        dataset = wds.WebDataset(urls, shardshuffle=100, seed=0).decode().compose(rows).shuffle(2000)
        for batch in torch.utils.data.DataLoader(dataset, batch_size=MICRO_BATCH_ROWS):
            tokens_BT, targets_BT = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            assert tokens_BT.shape == targets_BT.shape
            yield tokens_BT.numel()


def nanogpt_crops(folder: Path, seq_len: int) -> Iterator[int]:
    """get_batch as in nanoGPT's train.py, over one flat file of the same tokens."""
    shards = ShardSet.open(folder)
    flat = folder / "flat.bin"
    if not flat.exists():
        shards.gather(range(shards.rows)).tokens_RW[:, :-1].tofile(flat)
    while True:
        data = np.memmap(flat, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - seq_len, (MICRO_BATCH_ROWS,)).tolist()
        tokens_BT = torch.stack([torch.from_numpy(data[i : i + seq_len].astype(np.int64)) for i in starts])
        targets_BT = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
        assert tokens_BT.shape == targets_BT.shape
        yield tokens_BT.numel()


def mosaic_rows(folder: Path) -> Iterator[int]:
    """The same rows in MosaicML's own format. Raises ImportError where it is not installed."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    out = folder / "mds"
    if not out.exists():
        shards = ShardSet.open(folder)
        with MDSWriter(out=str(out), columns={"tokens": f"ndarray:uint16:{shards.seq_len + 1}"}) as writer:
            for tokens_W in shards.gather(range(shards.rows)).tokens_RW:
                writer.write({"tokens": tokens_W})
    clean_stale_shared_memory()  # of the run before
    dataset = StreamingDataset(local=str(out), shuffle=True, batch_size=MICRO_BATCH_ROWS)
    loader = StreamingDataLoader(dataset, batch_size=MICRO_BATCH_ROWS, collate_fn=_stack)
    while True:
        for batch in loader:
            tokens_BT, targets_BT = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            assert tokens_BT.shape == targets_BT.shape
            yield tokens_BT.numel()


def _stack(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def measure(batches: Iterator[int], seconds: float) -> dict[str, float]:
    """Tokens per second of wall time and of CPU time, after a warm-up."""
    for _ in range(50):
        next(batches)
    tokens, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        tokens += next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu}


def run(seq_len: int, seconds: float, tokens: int) -> dict[str, Any]:
    """All loaders over the same rows, interleaved; the best of three each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packed = write_rows(folder, seq_len, tokens)
        loaders: dict[str, Callable[[], Iterator[int]]] = {
            "athanor": lambda: athanor(folder),
            "athanor, rank 0 of 64": lambda: athanor(folder, world_size=64),
            "webdataset": lambda: webdataset_rows(folder),
            "nanogpt": lambda: nanogpt_crops(folder, seq_len),
            "mosaicml-streaming": lambda: mosaic_rows(folder),
        }
        best: dict[str, dict[str, float]] = {}
        for _ in range(3):
            for name, loader in loaders.items():
                try:
                    result = measure(loader(), seconds)
                except ImportError as error:
                    print(f"{name}: left out, {error}")
                    continue
                best[name] = max(best.get(name, result), result, key=lambda r: r["tokens_per_cpu_second"])
    ours = best["athanor"]["tokens_per_cpu_second"]
    return {
        "benchmark": "loader",
        "date": date.today().isoformat(),
        "hardware": f"{_processor()}, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "seq_len": seq_len,
        "micro_batch_rows": MICRO_BATCH_ROWS,
        "packed_and_written_tokens_per_cpu_second": packed,
        "loaders": best,
        "ratio_to_peers": {
            name: ours / result["tokens_per_cpu_second"] for name, result in best.items() if "athanor" not in name
        },
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Print the table; with --write, keep it under benchmarks/results/."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seq-len", type=int, default=1024)
    arguments.add_argument("--seconds", type=float, default=5.0, help="measured per loader and run")
    arguments.add_argument("--tokens", type=int, default=64_000_000, help="tokens in the rows")
    arguments.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = arguments.parse_args()
    result = run(options.seq_len, options.seconds, options.tokens)
    print(f"{'loader':24}{'M tokens/s':>12}{'M tokens/CPU s':>16}")
    for name, numbers in result["loaders"].items():
        print(f"{name:24}{numbers['tokens_per_second'] / 1e6:12.1f}{numbers['tokens_per_cpu_second'] / 1e6:16.1f}")
    if options.write:
        path = Path(__file__).parent / "results" / f"loader-{result['date']}-seq{options.seq_len}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
