"""Claim: at real vocabularies a training step makes at least 1.6 x the tokens/s of transformers' Llama compiled (whose loss
is eager), 1.1 x those of a compiled GPT in plain PyTorch, and 40 % of the matmul rate; at 4,096 it is behind neither.

    python benchmarks/train_step.py [--vocabularies 4096 50304 128256] [--rounds 9] [--untied] [--sides ours gpt] [--write]

Six layers of width 384, context 256, 4 rows a step, bf16 autocast, fused AdamW, clipping at 1, equal tying, random tokens.
The GPT has the shape of nanoGPT (learned positions, LayerNorm, GELU, one bias-free product for q, k and v) and is compiled
whole, its loss too. Llama is transformers' own class with its backbone compiled and its own loss function. Ours is what
`pipelines.training.loop` does with a batch: engine, digest, norm, clipping. Parameters beside the vocabulary are equal
within 1 %. All take turns, one step each, in an order that rotates; so does a matrix product of 2,048², whose median rate
is the one that the shares refer to. `ratio` is the median over rounds of one round's times.

Memory is measured by a process for each side: the most that is resident during a step, less what it held before the model
was built, in bytes for each parameter (fp32 weight, gradient and two moments are 16) and as a whole.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import machine, matmul_flops, write_result
from torch import nn
from torch.nn import functional as F

from data.loader import StepBatch
from model.build import build_model
from model.config import ModelConfig
from model.costs import train_flops_per_token
from model.ffns.dense import FfnConfig
from model.mixers.attention import AttentionConfig
from pipelines.training.compile import compile_blocks
from pipelines.training.hardware import keep_freed_memory
from pipelines.training.loop import train_step
from pipelines.training.optim import build_optimizer
from pipelines.training.ranks import join
from pipelines.training.settings import AdamWSettings, BatchPlan, TrainSettings
from pipelines.training.zero import ZeroEngine

LAYERS, WIDTH, HEADS, CONTEXT, ROWS = 6, 384, 6, 256, 4
TOKENS = ROWS * CONTEXT
WARM_UP = 3
Step = Callable[[torch.Tensor, torch.Tensor], float]
"""(tokens, targets), int64 [ROWS, CONTEXT] -> the loss before the update that it makes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 50304, 128256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--untied", action="store_true", help="a head of its own beside the embeddings, on every side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    if arguments.memory_of:
        print(json.dumps(memory(arguments.memory_of, arguments.vocabularies[0], tied=not arguments.untied)))
        return
    keep_freed_memory()
    result = {
        "claim": "at 50,304 >= 1.6 x transformers, >= 1.1 x a compiled GPT, >= 40 % of the matmul rate; ahead at 4,096",
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "step": {"layers": LAYERS, "d_model": WIDTH, "context": CONTEXT, "rows": ROWS, "tied": not arguments.untied},
        "load_before": os.getloadavg()[0],
        "vocabularies": {},
    }
    for vocab_size in arguments.vocabularies:
        figures = measure(vocab_size, arguments.sides, arguments.rounds, tied=not arguments.untied)
        if not arguments.no_memory:
            figures["memory"] = {side: memory_alone(side, vocab_size, arguments.untied) for side in arguments.sides}
        result["vocabularies"][vocab_size] = figures
        print(json.dumps({vocab_size: figures}, indent=1), flush=True)
    result["load_after"] = os.getloadavg()[0]
    if arguments.write:
        print(write_result("train_step" + ("-untied" if arguments.untied else ""), result))
    else:
        print(json.dumps({name: result[name] for name in ("machine", "load_before", "load_after")}))


def measure(vocab_size: int, sides: list[str], rounds: int, *, tied: bool) -> dict[str, Any]:
    """Rates, ratios and shares of the matmul rate, of steps that take turns."""
    steps = {side: SIDES[side](vocab_size, tied) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses, peaks = {}, []
    for turn in range(WARM_UP + rounds):
        tokens, targets = batch(vocab_size, turn)
        if turn >= WARM_UP:
            peaks.append(matmul_flops(torch.bfloat16))
        for side in [*sides[turn % len(sides) :], *sides[: turn % len(sides)]]:
            began = time.perf_counter()
            losses[side] = steps[side](tokens, targets)
            if turn >= WARM_UP:
                seconds[side].append(time.perf_counter() - began)
    flops, peak = train_flops_per_token(ours_config(vocab_size, tied), CONTEXT), statistics.median(peaks)
    rates = {side: TOKENS / statistics.median(times) for side, times in seconds.items()}
    return {
        "tokens_per_second": {side: round(rate) for side, rate in rates.items()},
        "fastest": {side: round(TOKENS / min(times)) for side, times in seconds.items()},
        "ratio_of_ours": {
            side: round(statistics.median(b / a for a, b in zip(seconds["ours"], seconds[side], strict=True)), 3)
            for side in sides
            if side != "ours" and "ours" in sides
        },
        "matmul_gflops": {"median": round(peak / 1e9), "all": [round(each / 1e9) for each in peaks]},
        "share_of_matmul_rate": {side: round(rate * flops / peak, 3) for side, rate in rates.items()},
        "loss": {side: round(loss, 3) for side, loss in losses.items()},
    }


def batch(vocab_size: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    row = torch.randint(0, vocab_size, (ROWS, CONTEXT + 1), generator=generator)
    return row[:, :-1].contiguous(), row[:, 1:].contiguous()


def ours_config(vocab_size: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=WIDTH,
        n_layers=LAYERS,
        max_seq_len=CONTEXT,
        tie_embeddings=tied,
        mixer=AttentionConfig(n_heads=HEADS, n_kv_heads=HEADS),
        ffn=FfnConfig(d_ff=8 * WIDTH // 3),
    )


def ours(vocab_size: int, tied: bool) -> Step:
    settings = TrainSettings(
        total_tokens=10**9,
        global_batch_tokens=TOKENS,
        optim=AdamWSettings(lr=1e-3),
        compile="on",
        micro_batch_rows=ROWS,
    )
    ranks = join(settings)
    model = build_model(ours_config(vocab_size, tied), seed=0).to(ranks.device).train()
    print(compile_blocks(model, settings, ranks.device), file=sys.stderr)
    plan = BatchPlan.derive(settings, seq_len=CONTEXT, world_size=1, largest_rows=ROWS)
    engine = ZeroEngine(model, build_optimizer(model, settings.optim), settings=settings, plan=plan, ranks=ranks)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        micro_batch = {
            "tokens_BT": tokens,
            "targets_BT": targets,
            "documents_BT": torch.ones(ROWS, CONTEXT, dtype=torch.int32),
            "positions_BT": torch.arange(CONTEXT).expand(ROWS, CONTEXT).contiguous(),
        }
        whole = StepBatch(
            micro_batches=[micro_batch],
            row_hashes=np.arange(ROWS, dtype=np.uint64),
            first_row=0,
            rows=ROWS,
            tokens=TOKENS,
            target_count=TOKENS,
        )
        return train_step(engine, whole, ranks).loss

    return step


def plain_step(model: nn.Module, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    """Autocast, backward, clip, AdamW: the loop one writes by hand."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(tokens.to(device), targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpt(vocab_size: int, tied: bool) -> Step:
    torch.manual_seed(0)
    model = Gpt(vocab_size, tied).to(device())
    return plain_step(model, torch.compile(model, dynamic=False))


def llama(vocab_size: int, tied: bool) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=8 * WIDTH // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device()).train()
    model.model.compile(dynamic=False)

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        return loss

    return plain_step(model, loss_of)


SIDES: dict[str, Callable[[int, bool], Step]] = {"ours": ours, "gpt": gpt, "transformers": llama}


class Gpt(nn.Module):
    """A decoder as GPT-2 shaped it, without biases; forward(tokens, targets) is its mean loss."""

    def __init__(self, vocab_size: int, tied: bool) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(GptLayer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class GptLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q, k, v = (
            part.view(rows, tokens, HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).split(width, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


def memory_alone(side: str, vocab_size: int, untied: bool) -> dict[str, float]:
    """`memory` of one side, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", side, "--vocabularies", str(vocab_size)]
    command += ["--untied"] if untied else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def memory(side: str, vocab_size: int, *, tied: bool) -> dict[str, float]:
    """MiB at the height of a step, and per parameter of ours in bytes."""
    from model.costs import parameter_counts

    parameters = parameter_counts(ours_config(vocab_size, tied)).total
    before = resident("VmRSS")
    step = SIDES[side](vocab_size, tied)
    for turn in range(WARM_UP):
        step(*batch(vocab_size, turn))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step(*batch(vocab_size, WARM_UP))
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        compiled = resident("VmRSS")  # with what the compiler holds
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        step(*batch(vocab_size, WARM_UP))
        peak = resident("VmHWM") - min(before, compiled)
    return {"peak_mib": round(peak), "bytes_per_parameter": round(peak * 2**20 / parameters, 1)}


def resident(line: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    entry = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(line))
    return int(entry.split()[1]) / 1024


if __name__ == "__main__":
    main()
