"""Pretraining on sound: a codebook and distractors, as Hugging Face's Wav2Vec2ForPreTraining computes them."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from conf.refusal import Refusal
from model.architecture import Transformer
from model.build import build_model
from model.config import ModelConfig
from model.costs import forward_flops, parameter_counts
from model.frontends.spans import CODES, distractors, masked_spans
from model.frontends.waveform import WaveformFrontendConfig, sound_keys
from model.heads.codebook import CodebookConfig, drawn
from model.heads.distractor import DistractorHeadConfig
from model.init import parameter_roles
from model.interop import config_from_hf, hf_config
from model.interop.native import config_from_native, native_config
from model.noise import row_keys, uniform
from tests.model.parity import (
    assert_close,
    assert_same_gradients,
    exported,
    gradients_of,
    imported,
    saved_gradients,
    stirred,
    stirred_ours,
)
from tests.model.test_wav2vec2 import SPEECH, STABLE, samples

pytestmark = pytest.mark.slow  # whole models beside transformers' own

BOOK = CodebookConfig(groups=2, entries=5, width=12)
LISTENING = replace(
    SPEECH,
    vocab_size=None,
    frontend=replace(SPEECH.frontend, codebook=BOOK),
    head=DistractorHeadConfig(codes=12, width=10),
)
STABLE_LISTENING = replace(
    STABLE, vocab_size=None, frontend=replace(STABLE.frontend, codebook=BOOK), head=LISTENING.head
)
BOTH = pytest.mark.parametrize("config", [LISTENING, STABLE_LISTENING], ids=["base", "stable"])


@st.composite
def described(draw: st.DrawFn) -> transformers.Wav2Vec2Config:
    """Small models with codebooks of any shape."""
    groups = draw(st.integers(1, 3))
    return transformers.Wav2Vec2Config(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=draw(st.integers(1, 2)),
        intermediate_size=20,
        conv_dim=[6, 7],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        feat_extract_norm=draw(st.sampled_from(["group", "layer"])),
        do_stable_layer_norm=draw(st.booleans()),
        num_conv_pos_embeddings=5,
        num_conv_pos_embedding_groups=2,
        num_codevector_groups=groups,
        num_codevectors_per_group=draw(st.integers(2, 9)),
        codevector_dim=groups * draw(st.integers(1, 6)),
        proj_codevector_dim=draw(st.integers(2, 12)),
        contrastive_logits_temperature=draw(st.sampled_from([0.1, 0.5])),
        diversity_loss_weight=draw(st.sampled_from([0.1, 1.0])),
        **dict.fromkeys(
            ("hidden_dropout", "activation_dropout", "attention_dropout", "layerdrop", "feat_quantizer_dropout"), 0.0
        ),
        attn_implementation="eager",
    )


def asked(x_BW: torch.Tensor, frames: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked frames and, for each, the places of seven others."""
    keys_B, frames_B = sound_keys(x_BW), torch.full((len(x_BW),), frames)
    masked_BT = masked_spans(keys_B, frames_B, frames=frames, seed=seed, share=0.2, span=3)
    return masked_BT, distractors(masked_BT, 7, keys_B, seed=seed)


@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=8, deadline=None)
@given(config=described())
def test_an_imported_model_has_the_references_loss_and_gradients(
    training: bool, config: transformers.Wav2Vec2Config
) -> None:
    """In training too, where both draw entries by the same noise."""
    theirs = stirred(transformers.Wav2Vec2ForPreTraining(config)).train(training)
    theirs.config.mask_feature_prob = 0.0
    ours, x = imported(theirs).train(training), samples(3, 200)
    frames = int(theirs._get_feat_extract_output_lengths(torch.tensor(200)))
    masked_BT, negatives_BTO = asked(x, frames)
    flat = negatives_BTO + frames * torch.arange(3)[:, None, None]
    keys_B = sound_keys(x) + row_keys(masked_BT, masked_BT)
    draws = config.num_codevector_groups * config.num_codevectors_per_group
    noise_BTV = uniform(keys_B, seed=0, layer=CODES, tokens=frames, draws=draws)

    def gumbel_softmax(scores_MV: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
        return drawn(scores_MV, noise_BTV.view_as(scores_MV), tau)

    with patch.object(torch.nn.functional, "gumbel_softmax", gumbel_softmax):
        expected = theirs(x, mask_time_indices=masked_BT, sampled_negative_indices=flat)
    found = ours(samples_BW=x, masked_BT=masked_BT, negatives_BTO=negatives_BTO)
    assert_close(expected.loss, found["loss_sum"])
    assert found["target_count"] == masked_BT.sum()
    features = ours(samples_BW=x, masked_BT=masked_BT)
    assert_close(expected.projected_states, features["features"], 2e-5)
    assert_close(expected.projected_quantized_states, features["codes"])
    expected.loss.backward()
    found["loss_sum"].backward()
    plain, mine = saved_gradients(theirs), gradients_of(ours)
    for part in ("0", "1"):  # compared in test_wav2vec2
        name = f"wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original{part}"
        del plain[name], mine[name]
    assert_same_gradients(plain, mine, 5e-5)


@BOTH
def test_transformers_loads_an_export_and_agrees(config: ModelConfig) -> None:
    ours, x = stirred_ours(config), samples()
    theirs = exported(ours, transformers.Wav2Vec2ForPreTraining)
    found = ours(samples_BW=x)
    assert_close(theirs(x).projected_states, found["features"])
    assert_close(theirs(x).projected_quantized_states, found["codes"])
    loaded = transformers.AutoConfig.for_model(**hf_config(config))
    assert hf_config(config_from_hf(loaded.to_dict())) == hf_config(config)
    assert config_from_native(native_config(config)) == config


def loss_of(model: Transformer, x: torch.Tensor, seed: int) -> torch.Tensor:
    masked_BT, negatives_BTO = asked(x, 34, seed)
    sums = model(samples_BW=x, masked_BT=masked_BT, negatives_BTO=negatives_BTO)
    return sums["loss_sum"] / sums["target_count"]


def test_it_learns_to_recognise_masked_frames() -> None:
    model, x = build_model(STABLE_LISTENING).train(), samples()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for seed in range(60):
        loss = loss_of(model, x, seed)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_distractors_are_other_masked_frames_and_depend_on_the_row_and_the_seed_alone() -> None:
    masked_BT = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    keys_B = torch.tensor([11, 12])
    found = distractors(masked_BT, 200, keys_B, seed=5)
    for row_T, negatives_TO in zip(masked_BT, found, strict=True):
        for place in row_T.nonzero()[:, 0].tolist():
            others = set(row_T.nonzero()[:, 0].tolist()) - {place}
            assert set(negatives_TO[place].tolist()) == others
    assert torch.equal(found[1:], distractors(masked_BT[1:], 200, keys_B[1:], seed=5))
    assert not torch.equal(found, distractors(masked_BT, 200, keys_B, seed=6))
    assert not torch.equal(found, distractors(masked_BT, 200, keys_B + 2, seed=5))


def test_spans_begin_at_a_share_of_the_real_frames() -> None:
    keys_B, frames_B = torch.arange(300), torch.tensor([100, 40, 2]).repeat(100)
    masked_BT = masked_spans(keys_B, frames_B, frames=100, seed=1)
    place_T = torch.arange(100)
    assert not masked_BT[place_T >= frames_B[:, None]].any()
    assert masked_BT[2::3].sum(1).eq(2).all()
    # Seven starts among 91: a frame in the middle is hidden unless none of ten places near it is one of them.
    expected = 1 - math.comb(81, 7) / math.comb(91, 7)
    assert masked_BT[::3, 20:80].float().mean().item() == pytest.approx(expected, abs=0.03)
    assert masked_BT[1::3].sum(1).max() <= 30
    assert torch.equal(masked_BT[7:8], masked_spans(keys_B[7:8], frames_B[7:8], frames=100, seed=1))
    assert not torch.equal(masked_BT, masked_spans(keys_B, frames_B, frames=100, seed=2))


def test_equal_rows_and_seeds_give_equal_losses_whatever_else_was_drawn() -> None:
    x, losses = samples(4), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append(loss_of(build_model(LISTENING).train(), x, 7))
    assert torch.equal(*losses)
    book = replace(BOOK, seed=1)
    other = build_model(replace(LISTENING, frontend=replace(LISTENING.frontend, codebook=book))).train()
    assert loss_of(other, x, 7) != losses[0]
    model = build_model(STABLE_LISTENING).train()
    masked_BT, _ = asked(x, 34)
    codes = model(samples_BW=x, masked_BT=masked_BT)["codes"]
    alone = model(samples_BW=x[2:3], masked_BT=masked_BT[2:3])["codes"]
    assert_close(codes[2:3], alone)


def test_what_stands_behind_a_recording_does_not_change_its_draws() -> None:
    x, lengths_B = samples(2, 200), torch.tensor([150, 200])
    longer = torch.cat((x, torch.ones(2, 30)), dim=1)
    assert torch.equal(sound_keys(x, lengths_B), sound_keys(longer, lengths_B))
    assert torch.equal(sound_keys(x[:1, :150]), sound_keys(x, lengths_B)[:1])
    assert not torch.equal(sound_keys(x), sound_keys(x.flip(1)))


@BOTH
def test_costs_are_those_counted(config: ModelConfig) -> None:
    model, counts = build_model(config, kernel="dense"), parameter_counts(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()
    assert isinstance(config.frontend, WaveformFrontendConfig)
    x = samples(2, config.frontend.lengths(9)[0])
    with FlopCounterMode(display=False) as counted:
        model.eval()(samples_BW=x)
    assert counted.get_total_flops() == forward_flops(config, rows=2, seq_len=9, masked=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CodebookConfig(groups=3, width=256), "groups=3"),
        (lambda: DistractorHeadConfig(temperature=0.0), "temperature=0.0"),
        (lambda: build_model(replace(LISTENING, head=DistractorHeadConfig(codes=8))), "codes = 8"),
        (lambda: build_model(replace(SPEECH, head=DistractorHeadConfig())), "frontend.codebook None"),
        (
            lambda: distractors(torch.tensor([[True, False]]), 3, torch.tensor([0]), seed=0),
            "1 frames of a row are masked",
        ),
        (lambda: masked_spans(torch.tensor([0]), torch.tensor([9]), frames=9, seed=0, span=1), "span 1"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()
