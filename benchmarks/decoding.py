"""Claim: greedy decoding is faster than transformers' `generate` with the same weights, and gives the same tokens.

    python benchmarks/decoding.py [--model demo] [--rounds 5] [--write]

The same exported weights, prompts of 32 tokens, 96 new ones, in fp32 and bf16, for one row and for sixteen. The two take
turns; figures are medians of processor time for each step, which other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
import yaml
from hardware import machine, write_result

from model.build import build_model
from model.config import ModelConfig
from model.generate import Sampling, generate
from model.interop import load_pretrained, save_pretrained
from pipelines.engine.typed import from_plain

PROMPT_TOKENS, NEW_TOKENS = 32, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a preset of conf/model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    preset = Path(__file__).parents[1] / "conf" / "model" / f"{arguments.model}.yaml"
    plain = {**yaml.safe_load(preset.read_text()), "vocab_size": 4096}
    config = from_plain(ModelConfig, plain, "model")
    result = {"machine": machine(), "model": plain, "threads": arguments.threads, "decoding": []}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(build_model(config).state_dict(), config, Path(folder))
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 16):
                result["decoding"].append(measure(Path(folder), dtype, rows, arguments.rounds))
    if arguments.write:
        print(write_result("decoding", result))
    else:
        print(json.dumps(result["machine"]))


def measure(folder: Path, dtype: torch.dtype, rows: int, rounds: int) -> dict[str, object]:
    """Milliseconds a step of both, and whether they chose the same tokens."""
    config, state = load_pretrained(folder)
    ours = build_model(config, dtype=dtype)
    ours.load_state_dict(state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, config.require_vocab_size(), (rows, PROMPT_TOKENS), generator=generator)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)

    def their_tokens() -> list[list[int]]:
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        whole = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **length)
        return whole[:, PROMPT_TOKENS:].tolist()

    ways = {"ours": lambda: generate(ours, prompts.tolist(), sampling), "transformers": their_tokens}
    times: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            tokens[name] = way()
            if round_number:
                times[name].append(1e3 * (time.process_time() - started) / NEW_TOKENS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio, same = medians["transformers"] / medians["ours"], tokens["ours"] == tokens["transformers"]
    figures = f"{medians['ours']:.2f} ms a step, transformers {medians['transformers']:.2f}"
    print(f"{dtype}, {rows} rows: {figures}: {ratio:.2f} x, same tokens: {same}")
    return {"dtype": str(dtype), "rows": rows, "ms_per_step": medians, "ratio": ratio, "same_tokens": same}


if __name__ == "__main__":
    main()
