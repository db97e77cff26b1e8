"""`auto` learning rates are numbers by the model's kind and width, and every preset that text can train learns with them."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.typed import from_plain
from model.build import build_model
from model.config import ModelConfig
from model.init import InitConfig
from pipelines.settings.compose import compose
from pipelines.settings.overrides import options
from pipelines.training.health import Health
from pipelines.training.optim import build_optimizer, learning_rate_scale, set_learning_rates
from pipelines.training.rates import AGAIN, derived
from pipelines.training.settings import AdamWSettings, MuonSettings, OptimSettings, ScheduleSettings
from tests.conftest import ROOT
from tests.model.configurations import preset_values
from tests.model.small_presets import tiny

ADAMW = AdamWSettings(lr="auto", weight_decay=0.0)
MUON = MuonSettings(
    lr="auto", embedding_lr="auto", head_lr="auto", matrix_lr="auto", expert_lr="auto", eps=1e-10, weight_decay=0.0
)
DEMOS = MuonSettings(lr=0.01, embedding_lr=0.2, head_lr=0.04, matrix_lr=0.0088, eps=1e-10, weight_decay=0.0)
VOCAB_SIZE, ROWS, TOKENS, STEPS = 97, 8, 32, 16
NOT_OF_TEXT = {"vit-base", "clip-base", "whisper-small", "wav2vec2-base", "wav2vec2-base-pretraining", "dalle-12b"}
TEXT_PRESETS = sorted(set(options("model")) - NOT_OF_TEXT)


def small(name: str) -> ModelConfig:
    """A preset made small that starts as the preset does."""
    config = tiny(name)
    init = preset_values(name).get("init")
    encoder = config.encoder
    if encoder is not None:
        own = preset_values(name)["encoder"].get("init")
        encoder = replace(encoder, init=from_plain(InitConfig, own, "init") if own else InitConfig())
    return replace(config, encoder=encoder, init=from_plain(InitConfig, init, "init") if init else InitConfig())


def batches(config: ModelConfig) -> Any:
    """Windows of the licence, which nobody edits, as each kind of model is asked about them: next or hidden tokens."""
    raw, size = (ROOT / "LICENSE").read_bytes(), config.require_vocab_size()
    letters = 1 if size == VOCAB_SIZE else 2  # as pieces of text, so that a larger vocabulary is used
    text = torch.tensor([5 + zlib.crc32(raw[at : at + letters]) % (size - 5) for at in range(0, len(raw) - 1, letters)])
    draw = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, len(text) - TOKENS - 1, (ROWS,), generator=draw)
        rows = torch.stack([text[start : start + TOKENS + 1] for start in starts])
        tokens, targets = rows[:, :-1], rows[:, 1:]
        if config.encoder is not None:
            yield {"encoder_tokens_BT": tokens[:, : TOKENS // 2], "tokens_BT": tokens, "targets_BT": targets}
        elif config.causal:
            yield {"tokens_BT": tokens, "targets_BT": targets}
        else:
            hidden = torch.rand(tokens.shape, generator=draw) < 0.3
            yield {"tokens_BT": tokens.masked_fill(hidden, 4), "targets_BT": tokens.masked_fill(~hidden, -100)}


def losses(config: ModelConfig, optim: OptimSettings) -> list[float]:
    """Of a few updates with these rates."""
    torch.manual_seed(0)
    model = build_model(config).train()
    optimizer, asked, told = build_optimizer(model, optim), batches(config), []
    for step in range(STEPS):
        set_learning_rates(optimizer, learning_rate_scale(ScheduleSettings(), step=step, total_steps=STEPS))
        batch = next(asked)
        loss = model(**batch)["loss_sum"] / (batch["targets_BT"] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
    return told


def diverged(told: list[float]) -> bool:
    health = Health(uniform=max(told[0], math.log(VOCAB_SIZE)), warmup_steps=1, total_steps=len(told))
    for step, loss in enumerate(told, start=1):
        health.look(step, loss)
    return health.diverged is not None


@pytest.mark.parametrize("name", TEXT_PRESETS)
def test_every_preset_made_small_learns_with_derived_rates(name: str) -> None:
    """Decoders as `experiment=text` trains them, the others as the README says."""
    config = small(name)
    told = losses(config, derived(MUON if config.causal and config.encoder is None else ADAMW, config))
    assert not diverged(told), told
    assert told[-1] < min(told[0], math.log(VOCAB_SIZE)) - 0.25, told


@pytest.mark.parametrize("name", ["mixtral-tiny", "gpt2-124m"])
def test_the_demos_rates_make_other_models_diverge_which_is_noticed_and_derived_ones_do_not(name: str) -> None:
    config = replace(small(name), vocab_size=1024, d_model=64)
    assert diverged(losses(config, DEMOS))
    assert not diverged(losses(config, derived(MUON, config)))


def test_at_the_demos_width_the_rates_are_the_demos_to_the_last_bit() -> None:
    text = compose(["experiment=text", "corpus.paths=[books]"]).pretraining().train
    assert text.optim == DEMOS
    for name in ("demo", "demo-30min"):
        assert compose([f"experiment={name}"]).pretraining().train.optim == DEMOS


@pytest.mark.parametrize(("name", "lr"), [("gpt2-124m", 6e-4), ("llama-1b", 4e-4), ("llama-8b", 3e-4)])
def test_the_large_presets_pin_their_rates(name: str, lr: float) -> None:
    pinned = compose([f"experiment={name}", "corpus.paths=[books]"]).pretraining().train.optim
    assert pinned == AdamWSettings(lr=lr)


def test_rates_fall_with_width_and_those_of_a_table_that_is_a_head_are_a_heads() -> None:
    def muon(*overrides: str) -> MuonSettings:
        found = compose(["experiment=text", "corpus.paths=[books]", *overrides]).pretraining().train.optim
        assert isinstance(found, MuonSettings)
        return found

    mixtral, demo, wide = muon("model=mixtral-tiny"), muon(), muon("model.d_model=640")
    assert (mixtral.lr, mixtral.embedding_lr, mixtral.expert_lr) == (0.01, pytest.approx(0.0108), pytest.approx(0.0036))
    assert (wide.matrix_lr, wide.head_lr) == (pytest.approx(0.0088 / 2), pytest.approx(0.04 / 4))
    assert (wide.embedding_lr, demo.embedding_lr, demo.expert_lr) == (0.2, 0.2, None)
    assert muon("model=mixtral-tiny", "optim.lr=0.5", "optim.matrix_lr=0.25") == replace(
        mixtral, lr=0.5, matrix_lr=0.25
    )


def test_weights_from_outside_are_tuned_gently_and_adapters_less_so() -> None:
    wide = replace(small("llama-8b"), d_model=4096)
    assert derived(ADAMW, wide).lr == pytest.approx(6e-4 * 768 / 4096)
    assert derived(ADAMW, wide, trained_before=True).lr == pytest.approx(AGAIN * 6e-4 * 768 / 4096)
    assert derived(ADAMW, wide, trained_before=True, adapted=True).lr == pytest.approx(5 * AGAIN * 6e-4 * 768 / 4096)


def test_derived_rates_enter_digests_as_numbers(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "Say hello.", "completion": "Hello."}\n')
    settings = compose(
        ["experiment=text", "corpus.paths=[books]", "finetune=chat", f"finetune.data.paths=[{chats}]", "model=tiny"]
    )
    tuned = settings.finetuning()
    assert tuned is not None
    for optim in (settings.pretraining().train.optim, tuned.train.optim):
        assert "auto" not in vars(optim).values()
