"""Claim: greedy decoding is faster than transformers' `generate` with the same weights, and gives the same tokens.

    python benchmarks/decoding.py [--models demo,small,llama-100m,gpt2-124m] [--threads 1] [--rounds 5] [--write]

The same exported weights, random ones that do not begin as zeros, prompts of 32 tokens, 96 new ones, in fp32 and bf16, for
one row and for sixteen. transformers decodes as it does unasked: dynamic cache, SDPA. Reading the prompts counts, and so
does whatever is laid out anew for decoding. The two take turns; figures are medians of processor time and of the clock,
the former less disturbed by other work on the machine.

The limit stands beside them: a step reads every weight of its products and the cache once (bytes over the memory
bandwidth measured here), and multiplies (FLOPs over the rate of a large product measured here); the greater of the two.
A model that a cache of the processor holds may beat the memory's bandwidth. In fp32 the tokens must be equal. In bf16 the
two round at different places, and after one other choice texts part for good: told are the share of equal tokens, and how
often both choose alike behind the same text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
import yaml
from hardware import machine, matmul_flops, memory_bandwidth, write_result

from conf.typed import from_plain
from model.build import build_model
from model.config import ModelConfig
from model.costs import forward_flops, kv_cache_bytes, parameter_counts
from model.decoding.generate import Sampling, generate
from model.init import InitConfig
from model.interop import load_pretrained, save_pretrained

PROMPT_TOKENS, NEW_TOKENS = 32, 96
MODELS = {
    "demo": ("demo", {"vocab_size": 4096}),
    "small": ("small", {"vocab_size": 8192}),
    "llama-100m": (
        "small",
        {
            "vocab_size": 32000,
            "d_model": 768,
            "n_layers": 12,
            "mixer": {"kind": "attention", "n_heads": 12, "n_kv_heads": 4},
            "ffn": {"kind": "dense", "d_ff": 2048, "activation": "silu", "gated": True},
        },
    ),
    "gpt2-124m": ("gpt2-124m", {"vocab_size": 50257}),
}
"""Models to measure, each a preset of conf/model with changes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="which to measure, by name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rates = {
        "bytes_per_second": memory_bandwidth(),
        **{str(dtype): matmul_flops(dtype) for dtype in (torch.float32, torch.bfloat16)},
    }
    print(", ".join(f"{name}: {rate / 1e9:.1f} G/s" for name, rate in rates.items()))
    result = {"machine": machine(), "threads": arguments.threads, "rates": rates, "decoding": []}
    for name in arguments.models.split(","):
        config = configured(name)
        print(f"{name}: {parameter_counts(config).total / 1e6:.1f} M parameters")
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(build_model(config).state_dict(), config, Path(folder))
            for dtype in (torch.float32, torch.bfloat16):
                for rows in (1, 16):
                    measured = measure(Path(folder), dtype, rows, arguments.rounds, rates)
                    result["decoding"].append({"model": name, **measured})
    if arguments.write:
        print(write_result(f"decoding-{arguments.threads}-threads", result))
    else:
        print(json.dumps(result["machine"]))


def configured(name: str) -> ModelConfig:
    """The model of that name, with weights that make it choose different tokens from the start."""
    preset, changes = MODELS[name]
    plain = yaml.safe_load((Path(__file__).parents[1] / "conf" / "model" / f"{preset}.yaml").read_text())
    config = from_plain(ModelConfig, {**plain, **changes}, "model")
    return replace(config, init=InitConfig(std=None, residual="plain"))


def measure(folder: Path, dtype: torch.dtype, rows: int, rounds: int, rates: dict[str, float]) -> dict[str, object]:
    """Milliseconds a step of both, the limit, and the share of tokens that they chose alike."""
    config, state = load_pretrained(folder)
    ours = build_model(config, dtype=dtype)
    ours.load_state_dict(state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, config.require_vocab_size(), (rows, PROMPT_TOKENS), generator=generator)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
    theirs.generation_config.eos_token_id = None  # neither side stops early, or looks whether it should

    def their_tokens() -> list[list[int]]:
        mask = torch.ones_like(prompts)
        whole = theirs.generate(
            prompts, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
        return whole[:, PROMPT_TOKENS:].tolist()

    ways = {"ours": lambda: generate(ours, prompts.tolist(), sampling), "transformers": their_tokens}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    clock: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            started, started_clock = time.process_time(), time.perf_counter()
            tokens[name] = way()
            if round_number:
                processor[name].append(1e3 * (time.process_time() - started) / NEW_TOKENS)
                clock[name].append(1e3 * (time.perf_counter() - started_clock) / NEW_TOKENS)
    medians = {name: statistics.median(values) for name, values in processor.items()}
    by_clock = {name: statistics.median(values) for name, values in clock.items()}
    ratio, clock_ratio = (m["transformers"] / m["ours"] for m in (medians, by_clock))
    pairs = [
        pair for both in zip(tokens["ours"], tokens["transformers"], strict=True) for pair in zip(*both, strict=True)
    ]
    same = sum(one == other for one, other in pairs) / len(pairs)
    alike = same_choices(ours, theirs, prompts, tokens["transformers"])
    least = limit(config, dtype, rows, rates)
    print(
        f"{dtype}, {rows} rows: "
        f"{by_clock['ours']:.2f} ms a step, transformers {by_clock['transformers']:.2f}, limit {least:.2f}: "
        f"{clock_ratio:.2f} x by the clock, {ratio:.2f} x in processor time, same tokens: {same:.0%}, same "
        f"choices behind the same text: {alike:.1%}",
        flush=True,
    )
    return {
        "dtype": str(dtype),
        "rows": rows,
        "processor_ms_per_step": medians,
        "clock_ms_per_step": by_clock,
        "limit_ms_per_step": least,
        "processor_ratio": ratio,
        "clock_ratio": clock_ratio,
        "same_tokens": same,
        "same_choices": alike,
    }


@torch.inference_mode()
def same_choices(
    ours: torch.nn.Module, theirs: torch.nn.Module, prompts: torch.Tensor, tokens: list[list[int]]
) -> float:
    """Share of the places of transformers' own text where both find the same token likeliest next."""
    whole = torch.cat((prompts, torch.tensor(tokens)), dim=1)
    mine, others = ours(whole)["logits"], theirs(whole, use_cache=False).logits
    return float((mine.argmax(-1) == others.argmax(-1)).float().mean())


def limit(config: ModelConfig, dtype: torch.dtype, rows: int, rates: dict[str, float]) -> float:
    """The least milliseconds of a step half-way: weights and cache read once, or all products at full rate."""
    counts, half_way = parameter_counts(config), PROMPT_TOKENS + NEW_TOKENS // 2
    read = (
        counts.total - counts.embedding + (config.require_vocab_size() * config.d_model if config.tied_weights else 0)
    )
    size = dtype.itemsize
    held_bytes = read * size + kv_cache_bytes(config, rows=rows, tokens=half_way, dtype_bytes=size)
    flops = forward_flops(config, rows=rows, seq_len=1)
    return 1e3 * max(held_bytes / rates["bytes_per_second"], flops / rates[str(dtype)])


if __name__ == "__main__":
    main()
