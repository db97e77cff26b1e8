"""A model of every kind trained by two ranks under each stage that shares, and by plain PyTorch; `test_families.py`
compares losses and gradients.

python -m tests.training.family_ranks FILE
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.adapt import (
    BottleneckConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    attach_bottlenecks,
    attach_lora,
    attach_prefix,
    attach_prompt,
    freeze,
)
from model.architecture import Transformer
from model.build import build_model
from model.config import ModelConfig
from model.ffns.experts.config import BalanceConfig, MoeConfig
from model.frontends.mel import MelFrontendConfig
from model.frontends.patches import PatchFrontendConfig
from model.frontends.waveform import WaveformFrontendConfig
from model.heads.classifiers import ClassifierHeadConfig
from model.heads.ctc import CtcHeadConfig
from model.heads.language import LanguageHeadConfig, NoHeadConfig
from model.mixers.longformer import LongformerConfig
from model.positions.learned import LearnedPositionConfig
from model.positions.none import NoPositionConfig
from model.positions.relative import RelativePositionConfig
from model.positions.sinusoidal import SinusoidalPositionConfig
from tests.model.configurations import BERT, DALLE, HYBRID, LLAMA, MAMBA, PERFORMER, VASWANI
from tests.training.processes import run_ranks

ROWS, STEPS, STAGES = 4, 2, (1, 2, 3)
MASKED = LanguageHeadConfig(bias=True, transform="gelu")
ENCODER = replace(BERT, head=NoHeadConfig(), position=LearnedPositionConfig())
RELATIVE = RelativePositionConfig(buckets=8, max_distance=16)
FAMILIES: dict[str, ModelConfig] = {
    "bert": replace(BERT, head=MASKED),
    "longformer": replace(BERT, head=MASKED, mixer=LongformerConfig(n_heads=4, window=5)),
    "t5": replace(VASWANI, position=RELATIVE, encoder=replace(ENCODER, position=RELATIVE)),
    "vit": replace(
        BERT,
        frontend=PatchFrontendConfig(image_size=8, patch_size=4),
        position=LearnedPositionConfig(),
        head=ClassifierHeadConfig(classes=5),
    ),
    "wav2vec2": replace(
        BERT,
        position=NoPositionConfig(),
        frontend=WaveformFrontendConfig(
            channels=(8, 8), kernels=(10, 3), strides=(5, 2), positional_kernel=8, positional_groups=4
        ),
        head=CtcHeadConfig(),
    ),
    "whisper": replace(
        VASWANI,
        encoder=replace(
            ENCODER, frontend=MelFrontendConfig(bands=6), position=SinusoidalPositionConfig(inclusive=True)
        ),
    ),
    "mamba": MAMBA,
    "performer": PERFORMER,
    "hybrid": HYBRID,
    "experts": replace(LLAMA, ffn=MoeConfig(n_experts=4, top_k=2, d_ff=24, balance=BalanceConfig(loss=0.1))),
    "dalle": DALLE,
}
ATTACHED: dict[str, Callable[[Transformer], object]] = {
    "lora": lambda model: attach_lora(model, LoraConfig(rank=2)),
    "bottlenecks": lambda model: attach_bottlenecks(model, BottleneckConfig(width=4)),
    "prefix": lambda model: attach_prefix(model, PrefixConfig(tokens=3)),
    "prompt": lambda model: attach_prompt(model, PromptConfig(tokens=3)),
    "freeze": lambda model: freeze(model, ["stack.layers.0.*"]),
}
TUNED = [f"{family}+{tuning}" for family in ("t5", "experts") for tuning in ATTACHED]
"""Families that train some of their parameters only, or others than they had."""


def built(name: str) -> Transformer:
    """The family's model, with what stands behind a plus attached."""
    family, _, tuning = name.partition("+")
    model = build_model(FAMILIES[family])
    if tuning:
        ATTACHED[tuning](model)
    return model


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """Whole: `ROWS` rows of whatever the family reads and is to say."""
    name, _, tuning = name.partition("+")
    generator, config = torch.Generator().manual_seed(0), FAMILIES[name]
    tokens = torch.randint(4, config.vocab_size or 5, (ROWS, 26), generator=generator)
    if name == "vit":
        return {"pixels_BAYX": torch.randn(ROWS, 3, 8, 8, generator=generator), "classes_B": tokens[:, 0] % 5}
    if name == "wav2vec2":
        return {"samples_BW": torch.randn(ROWS, 300, generator=generator), "labels_BU": tokens[:, :6]}
    batch = {"tokens_BT": tokens, "targets_BT": tokens.roll(-1, 1)}
    batch["targets_BT"][:, ::4] = -100
    if name == "t5":
        batch |= {"encoder_tokens_BT": tokens.flip(1)}
    if name == "whisper":
        batch |= {"encoder_mels_BAW": torch.randn(ROWS, 6, 30, generator=generator)}
    if tuning == "prompt":  # read where text is read first
        virtual = -1 - torch.arange(3).expand(ROWS, -1)
        if name == "t5":
            batch["encoder_tokens_BT"] = torch.cat([virtual, batch["encoder_tokens_BT"]], dim=1)
        else:
            batch["tokens_BT"] = torch.cat([virtual, tokens], dim=1)
            batch["targets_BT"] = torch.cat([torch.full_like(virtual, -100), batch["targets_BT"]], dim=1)
    if name == "longformer":
        batch |= {"globals_BT": torch.arange(26).expand(ROWS, -1) % 13 == 0}
    return batch


def begun(model: Transformer, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The batch, and for a learned prefix the cache that it stands in."""
    if model.prefix is None:
        return batch
    rows, tokens = batch["tokens_BT"].shape
    return {**batch, "cache": model.new_cache(rows, tokens)}


def count_of(batch: dict[str, torch.Tensor]) -> int:
    """Targets of all rows."""
    targets = next(batch[key] for key in ("targets_BT", "labels_BU", "classes_B") if key in batch)
    return int((targets >= 0).sum())


def trained_alone(name: str) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of every step. The oracle: all rows at once, nothing but PyTorch."""
    from pipelines.training.optim import build_optimizer
    from pipelines.training.settings import AdamWSettings

    model, batch, steps = built(name), batch_of(name), []
    optimizer = build_optimizer(model, AdamWSettings(lr=1e-3))
    for _ in range(STEPS):
        loss = model(**begun(model, batch))["loss_sum"] / count_of(batch)
        loss.backward()
        steps.append((float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))))
        optimizer.step()
        optimizer.zero_grad()
    return steps


def trained_by_two(name: str, stage: int) -> list[tuple[float, float]]:
    """The same, each rank with half of the rows."""
    from conf.typed import from_plain
    from pipelines.training.optim import build_optimizer
    from pipelines.training.ranks import join
    from pipelines.training.settings import AdamWSettings, BatchPlan, TrainSettings
    from pipelines.training.zero import ZeroEngine

    # A bucket smaller than the embedding, so that gradients are reduced in several messages.
    zero = {"stage": stage, "bucket_elements": 2000}
    plain = {"total_tokens": ROWS, "global_batch_tokens": ROWS, "clip_norm": 1.0, "precision": "fp32", "zero": zero}
    settings = from_plain(TrainSettings, plain, "train")
    ranks = join(settings)
    plan = BatchPlan.derive(settings, seq_len=1, world_size=ranks.world_size, largest_rows=ROWS)
    model, batch = built(name), batch_of(name)
    count, half = count_of(batch), ROWS // ranks.world_size
    mine = {key: x[ranks.rank * half : (ranks.rank + 1) * half] for key, x in batch.items()}
    optimizer = build_optimizer(model, AdamWSettings(lr=1e-3))
    engine, steps = ZeroEngine(model, optimizer, settings=settings, plan=plan, ranks=ranks), []
    for _ in range(STEPS):
        loss = engine.forward(begun(model, mine))["loss_sum"] / count
        engine.backward(loss, last=True)
        norm, applied = engine.step()
        assert applied
        steps.append((float(ranks.gather(loss.detach()[None]).sum()), norm))
    engine.close()
    return steps


def ranks_run(file: Path) -> None:
    """One of two ranks, through all families and stages."""
    names = [*FAMILIES, *TUNED]
    shared = {name: {stage: trained_by_two(name, stage) for stage in STAGES} for name in names}
    if os.environ["RANK"] == "0":
        alone = {name: trained_alone(name) for name in names}
        file.write_text(json.dumps({"alone": alone, "shared": shared}))


if __name__ == "__main__":
    run_ranks(ranks_run, 2, Path(sys.argv[1]))
