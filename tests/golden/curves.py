"""Loss curves of twenty steps, from text to loss as training goes, but for DeepSpeed: one thread, fp32.

python -m tests.golden.curves        # writes them anew, after a change that is meant to move them
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batch import collate
from data.rows.packing import PackedRows, TokenDocument, pack_stream
from data.tasks.denoising import AnyObjective, SpanDenoising
from data.tasks.objectives import NextToken
from model.build import build_model
from model.config import ModelConfig
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import BalanceConfig, MoeConfig
from model.heads.language import LanguageHeadConfig, NoHeadConfig
from model.init import InitConfig
from model.mixers.attention import AttentionConfig
from model.norms.norm import NormConfig
from model.positions.relative import RelativePositionConfig
from pipelines.training.optim import build_optimizer, learning_rate_scale, set_learning_rates
from pipelines.training.settings import AdamWSettings, ScheduleSettings

FOLDER = Path(__file__).parent
SEQ_LEN, VOCAB_SIZE, ROWS, STEPS = 48, 128, 4, 20
SENTINELS = 20  # the last ids of the vocabulary

LLAMA = ModelConfig(
    vocab_size=VOCAB_SIZE,
    d_model=32,
    n_layers=2,
    max_seq_len=SEQ_LEN,
    mixer=AttentionConfig(n_heads=4, n_kv_heads=2),
    ffn=FfnConfig(d_ff=64),
)
T5_SIDE = ModelConfig(
    vocab_size=VOCAB_SIZE,
    d_model=32,
    n_layers=2,
    max_seq_len=2 * SEQ_LEN,
    position=RelativePositionConfig(buckets=8, max_distance=32),
    norm=NormConfig(eps=1e-6),
    mixer=AttentionConfig(n_heads=4, scaled=False),
    ffn=MoeConfig(n_experts=4, top_k=2, d_ff=32, activation="relu", gated=False, balance=BalanceConfig(loss=0.02)),
    init=InitConfig(std=None, embedding_std=1.0),
)
T5_MOE = replace(
    T5_SIDE,
    head=LanguageHeadConfig(scale_input=True),
    tie_embeddings=True,
    encoder=replace(T5_SIDE, causal=False, head=NoHeadConfig()),
)
SPANS = SpanDenoising(sentinel_id=VOCAB_SIZE - 1, start_id=0, end_id=3)
MODELS: dict[str, tuple[ModelConfig, AnyObjective]] = {"llama": (LLAMA, NextToken()), "t5-moe": (T5_MOE, SPANS)}


def packed() -> PackedRows:
    """Documents in which each token is followed by one of two others, packed. `random()` is the same in every Python."""
    draw = random.Random(0).random
    first, documents = 8, []
    size = VOCAB_SIZE - SENTINELS - first
    for number in range(100):
        tokens = [first + int(draw() * size)]
        for _ in range(4 + int(draw() * 90)):
            tokens.append(first + (tokens[-1] * 7 + int(draw() * 2)) % size)
        documents.append(TokenDocument(id=str(number), source="made", position=number, tokens=np.array(tokens)))
    return pack_stream(documents, seq_len=SEQ_LEN, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)


def curve(
    config: ModelConfig, objective: AnyObjective, *, dtype: torch.dtype = torch.float32, **optim: Any
) -> list[float]:
    """The loss per target of each step; `optim` are AdamW's settings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(_steps(config, objective, dtype, AdamWSettings(**{"lr": 3e-3, **optim})))
    finally:
        torch.set_num_threads(before)


def _steps(config: ModelConfig, objective: AnyObjective, dtype: torch.dtype, optim: AdamWSettings) -> Any:
    model = build_model(config, seed=1).to(dtype).train()
    optimizer, schedule = build_optimizer(model, optim), ScheduleSettings(warmup_fraction=0.1)
    rows = packed()
    for step in range(STEPS):
        first, end = step * ROWS, (step + 1) * ROWS
        batch = collate(objective(rows.slice(first, end), np.arange(first, end)))
        set_learning_rates(optimizer, learning_rate_scale(schedule, step=step, total_steps=STEPS))
        out = model(**batch)
        loss = out["loss_sum"] / out["target_count"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def golden(name: str) -> list[float]:
    """The curve that is kept."""
    losses: list[float] = json.loads((FOLDER / f"{name}.json").read_text())["loss"]
    return losses


if __name__ == "__main__":
    for name, (config, objective) in MODELS.items():
        text = json.dumps({"torch": torch.__version__, "loss": curve(config, objective)}, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")
