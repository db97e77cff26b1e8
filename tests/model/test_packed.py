"""Weights copied for decoding: the same products, bounded, and gone afterwards."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.build import build_model
from model.config import ModelConfig
from model.decoding import packed
from model.decoding.generate import Sampling, generate
from model.decoding.joined import Joins, arranged_products
from model.decoding.packed import Packing
from model.init import Multiplies
from tests.model.configurations import FALCON, GPT2, LLAMA, MIXTRAL, RECURRENT, VASWANI, WINDOWED

FAMILIES = pytest.mark.parametrize(
    "config",
    [LLAMA, GPT2, WINDOWED, FALCON, MIXTRAL, *RECURRENT.values()],
    ids=["llama", "gpt2", "windowed", "falcon", "mixtral", *RECURRENT.keys()],
)
GREEDY = Sampling(max_new_tokens=packed.FROM_TOKENS, temperature=0)
PROMPTS = [[5, 6, 7], [8, 9, 10]]


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "FROM_PRODUCTS", dict.fromkeys(packed.FROM_PRODUCTS, 1))


@settings(max_examples=30, deadline=None)
@given(
    outputs=st.integers(1, 700),
    inputs=st.integers(1, 700),
    rows=st.integers(1, 20),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 50),
)
def test_a_product_is_that_of_the_stored_weight(
    outputs: int, inputs: int, rows: int, has_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias_O = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    x_BTI = torch.randn(rows, 1, inputs, generator=generator).to(dtype)
    product = Packing(rows, tokens=packed.FROM_TOKENS).product(weight_OI, bias_O)
    expected = torch.nn.functional.linear(
        x_BTI.double(), weight_OI.double(), None if bias_O is None else bias_O.double()
    )
    # Each of so many terms may be rounded as often as there are terms, in fp32 at least; then the result once.
    terms = x_BTI.double().abs() @ weight_OI.double().abs().T + 4
    tolerance = torch.finfo(torch.float32).eps * inputs * terms + torch.finfo(dtype).eps * expected.abs()
    assert ((product(x_BTI).double() - expected).abs() <= tolerance).all()


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("rows", [1, 2])
@FAMILIES
def test_generation_with_copies_gives_the_same_tokens(
    config: ModelConfig, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(replace(config, max_seq_len=64))
    copied = []
    hook = model.head.register_forward_pre_hook(lambda module, inputs: copied.append(module.product is not None))
    found = generate(model, PROMPTS[:rows], GREEDY)
    assert all(copied)
    copied.clear()
    monkeypatch.setattr(packed, "COPIED_BYTES", 0)
    assert found == generate(model, PROMPTS[:rows], GREEDY)
    assert not any(copied)
    hook.remove()


@pytest.mark.usefixtures("any_size")
def test_copies_do_not_outlive_the_batch_and_changed_weights_are_seen() -> None:
    model = build_model(ModelConfig(vocab_size=97, d_model=32, n_layers=2))
    before = generate(model, PROMPTS, GREEDY)
    assert all(module.product is None for module in model.modules() if isinstance(module, Multiplies))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    after = generate(model, PROMPTS, GREEDY)
    assert after != before
    assert after == generate(model, PROMPTS, GREEDY, static=True)  # which copies nothing


def test_copies_are_bounded_and_made_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = torch.zeros(1024, 1024)
    monkeypatch.setattr(packed, "COPIED_BYTES", weight_OI.nbytes + 1)
    packing = Packing(rows=4, tokens=packed.FROM_TOKENS)
    kinds = [packing._kind(weight_OI)]
    packing.product(weight_OI, None)
    kinds.append(packing._kind(weight_OI))
    assert kinds == ["packed", "stored"]
    assert Packing(4, packed.FROM_TOKENS - 1)._kind(weight_OI) == "stored"
    assert Packing(4, packed.FROM_TOKENS)._kind(weight_OI[:10]) == "stored"
    assert Packing(1, packed.FROM_TOKENS)._kind(weight_OI) == "transposed"
    assert Packing(1, packed.FROM_TOKENS)._kind(weight_OI[:1000]) == "stored"


@pytest.mark.usefixtures("any_size")
def test_an_encoders_weights_are_not_copied() -> None:
    model = build_model(VASWANI)
    assert model.encoder is not None
    with arranged_products(model, Packing(2, packed.FROM_TOKENS)):
        of_encoder = [module.product for module in model.encoder.modules() if isinstance(module, Multiplies)]
        assert of_encoder
        assert all(product is None for product in of_encoder)
        joined = [(module.joined, name) for name, module in model.named_modules() if isinstance(module, Joins)]
        copied = {name.split(".")[0] for product, name in joined if getattr(product, "func", None) is packed._multiply}
        assert copied == {"stack"}
