"""Quantized maps compute what rounded weights would, and a quantized model decodes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from conf.refusal import Refusal
from model.adapt import LoraConfig, attach_lora
from model.adapt.quantize import QuantizedLinear, held_bytes, quantize
from model.build import build_model
from model.config import ModelConfig
from model.decoding.generate import Sampling, generate
from model.ffns.dense import FfnConfig
from model.ffns.experts.layer import Experts
from model.init import Linear
from model.mixers.bigbird import BigBirdConfig
from tests.model.configurations import BERT, GPT2, LATENT, LLAMA, MIXTRAL, RECURRENT
from tests.model.parity import imported, stirred
from tests.model.peft_families import CLASSES, answer, inputs

WIDE = replace(LLAMA, d_model=64, ffn=FfnConfig(d_ff=128))
WIDE_GPT2 = replace(GPT2, d_model=64, ffn=replace(GPT2.ffn, d_ff=128))
BIGBIRD = replace(BERT, mixer=BigBirdConfig(n_heads=4, block=2, random_blocks=1))
# The most that rounding moves a weight, in units of its row's (or group's) range: half a level of 127 or of 15.
LEVELS = {"int8": 2 * 127, "int4": 15, "int8_dynamic": 2 * 127}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(LEVELS))
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_map_errs_by_its_rounding(kind: str, dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(64, 48, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    linear.to(dtype)
    x = torch.randn(2, 3, 64, generator=generator).to(dtype)
    with torch.no_grad():
        found, exact = QuantizedLinear(linear.weight, linear.bias, kind)(x).float(), linear(x).float()  # type: ignore[arg-type]
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    # 64 independent roundings of weights, and of inputs where these are rounded too, within a range of about 6.
    bound = 5 * 6 / LEVELS[kind] * 64**0.5 + (64 * 6 * 2**-8 if dtype == torch.bfloat16 else 0)
    assert 0 < (found - exact).abs().max() <= bound


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The weights that the bits stand for."""
    if kind != "int4":
        step = weight.abs().amax(1, keepdim=True) / 127
        return (weight / step).round() * step
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    return (((groups - low) / step).round() * step + low).flatten(1)


@pytest.mark.parametrize("config", [WIDE, WIDE_GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.36), ("int4", 0.30), ("int8_dynamic", 0.36)])
def test_a_quantized_model_is_smaller_close_and_decodes_as_its_whole_pass(kind, config, most) -> None:  # type: ignore
    model, plain = build_model(config), build_model(config)
    names = quantize(model, kind)
    assert len(names) == 2 * (7 if config is WIDE else 6)
    outside = held_bytes(plain.frontend) + held_bytes(plain.stack.final_norm)
    assert held_bytes(model) - outside < most * (held_bytes(plain) - outside)
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, found = plain(tokens)["logits"], model(tokens)["logits"]
        assert (found - exact).norm() > 1e-4 * exact.norm()
        for name in names:
            weight = plain.get_submodule(name).weight
            weight.copy_(rounded(weight, kind))
        near = plain(tokens)["logits"]
        assert (found - near).norm() <= (0.05 if kind == "int8_dynamic" else 2e-3) * near.norm()
        cache = model.new_cache(2, 20)
        steps = torch.cat([model(piece, cache=cache)["logits"] for piece in tokens.split(1, dim=1)], dim=1)
    assert (steps - found).norm() <= 0.02 * found.norm()  # a rounded input may fall to the other side
    assert len(generate(model, [[1, 2, 3]], Sampling(max_new_tokens=5))[0]) == 5


QUICK = [
    "MixtralForCausalLM",
    "SwitchTransformersForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "CLIPModel",
]


@pytest.mark.parametrize("kind", ["int8", "int8_dynamic"])
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        pytest.param(*row, id=f"{at}-{row[0].__name__}", marks=() if row[0].__name__ in QUICK else pytest.mark.slow)
        for at, row in enumerate(CLASSES)
    ],
)
def test_every_map_of_every_stack_is_quantized(cls: Any, config: Any, kind: Any) -> None:
    theirs = stirred(cls(config))
    model, near = imported(theirs), imported(theirs)
    names = set(quantize(model, kind))
    left = {name for name, part in model.named_modules() if "stack" in name.split(".") and type(part) is Linear}
    assert not left
    assert not any(isinstance(part, Experts) for part in model.modules())
    with torch.no_grad():
        for name in names:
            for weight in near.get_submodule(name).parameters():
                if weight.dim() > 1:
                    weight.copy_(rounded(weight.flatten(0, -2), "int8").view_as(weight))
        _, given = inputs(theirs)
        found, expected = answer(model(**given)), answer(near(**given))
    assert (found - expected).norm() <= (0.1 if kind == "int8_dynamic" else 1e-5) * expected.norm()


def test_quantized_experts_decode_and_take_int4() -> None:
    config = replace(MIXTRAL, d_model=64, ffn=replace(MIXTRAL.ffn, d_ff=32))
    model, plain = build_model(config), build_model(config)
    assert [name for name in quantize(model, "int4") if "experts" in name] == [
        f"stack.layers.{layer}.ffn.experts" for layer in (0, 1)
    ]
    assert held_bytes(model.stack) < 0.3 * held_bytes(plain.stack)
    assert len(generate(model, [[1, 2, 3], [4]], Sampling(max_new_tokens=5))[1]) == 5


@pytest.mark.parametrize("config", [LATENT, BIGBIRD, *RECURRENT.values()])
def test_what_a_mixer_asks_of_its_maps_quantized_ones_have(config: ModelConfig) -> None:
    model = build_model(config)
    quantize(model, "int8")
    if config.causal:
        assert len(generate(model, [[1, 2, 3], [4]], Sampling(max_new_tokens=5))[1]) == 5
    else:
        assert model(torch.ones(2, 20, dtype=torch.int64))["logits"].isfinite().all()


def test_quantizing_what_has_adapters_or_is_quantized_is_refused_by_its_name() -> None:
    model = build_model(WIDE)
    attach_lora(model, LoraConfig(rank=2, targets=("*.mixer.q",)))
    with pytest.raises(Refusal, match=r"layers\.0\.mixer\.q has an adapter.*merged"):
        quantize(model, "int8")
    model = build_model(WIDE)
    quantize(model, "int8")
    with pytest.raises(Refusal, match="is int8 already"):
        quantize(model, "int8")


def test_what_does_not_fit_a_group_stays_and_other_kinds_are_refused() -> None:
    model = build_model(replace(LLAMA, ffn=FfnConfig(d_ff=40)))
    assert not [name for name in quantize(model, "int4") if name.endswith("ffn.down")]
    with pytest.raises(Refusal, match="quantization = 'int3'"):
        quantize(model, "int3")  # type: ignore[arg-type]
