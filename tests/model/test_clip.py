"""Two towers, text and images in one space, as Hugging Face's CLIP computes them."""

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
from model.frontends.patches import PatchFrontendConfig
from model.heads.embedding import EmbeddingHeadConfig
from model.init import parameter_roles
from model.interop import config_from_hf, has_hf_class, hf_config
from model.interop.native import config_from_native, native_config
from model.mixers.attention import AttentionConfig
from model.norms.norm import NormConfig
from model.positions.learned import LearnedPositionConfig
from tests.model.configurations import GPT2, LIVELY
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

END, LARGEST = 30, 40
NORM = NormConfig(kind="layer", bias=True)
MIXER = AttentionConfig(n_heads=4, qkv_bias=True, out_bias=True)
FFN = FfnConfig(d_ff=48, activation="quick_gelu", gated=False, bias=True)
CLIP = ModelConfig(
    vocab_size=41,
    d_model=32,
    n_layers=2,
    max_seq_len=12,
    norm=NORM,
    position=LearnedPositionConfig(),
    mixer=MIXER,
    ffn=FFN,
    head=EmbeddingHeadConfig(width=20, pool="end", end_token=END, contrast=True),
    tower=ModelConfig(
        d_model=24,
        n_layers=2,
        causal=False,
        norm=NORM,
        frontend=PatchFrontendConfig(image_size=12, patch_size=4, bias=False, norm=True),
        position=LearnedPositionConfig(),
        mixer=MIXER,
        ffn=FFN,
        head=EmbeddingHeadConfig(width=20),
        init=LIVELY,
    ),
    init=LIVELY,
)
LEGACY = replace(CLIP, head=replace(CLIP.head, pool="largest", end_token=None))
BOTH = pytest.mark.parametrize("config", [CLIP, LEGACY], ids=["end", "largest"])


@st.composite
def described(draw: st.DrawFn) -> transformers.CLIPConfig:
    """Any small CLIP, with the end token named or, as in the first checkpoints, the largest."""
    widths = {}
    for part in ("text", "vision"):
        heads = draw(st.integers(1, 3))
        widths[part] = {
            "hidden_size": heads * draw(st.sampled_from([4, 6])),
            "num_attention_heads": heads,
            "num_hidden_layers": draw(st.integers(1, 2)),
            "intermediate_size": draw(st.integers(3, 40)),
            "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu"])),
            "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        }
    end = {
        "vocab_size": LARGEST + 1,
        "max_position_embeddings": 12,
        "eos_token_id": draw(st.sampled_from([END, LARGEST, 2])),
    }
    patch = draw(st.integers(1, 4))
    size = {"patch_size": patch, "image_size": patch * draw(st.integers(1, 3)), "num_channels": draw(st.integers(1, 3))}
    return transformers.CLIPConfig(
        text_config={**widths["text"], **end},
        vision_config={**widths["vision"], **size},
        projection_dim=draw(st.integers(2, 20)),
        attn_implementation="eager",
    )


def sentences(rows: int, end: int = END) -> torch.Tensor:
    """Rows of 8 tokens, some of larger numbers than the end token, which stands at different places, twice in one row."""
    tokens = torch.randint(3, LARGEST, (rows, 8), generator=torch.Generator().manual_seed(0))
    tokens[tokens == end] += 1
    for row in range(rows):
        tokens[row, 3 + row % 5] = end
    tokens[0, 7] = end
    return tokens


def images(rows: int, planes: int = 3, size: int = 12) -> torch.Tensor:
    return torch.randn((rows, planes, size, size), generator=torch.Generator().manual_seed(1))


@settings(max_examples=12, deadline=None)
@given(config=described())
def test_an_imported_clip_has_the_references_logits_loss_gradients_and_bytes(config: transformers.CLIPConfig) -> None:
    theirs = stirred(transformers.CLIPModel(config))
    ours = imported(theirs)
    vision, end = config.vision_config, config.text_config.eos_token_id
    tokens, x = sentences(4, LARGEST if end == 2 else end), images(4, vision.num_channels, vision.image_size)
    expected = theirs(input_ids=tokens, pixel_values=x, return_loss=True)
    found = ours(tokens, tower_pixels_BAYX=x)
    # A cosine of unit vectors whose n channels may each be off by 1e-5 is off by 2 * sqrt(n) times that.
    within = 2 * config.projection_dim**0.5 * 1e-5
    assert_close(expected.logits_per_text, found["logits"], within)
    assert_close(expected.text_embeds, found["features"])
    assert_close(expected.image_embeds, found["other_features"])
    assert_same_bytes(saved(theirs), ours)
    sums = ours(tokens, tower_pixels_BAYX=x, matches_B=torch.arange(4))
    assert sums["target_count"] == 4
    loss = sums["loss_sum"] / 4
    assert_close(expected.loss, loss)
    expected.loss.backward()
    loss.backward()
    assert_same_gradients(saved_gradients(theirs), gradients_of(ours))


@BOTH
def test_transformers_loads_an_export_and_agrees_zero_shot(config: ModelConfig) -> None:
    """Images chosen among texts: more texts than images, each tower by itself, and padding behind the end."""
    ours = stirred_ours(config)
    theirs = exported(ours, transformers.CLIPModel)
    assert isinstance(config.head, EmbeddingHeadConfig)
    tokens, x = sentences(5, config.head.end_token or LARGEST), images(2)
    expected = theirs(input_ids=tokens, pixel_values=x)
    assert_close(expected.logits_per_text, ours(tokens, tower_pixels_BAYX=x)["logits"])
    assert_close(expected.text_embeds, ours(tokens)["features"])
    assert ours.tower is not None
    assert_close(expected.image_embeds, ours.tower(pixels_BAYX=x)["features"])
    padded = (torch.arange(8) <= torch.tensor([[3 + row % 5] for row in range(5)])).int()
    assert_close(expected.text_embeds, ours(tokens, documents_BT=padded)["features"])


@BOTH
def test_a_configuration_comes_back_from_theirs_and_from_our_own_format(config: ModelConfig) -> None:
    loaded = transformers.AutoConfig.for_model(**hf_config(config))
    assert hf_config(config_from_hf(loaded.to_dict())) == hf_config(config)
    assert config_from_hf(loaded.to_dict()).head == config.head
    assert config_from_native(native_config(config)) == config


def test_an_end_token_that_their_class_reads_otherwise_is_not_exported() -> None:
    assert not has_hf_class(replace(CLIP, head=replace(CLIP.head, end_token=2)))


def test_the_scale_starts_where_the_authors_start_it() -> None:
    scale = build_model(CLIP).get_parameter("head.log_scale")
    theirs = transformers.CLIPModel(transformers.AutoConfig.for_model(**hf_config(CLIP)))
    assert torch.equal(scale, theirs.logit_scale)


def test_matches_may_be_shuffled_and_missing() -> None:
    ours = stirred_ours(CLIP)
    tokens, x = sentences(4), images(4)
    straight = ours(tokens, tower_pixels_BAYX=x, matches_B=torch.arange(4))["loss_sum"]
    order = torch.tensor([2, 0, 3, 1])
    shuffled = ours(tokens, tower_pixels_BAYX=x[order.argsort()], matches_B=order)["loss_sum"]
    assert_close(straight, shuffled)
    some = ours(tokens, tower_pixels_BAYX=x, matches_B=torch.tensor([0, -100, 2, -100]))
    logits = ours(tokens, tower_pixels_BAYX=x)["logits"]
    by_hand = sum(-log_p[i, i] for log_p in (logits.log_softmax(1), logits.log_softmax(0)) for i in (0, 2)) / 2
    assert some["target_count"] == 2
    assert_close(torch.as_tensor(by_hand), some["loss_sum"])


def test_it_learns_which_text_belongs_to_which_image() -> None:
    model, tokens, x = build_model(CLIP), sentences(8), images(8)

    def loss() -> torch.Tensor:
        return model(tokens, tower_pixels_BAYX=x, matches_B=torch.arange(8))["loss_sum"] / 8

    losses = learn(model, loss, steps=40, lr=2e-3)
    assert losses[-1] < losses[0] / 4
    assert torch.equal(model(tokens, tower_pixels_BAYX=x)["logits"].argmax(1), torch.arange(8))


def test_costs_are_those_counted() -> None:
    model, counts = build_model(CLIP, kernel="dense"), parameter_counts(CLIP)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()
    with FlopCounterMode(display=False) as counted:
        model(sentences(3), tower_pixels_BAYX=images(3))
    compared = 2 * 3 * 3 * 20
    assert counted.get_total_flops() - compared == forward_flops(CLIP, rows=3, seq_len=8, masked=False)


def test_both_towers_start_by_their_own_settings_and_from_names_alone() -> None:
    assert CLIP.tower is not None
    model = build_model(replace(CLIP, tower=replace(CLIP.tower, init=replace(LIVELY, std=0.01))))
    assert model.get_parameter("tower.stack.layers.0.mixer.q.weight").std() < 0.02
    assert model.get_parameter("stack.layers.0.mixer.q.weight").std() > 0.1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EmbeddingHeadConfig(width=0), "width = 0"),
        (lambda: EmbeddingHeadConfig(pool="end"), "pool = '?end'?: with end_token None"),
        (lambda: replace(CLIP, tower=None), "tower = null"),
        (lambda: replace(GPT2, tower=CLIP.tower), "tower = …: with head LanguageHeadConfig"),
        (lambda: replace(CLIP, tower=replace(CLIP.tower, head=EmbeddingHeadConfig(width=8))), "width=20"),
        (lambda: build_model(GPT2)(sentences(1), tower_pixels_BAYX=images(1)), "has no tower"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()
