"""Schedules are their closed forms; groups follow the parameters' roles."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.init import NO_WEIGHT_DECAY, parameter_roles
from model.mixers.attention import AttentionConfig
from pipelines.training.optim import build_optimizer, learning_rate_scale, parameter_groups, set_learning_rates
from pipelines.training.settings import AdamWSettings, MuonSettings, ScheduleSettings


def scales(total: int, **settings: Any) -> list[float]:
    schedule = ScheduleSettings(**settings)
    return [learning_rate_scale(schedule, step=step, total_steps=total) for step in range(total)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_warmup_climbs_in_equal_steps_to_the_peak(shape: Literal["cosine", "linear", "wsd", "constant"]) -> None:
    curve = scales(100, shape=shape, warmup_fraction=0.1)
    assert curve[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert curve[10] == 1.0
    assert max(curve) == 1.0


def test_cosine_is_half_a_cosine_between_peak_and_final() -> None:
    curve = scales(110, shape="cosine", warmup_fraction=10 / 110, final_fraction=0.2)
    for step in range(10, 110):
        progress = (step - 10) / 100
        assert curve[step] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * progress)))


def test_linear_is_a_line_between_peak_and_final() -> None:
    curve = scales(50, shape="linear", warmup_fraction=0.0, final_fraction=0.0)
    assert curve == pytest.approx([1 - step / 50 for step in range(50)])


def test_wsd_stays_at_the_peak_until_its_tail() -> None:
    curve = scales(100, shape="wsd", warmup_fraction=0.1, decay_fraction=0.3, final_fraction=0.1)
    assert set(curve[10:71]) == {1.0}
    assert curve[70:] == pytest.approx([1 - 0.9 * i / 30 for i in range(30)])


def test_constant_has_no_decay() -> None:
    assert scales(20, shape="constant", warmup_fraction=0.0) == [1.0] * 20


def test_a_run_of_one_step_uses_the_peak() -> None:
    assert scales(1, shape="cosine") == [1.0]


CONFIG = ModelConfig(
    vocab_size=64, d_model=16, n_layers=1, tie_embeddings=False, mixer=AttentionConfig(n_heads=2, n_kv_heads=1)
)


def test_only_matrices_decay_and_every_parameter_is_in_one_group() -> None:
    model = build_model(CONFIG)
    roles = parameter_roles(model)
    groups = parameter_groups(model, AdamWSettings(weight_decay=0.3, lr=1e-3, embedding_lr=5e-3, head_lr=2e-3))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(roles)
    for group in groups:
        for name in group["names"]:
            assert group["weight_decay"] == (0.0 if roles[name] in NO_WEIGHT_DECAY else 0.3)
            assert group["peak_lr"] == {"embedding": 5e-3, "head": 2e-3}.get(roles[name], 1e-3)


def test_frozen_parameters_are_left_out_and_freezing_all_is_an_error() -> None:
    model = build_model(CONFIG).requires_grad_(False)
    with pytest.raises(Refusal, match="all are frozen"):
        build_optimizer(model, AdamWSettings())
    model.frontend.tokens.weight.requires_grad_(True)
    assert [g["names"] for g in parameter_groups(model, AdamWSettings())] == [["frontend.tokens.weight"]]


def test_muon_takes_the_matrices_and_adamw_the_rest_from_one_state() -> None:
    model = build_model(CONFIG)
    roles = parameter_roles(model)
    optimizer = build_optimizer(model, MuonSettings(lr=1e-3, matrix_lr=2e-2))
    set_learning_rates(optimizer, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens_BT = torch.arange(32).view(2, 16)
    model(tokens_BT, targets_BT=tokens_BT)["loss_sum"].backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        kinds = set(optimizer.state[parameter])
        assert kinds == ({"momentum_buffer"} if roles[name] == "matrix" else {"step", "exp_avg", "exp_avg_sq"}), name
        moved = (parameter - before[name]).detach()
        assert moved.abs().max() > 0, name
        if roles[name] == "matrix":
            # An orthogonal update scaled by 0.2 sqrt(max(rows, columns)) moves the root mean square by about 0.2 lr;
            # Newton-Schulz leaves singular values between 0.7 and 1.2, and narrow matrices fewer of them.
            rms = moved.add(before[name] * 0.5 * 2e-2 * 0.1).square().mean().sqrt().item()
            assert 0.2 * 1e-2 * 0.5 < rms < 0.2 * 1e-2 * 1.3, name
    assert {group["lr"] for group in optimizer.param_groups} == {0.5e-3, 1e-2}
