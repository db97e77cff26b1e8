"""Waveforms: frames through convolutions, padding included, and CTC, as Hugging Face's Wav2Vec2ForCTC computes them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.costs import forward_flops, parameter_counts
from model.ffns.dense import FfnConfig
from model.frontends.waveform import WaveformFrontendConfig
from model.heads.ctc import CtcHeadConfig, best_labels
from model.init import parameter_roles
from model.interop import config_from_hf, from_hf, hf_config
from model.mixers.attention import AttentionConfig
from model.norms.norm import NormConfig
from model.positions.none import NoPositionConfig
from tests.model.configurations import LIVELY
from tests.model.learning import learn
from tests.model.parity import (
    assert_close,
    assert_same_bytes,
    assert_same_gradients,
    exported,
    gradients_of,
    imported,
    saved,
    saved_gradients,
    stirred,
    stirred_ours,
)

pytestmark = pytest.mark.slow  # whole models beside transformers' own

SPEECH = ModelConfig(
    vocab_size=11,
    d_model=32,
    n_layers=2,
    causal=False,
    layout="post",
    norm=NormConfig(kind="layer", bias=True),
    frontend=WaveformFrontendConfig(
        channels=(8, 12, 16), kernels=(10, 3, 2), strides=(5, 2, 2), positional_kernel=16, positional_groups=4
    ),
    position=NoPositionConfig(),
    mixer=AttentionConfig(n_heads=4, qkv_bias=True, out_bias=True),
    ffn=FfnConfig(d_ff=48, activation="gelu", gated=False, bias=True),
    head=CtcHeadConfig(),
    init=LIVELY,
)
STABLE = replace(SPEECH, layout="pre", frontend=replace(SPEECH.frontend, norm=False, conv_norm="layer", bias=True))
BOTH = pytest.mark.parametrize("config", [SPEECH, STABLE], ids=["base", "stable"])
LENGTHS = torch.tensor([700, 430, 551])
LABELS = torch.tensor([[1, 2, 2, 3], [4, -100, -100, -100], [5, 6, 1, -100]])
POSITIONAL = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original"


@st.composite
def described(draw: st.DrawFn) -> transformers.Wav2Vec2Config:
    """Any small model with the paper's kinds of convolutions."""
    heads, groups, layers = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(2, 4))
    return transformers.Wav2Vec2Config(
        vocab_size=draw(st.integers(7, 20)),
        hidden_size=heads * draw(st.sampled_from([4, 8])),
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 2)),
        intermediate_size=draw(st.integers(3, 40)),
        conv_dim=draw(st.lists(st.integers(3, 9), min_size=layers, max_size=layers)),
        conv_kernel=[10, 3, 3, 2][:layers],
        conv_stride=[5, 2, 2, 2][:layers],
        conv_bias=draw(st.booleans()),
        feat_extract_norm=draw(st.sampled_from(["group", "layer"])),
        do_stable_layer_norm=draw(st.booleans()),
        num_conv_pos_embeddings=draw(st.integers(3, 20)),
        num_conv_pos_embedding_groups=groups,
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
        mask_time_prob=draw(st.sampled_from([0.0, 0.05, 0.065])),
        pad_token_id=draw(st.integers(0, 6)),
        attn_implementation="eager",
    )


def samples(rows: int = 3, length: int = 700) -> torch.Tensor:
    return torch.randn((rows, length), generator=torch.Generator().manual_seed(0))


def real_frames(model: Any, x: torch.Tensor) -> torch.Tensor:
    found = model.frontend.documents({"samples_BW": x, "sample_lengths_B": LENGTHS})
    assert found is not None
    return found.bool()


@settings(max_examples=12, deadline=None)
@given(config=described())
def test_an_imported_model_has_the_references_logits_loss_and_gradients(config: transformers.Wav2Vec2Config) -> None:
    theirs = stirred(transformers.Wav2Vec2ForCTC(config))
    ours, x = imported(theirs), samples()
    assert_close(theirs(x).logits, ours(samples_BW=x)["logits"])
    attends = torch.arange(x.shape[1]) < LENGTHS[:, None]
    labels = torch.where(config.pad_token_id == LABELS, 0 if config.pad_token_id else 1, LABELS)
    expected = theirs(x, attention_mask=attends.long(), labels=labels)
    real_BT = real_frames(ours, x)
    found = ours(samples_BW=x, sample_lengths_B=LENGTHS)["logits"]
    assert_close(expected.logits[real_BT], found[real_BT])
    sums = ours(samples_BW=x, sample_lengths_B=LENGTHS, labels_BU=labels)
    assert_close(expected.loss, sums["loss_sum"])
    assert sums["target_count"] == 8
    expected.loss.backward()
    sums["loss_sum"].backward()
    normed = theirs.wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight
    length, direction = (part.detach().clone().requires_grad_() for part in (normed.original0, normed.original1))
    torch._weight_norm(direction, length, 2).backward(ours.get_parameter("frontend.positional.weight").grad)
    mine = {**gradients_of(ours), POSITIONAL + "0": length.grad, POSITIONAL + "1": direction.grad}
    assert_same_gradients(saved_gradients(theirs), mine)


@settings(max_examples=8, deadline=None)
@given(config=described())
def test_import_and_export_keep_every_tensor_but_one_and_its_product(config: transformers.Wav2Vec2Config) -> None:
    theirs = stirred(transformers.Wav2Vec2ForCTC(config))
    ours, before = imported(theirs), saved(theirs)
    folded = (POSITIONAL + "0", POSITIONAL + "1")
    whole = torch._weight_norm(before[folded[1]], before[folded[0]], 2)
    assert_close(whole, ours.get_parameter("frontend.positional.weight"), 1e-6)
    again = exported(ours, transformers.Wav2Vec2ForCTC)
    after = saved(again)
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items() if name not in folded)
    assert_same_bytes(after, imported(again))  # once written by us, nothing changes any more
    x = samples()
    assert_close(theirs(x).logits, again(x).logits)


def test_older_checkpoints_name_length_and_direction_otherwise() -> None:
    theirs = stirred(transformers.Wav2Vec2ForCTC(transformers.AutoConfig.for_model(**hf_config(SPEECH))))
    tensors = saved(theirs)
    for part, old in (("0", "weight_g"), ("1", "weight_v")):
        tensors["wav2vec2.encoder.pos_conv_embed.conv." + old] = tensors.pop(POSITIONAL + part)
    _, state = from_hf(hf_config(SPEECH), tensors)
    assert torch.equal(state["frontend.positional.weight"], imported(theirs).state_dict()["frontend.positional.weight"])


@BOTH
def test_masked_frames_become_the_mask_token_as_in_pretraining(config: ModelConfig) -> None:
    theirs = stirred(transformers.Wav2Vec2ForCTC(transformers.AutoConfig.for_model(**hf_config(config))))
    ours, x = imported(theirs), samples()
    masked = torch.rand(real_frames(ours, x).shape, generator=torch.Generator().manual_seed(1)) < 0.3
    expected = theirs.lm_head(theirs.wav2vec2(x, mask_time_indices=masked).last_hidden_state)
    assert_close(expected, ours(samples_BW=x, masked_BT=masked)["logits"])
    assert (expected - ours(samples_BW=x)["logits"]).abs().max() > 1e-3


def test_padding_changes_nothing_where_each_frame_is_normalised_by_itself() -> None:
    ours, x = stirred_ours(STABLE), samples()
    for row, length in enumerate(LENGTHS.tolist()):
        alone = ours(samples_BW=x[row : row + 1, :length])["logits"]
        padded = ours(samples_BW=x, sample_lengths_B=LENGTHS)["logits"][row : row + 1, : alone.shape[1]]
        assert_close(alone, padded, 2e-5)


@BOTH
def test_a_configuration_comes_back_from_theirs(config: ModelConfig) -> None:
    loaded = transformers.AutoConfig.for_model(**hf_config(config))
    assert hf_config(config_from_hf(loaded.to_dict())) == hf_config(config)


@pytest.mark.slow
@BOTH
def test_it_learns_to_spell(config: ModelConfig) -> None:
    model, x = build_model(config), samples()

    def loss() -> torch.Tensor:
        return model(samples_BW=x, sample_lengths_B=LENGTHS, labels_BU=LABELS)["loss_sum"] / 8

    losses = learn(model, loss, steps=250, lr=3e-3)
    assert losses[-1] < losses[0] / 10
    logits, real_BT = model(samples_BW=x, sample_lengths_B=LENGTHS)["logits"], real_frames(model, x)
    assert best_labels(logits, 0, real_BT) == [[1, 2, 2, 3], [4], [5, 6, 1]]
    nll = model(samples_BW=x, sample_lengths_B=LENGTHS, labels_BU=LABELS, per_token=True)["nll"]
    assert nll.shape == (3,)


@BOTH
def test_costs_are_those_counted(config: ModelConfig) -> None:
    for bare in (False, True):
        frontend = config.frontend
        assert isinstance(frontend, WaveformFrontendConfig)
        changed = replace(config, frontend=replace(frontend, mask_token=not bare, bias=bare, positional_kernel=5))
        model, counts = build_model(changed, kernel="dense"), parameter_counts(changed)
        assert counts.total == sum(parameter.numel() for parameter in model.parameters())
        assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()
        x = samples(2, frontend.lengths(9)[0])
        with FlopCounterMode(display=False) as counted:
            assert model(samples_BW=x)["logits"].shape[1] == 9
        assert counted.get_total_flops() == forward_flops(changed, rows=2, seq_len=9, masked=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WaveformFrontendConfig(strides=(5, 2)), r"strides=\(5, 2\)"),
        (lambda: WaveformFrontendConfig(positional_groups=0), "positional_groups=0"),
        (lambda: build_model(replace(SPEECH, d_model=30, mixer=replace(SPEECH.mixer, n_heads=3))), "groups = 4"),
        (lambda: build_model(replace(SPEECH, head=CtcHeadConfig(blank=11))), "blank = 11"),
        (lambda: CtcHeadConfig(blank=-1), "blank = -1"),
        (lambda: build_model(SPEECH)(samples_BW=torch.zeros(1, 20)), "rows of 20 samples: one frame takes 30"),
        (
            lambda: build_model(replace(SPEECH, frontend=replace(SPEECH.frontend, mask_token=False)))(
                samples_BW=samples(), masked_BT=torch.zeros(3, 3, dtype=torch.bool)
            ),
            "mask_token is false",
        ),
        (lambda: build_model(replace(SPEECH, vocab_size=None)), "vocab_size = null"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()
