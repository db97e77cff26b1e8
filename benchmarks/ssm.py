"""Claim: our Mamba trains and decodes faster than transformers' with the same weights, and time and memory of state space
and linear attention layers grow linearly with the row.

    python benchmarks/ssm.py [--threads 1] [--rounds 3] [--write]

A training step (loss and gradients) of 2 rows of 128 tokens in fp32, beside MambaForCausalLM without mamba-ssm, which has
no CPU build; rows are short to be fair to it, whose backward pass takes time that grows with their square. Greedy decoding
of 48 tokens behind prompts of 32. The two take turns; figures are medians of processor time, which other work on the
machine disturbs less than the clock. Growth: one row of 1k to 8k tokens, forward and backward of two layers, and the bytes
that its forward pass leaves for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from hardware import machine, write_result

from model.build import build_model
from model.config import ModelConfig
from model.decoding.generate import Sampling, generate
from model.ffns.dense import FfnConfig, NoFfnConfig
from model.init import InitConfig
from model.interop import save_pretrained
from model.masks import Mask
from model.mixers.base import MixerInput
from model.mixers.linear_attention import FavorConfig, LinearAttentionConfig
from model.mixers.mamba import MambaConfig
from model.positions.none import NoPositionConfig

ROWS, TOKENS, PROMPT_TOKENS, NEW_TOKENS = 2, 128, 32, 48
MAMBA = ModelConfig(
    vocab_size=4096,
    d_model=256,
    n_layers=4,
    max_seq_len=16384,
    position=NoPositionConfig(),
    mixer=MambaConfig(),
    ffn=NoFfnConfig(),
    init=InitConfig(std=None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ours = build_model(MAMBA)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours.state_dict(), MAMBA, Path(folder))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = {
        "machine": machine(),
        "threads": arguments.threads,
        "training": training(ours, theirs, arguments.rounds),
        "decoding": [decoding(ours, theirs, rows, arguments.rounds) for rows in (1, 16)],
        "growth": growth(arguments.rounds),
    }
    if arguments.write:
        print(write_result("ssm", result))
    else:
        print(json.dumps(result["machine"]))


def training(ours: torch.nn.Module, theirs: torch.nn.Module, rounds: int) -> dict[str, object]:
    """Milliseconds of a step of both, and how far their losses are apart."""
    tokens = torch.randint(0, 4096, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def our_step() -> float:
        loss = ours(inputs, targets_BT=targets)["loss_sum"] / targets.numel()
        loss.backward()
        return float(loss.detach())

    def their_step() -> float:
        logits = theirs(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        return float(loss.detach())

    medians, losses = turns({"ours": our_step, "transformers": their_step}, rounds)
    ratio, apart = medians["transformers"] / medians["ours"], abs(losses["ours"] - losses["transformers"])
    print(f"training step: {medians['ours']:.0f} ms, transformers {medians['transformers']:.0f}: {ratio:.2f} x")
    return {"rows": ROWS, "tokens": TOKENS, "ms": medians, "ratio": ratio, "losses_apart": apart}


def decoding(ours: torch.nn.Module, theirs: torch.nn.Module, rows: int, rounds: int) -> dict[str, object]:
    """Milliseconds of a step of both, and whether they chose the same tokens."""
    prompts = torch.randint(1, 4096, (rows, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)

    def their_tokens() -> list[list[int]]:
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        whole = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **length)
        return whole[:, PROMPT_TOKENS:].tolist()

    ways = {"ours": lambda: generate(ours, prompts.tolist(), sampling), "transformers": their_tokens}
    medians, tokens = turns(ways, rounds)
    medians = {name: value / NEW_TOKENS for name, value in medians.items()}
    ratio, same = medians["transformers"] / medians["ours"], tokens["ours"] == tokens["transformers"]
    figures = f"{medians['ours']:.2f} ms a step, transformers {medians['transformers']:.2f}"
    print(f"decoding {rows} rows: {figures}: {ratio:.2f} x, same tokens: {same}")
    return {"rows": rows, "ms_per_step": medians, "ratio": ratio, "same_tokens": same}


def growth(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Microseconds and kept bytes for each token of rows of rising length: constant where growth is linear."""
    linear = {"ffn": FfnConfig(d_ff=768), "n_layers": 2}
    kinds = {
        "mamba": {"mixer": MAMBA.mixer, "ffn": MAMBA.ffn, "n_layers": 2},
        "elu + 1": {"mixer": LinearAttentionConfig(n_heads=4), **linear},
        "performer": {"mixer": LinearAttentionConfig(n_heads=4, features=FavorConfig()), **linear},
    }
    found: dict[str, list[dict[str, float]]] = {}
    for name, parts in kinds.items():
        model = build_model(
            ModelConfig(vocab_size=4096, d_model=256, max_seq_len=16384, position=NoPositionConfig(), **parts)
        )
        found[name] = []
        for tokens in (1024, 2048, 4096, 8192):
            batch = torch.zeros(1, tokens, dtype=torch.int64)
            held: dict[int, int] = {}

            def pack(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            def step(model: torch.nn.Module = model, batch: torch.Tensor = batch) -> None:
                model(batch, targets_BT=batch)["loss_sum"].backward()

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model.stack(model.frontend(batch, batch), MixerInput(Mask()))
            held_bytes = sum(held.values()) - sum(p.untyped_storage().nbytes() for p in model.stack.parameters())
            medians, _ = turns({"step": step}, rounds)
            found[name].append(
                {
                    "tokens": tokens,
                    "microseconds_per_token": 1e3 * medians["step"] / tokens,
                    "kept_bytes_per_token": held_bytes / tokens,
                }
            )
            print(name, {key: round(value, 1) for key, value in found[name][-1].items()})
    return found


def turns(ways: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], dict[str, object]]:
    """Median milliseconds of processor time of every way, and what it gave; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, object] = {}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            given[name] = way()
            if round_number:
                times[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in times.items()}, given


if __name__ == "__main__":
    main()
