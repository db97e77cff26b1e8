"""Images: patches in, classes out, as Hugging Face's ViT computes them."""

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
from model.heads.classifiers import ClassifierHeadConfig
from model.heads.language import NoHeadConfig
from model.init import parameter_roles
from model.interop import config_from_hf, hf_config
from model.mixers.attention import AttentionConfig
from model.norms.norm import NormConfig
from model.positions.learned import LearnedPositionConfig
from model.positions.rope import RopeConfig
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

VIT = ModelConfig(
    d_model=32,
    n_layers=2,
    causal=False,
    norm=NormConfig(kind="layer", bias=True, eps=1e-12),
    frontend=PatchFrontendConfig(image_size=16, patch_size=4),
    position=LearnedPositionConfig(),
    mixer=AttentionConfig(n_heads=4, qkv_bias=True, out_bias=True),
    ffn=FfnConfig(d_ff=48, activation="gelu", gated=False, bias=True),
    head=ClassifierHeadConfig(classes=5, hidden=None),
    init=LIVELY,
)


@st.composite
def described(draw: st.DrawFn) -> transformers.ViTConfig:
    """Any small ViT; images need not be a multiple of patches."""
    heads, patch = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return transformers.ViTConfig(
        hidden_size=heads * draw(st.sampled_from([4, 6])),
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 2)),
        intermediate_size=draw(st.integers(3, 40)),
        image_size=patch * draw(st.integers(1, 3)),
        patch_size=patch,
        num_channels=draw(st.integers(1, 3)),
        num_labels=draw(st.integers(2, 7)),
        qkv_bias=draw(st.booleans()),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5])),
        hidden_act=draw(st.sampled_from(["gelu", "relu", "gelu_new"])),
        attn_implementation="eager",
    )


def images(config: Any, rows: int = 3, seed: int = 0) -> torch.Tensor:
    size = (rows, config.num_channels, config.image_size, config.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def pixels(config: ModelConfig, rows: int = 3, seed: int = 0) -> torch.Tensor:
    frontend = config.frontend
    assert isinstance(frontend, PatchFrontendConfig)
    size = (rows, frontend.planes, frontend.image_size, frontend.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12, deadline=None)
@given(config=described())
def test_an_imported_vit_has_the_references_logits_gradients_and_bytes(config: transformers.ViTConfig) -> None:
    theirs = stirred(transformers.ViTForImageClassification(config))
    ours = imported(theirs)
    x, classes = images(config), torch.tensor([0, config.num_labels - 1, 0])
    expected = theirs(x).logits
    assert_close(expected, ours(pixels_BAYX=x)["logits"])
    assert_same_bytes(saved(theirs), ours)
    assert_close(theirs.vit(x).last_hidden_state, features(ours, x))
    torch.nn.functional.cross_entropy(expected, classes, reduction="sum").backward()
    found = ours(pixels_BAYX=x, classes_B=classes)
    found["loss_sum"].backward()
    assert found["target_count"] == 3
    assert_same_gradients(saved_gradients(theirs), gradients_of(ours))


def features(model: Any, x: torch.Tensor) -> torch.Tensor:
    headless = build_model(replace(model.config, head=NoHeadConfig()))
    headless.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("head.")})
    found: torch.Tensor = headless(pixels_BAYX=x)["features"]
    return found


def test_transformers_loads_an_exported_vit_and_agrees() -> None:
    ours = stirred_ours(VIT)
    x = pixels(VIT)
    theirs = exported(ours, transformers.ViTForImageClassification)
    assert_close(theirs(x).logits, ours(pixels_BAYX=x)["logits"])


def test_a_headless_checkpoint_goes_both_ways_and_its_pooler_is_left() -> None:
    ours = stirred_ours(replace(VIT, head=NoHeadConfig()))
    assert hf_config(ours.config)["architectures"] == ["ViTModel"]
    x = pixels(VIT)
    described = transformers.AutoConfig.for_model(**hf_config(ours.config))
    theirs = stirred(transformers.ViTModel(described))
    assert_close(theirs(x).last_hidden_state, imported(theirs)(pixels_BAYX=x)["features"])
    assert {name for name in saved(theirs) if name not in saved(transformers.ViTModel(described, False))} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


def test_a_configuration_comes_back_from_theirs() -> None:
    for config in (VIT, replace(VIT, head=NoHeadConfig())):
        loaded = transformers.AutoConfig.for_model(**hf_config(config))
        assert hf_config(config_from_hf(loaded.to_dict())) == hf_config(config)
    with pytest.raises(Refusal, match="must be square"):
        config_from_hf({**hf_config(VIT), "image_size": [16, 32]})
    with pytest.raises(Refusal, match="ViTForMaskedImageModeling"):
        config_from_hf({**hf_config(VIT), "architectures": ["ViTForMaskedImageModeling"]})


def test_it_learns_to_tell_images_apart() -> None:
    model = build_model(VIT)
    x, classes = pixels(VIT, rows=10), torch.arange(10) % 5
    losses = learn(model, lambda: model(pixels_BAYX=x, classes_B=classes)["loss_sum"] / 10, steps=40, lr=3e-3)
    assert losses[-1] < losses[0] / 4
    assert torch.equal(model(pixels_BAYX=x)["logits"].argmax(-1), classes)


def test_rows_without_a_class_count_for_nothing() -> None:
    model = build_model(VIT)
    x = pixels(VIT)
    some = model(pixels_BAYX=x, classes_B=torch.tensor([1, -100, 2]))
    assert some["target_count"] == 2
    alone = model(pixels_BAYX=x[[0, 2]], classes_B=torch.tensor([1, 2]))
    assert_close(alone["loss_sum"], some["loss_sum"])


def test_costs_are_those_counted() -> None:
    for config in (
        VIT,
        replace(VIT, head=NoHeadConfig(), position=RopeConfig()),
        replace(
            VIT, frontend=PatchFrontendConfig(image_size=15, patch_size=5, bias=False, norm=True, class_token=False)
        ),
    ):
        model, counts = build_model(config, kernel="dense"), parameter_counts(config)
        assert counts.total == sum(parameter.numel() for parameter in model.parameters())
        assert counts.embedding == sum(parameter.numel() for parameter in model.frontend.parameters())
        assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()
        tokens = config.frontend.tokens
        assert tokens is not None
        with FlopCounterMode(display=False) as counted:
            model(pixels_BAYX=pixels(config, rows=2))
        assert counted.get_total_flops() == forward_flops(config, rows=2, seq_len=tokens, masked=False)


def test_rotary_positions_reach_patches_too() -> None:
    config = replace(VIT, position=RopeConfig())
    model, x = build_model(config), pixels(VIT)
    mirrored = torch.cat((x[..., 8:], x[..., :8]), dim=-1)
    assert (model(pixels_BAYX=x)["logits"] - model(pixels_BAYX=mirrored)["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PatchFrontendConfig(image_size=0), "image_size = 0"),
        (lambda: PatchFrontendConfig(image_size=8, patch_size=9), "patch_size = 9"),
        (lambda: build_model(VIT)(pixels_BAYX=torch.zeros(1, 3, 8, 8)), r"\(3, 8, 8\).*(?i:resize)"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()
