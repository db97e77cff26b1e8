"""A dense model becomes one with experts without changing a logit, or is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.adapt.upcycle import upcycled
from model.build import build_model
from model.config import LayerChange, ModelConfig
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import BalanceConfig, CapacityConfig, MoeConfig, RouterConfig
from model.ffns.experts.layer import MixtureOfExperts
from model.ffns.experts.routing import choose
from model.masks import Mask
from model.mixers.base import MixerInput
from tests.model.configurations import GPT2, LLAMA, VASWANI, llama_configs
from tests.model.small_presets import tiny

EXPERTS = MoeConfig(n_experts=4, top_k=2, d_ff=48)


@settings(max_examples=12, deadline=None)
@given(
    config=llama_configs(),
    experts=st.integers(2, 5),
    top_k=st.integers(2, 3),
    sigmoid=st.booleans(),
    shared=st.sampled_from([0, 7]),
    every=st.integers(1, 2),
)
def test_logits_at_step_zero_are_the_dense_models(
    config: ModelConfig, experts: int, top_k: int, sigmoid: bool, shared: int, every: int
) -> None:
    config = replace(config, ffn=replace(config.ffn, bias=False))
    moe = MoeConfig(
        n_experts=experts,
        top_k=min(top_k, experts),
        d_ff=config.ffn.d_ff,
        activation=config.ffn.activation,
        shared_d_ff=shared,
        router=RouterConfig(scores="sigmoid" if sigmoid else "softmax"),
        balance=BalanceConfig(bias_rate=0.001 if sigmoid else None),
    )
    first = min(every, config.n_layers) - 1
    target = replace(config, pattern=(LayerChange(every=every, first=first, ffn=moe),))
    dense, sparse = build_model(config, seed=3).eval(), build_model(target).eval()
    sparse.load_state_dict(upcycled(dense.state_dict(), config, target, seed=5))
    assert config.vocab_size is not None
    tokens_BT = torch.randint(0, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    expected, found = dense(tokens_BT)["logits"], sparse(tokens_BT)["logits"]
    assert (expected - found).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 2), (8, 3), (8, 8)])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_at_even_widths_with_enough_tokens_they_are_so_to_the_last_bit(experts: int, top_k: int, scores: Any) -> None:
    config = replace(LLAMA, d_model=64, ffn=replace(LLAMA.ffn, d_ff=192))
    moe = MoeConfig(n_experts=experts, top_k=top_k, d_ff=192, shared_d_ff=64, router=RouterConfig(scores=scores))
    target = replace(config, ffn=moe)
    dense, sparse = build_model(config, seed=3).eval(), build_model(target).eval()
    sparse.load_state_dict(upcycled(dense.state_dict(), config, target, seed=5))
    tokens_BT = torch.randint(0, 97, (3, 50), generator=torch.Generator().manual_seed(0))
    documents_BT = torch.ones_like(tokens_BT).int()
    documents_BT[1, 31:] = 0
    real_BT = documents_BT != 0
    expected, found = (model(tokens_BT, documents_BT=documents_BT)["logits"] for model in (dense, sparse))
    assert torch.equal(expected[real_BT], found[real_BT])


@pytest.mark.parametrize("experts", [8, 16, 64])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_token_whose_experts_have_four_tokens_each_gets_the_dense_networks_bits(
    experts: int, scores: Any, request: pytest.FixtureRequest
) -> None:
    """Products of fewer rows are summed in another order, which is all that can differ; on one thread, as several share
    the sums out by the number of rows. Which number that is depends on the CPU: some sum four rows in another order, too."""
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    config = replace(LLAMA, d_model=64, n_layers=1, ffn=replace(LLAMA.ffn, d_ff=128))
    target = replace(config, ffn=MoeConfig(n_experts=experts, d_ff=128, router=RouterConfig(scores=scores)))
    dense, sparse = build_model(config, seed=3).eval(), build_model(target).eval()
    sparse.load_state_dict(upcycled(dense.state_dict(), config, target))
    x_BTD = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(1))
    before, after = dense.stack.layers[0].ffn, sparse.stack.layers[0].ffn
    assert isinstance(after, MixtureOfExperts)
    expected_BTD, found_BTD = before(x_BTD, MixerInput(Mask()))[0], after(x_BTD, MixerInput(Mask()))[0]
    choices = choose(after.router(x_BTD), after.config)
    crowded_BT = (choices.load_BE.sum(0) >= 4)[choices.experts_BTJ].all(-1)
    assert crowded_BT.sum() >= 20
    assert (expected_BTD - found_BTD).abs().max() <= 1e-6 * expected_BTD.abs().max()
    if torch.equal(before(x_BTD[:1, :4], MixerInput(Mask()))[0], expected_BTD[:1, :4]):
        assert torch.equal(expected_BTD[crowded_BT], found_BTD[crowded_BT])


@pytest.mark.parametrize("name", ["t5-small", "t5-v1.1-small", "transformer-base"])
@pytest.mark.parametrize("both", [False, True])
def test_a_model_with_an_encoder_loads_its_upcycled_weights(name: str, both: bool) -> None:
    config = tiny(name)
    assert config.encoder is not None
    config = replace(
        config,
        ffn=replace(config.ffn, bias=False),
        encoder=replace(config.encoder, n_layers=2, ffn=replace(config.encoder.ffn, bias=False)),
    )
    assert config.encoder is not None
    ffn = config.ffn
    assert isinstance(ffn, FfnConfig)
    moe = MoeConfig(n_experts=4, d_ff=ffn.d_ff, activation=ffn.activation, gated=ffn.gated)
    second = (LayerChange(every=2, first=1, ffn=moe),)
    target = replace(
        config, pattern=second, encoder=replace(config.encoder, pattern=second) if both else config.encoder
    )
    dense, sparse = build_model(config, seed=3).eval(), build_model(target).eval()
    sparse.load_state_dict(upcycled(dense.state_dict(), config, target, seed=5))
    generator = torch.Generator().manual_seed(0)
    inputs = {part: torch.randint(0, 97, (2, 12), generator=generator) for part in ("tokens_BT", "encoder_tokens_BT")}
    expected, found = dense(**inputs)["logits"], sparse(**inputs)["logits"]
    assert (expected - found).abs().max() <= 2e-6 * expected.abs().max()


def test_routers_differ_by_seed_and_layer_and_experts_are_copies() -> None:
    target = replace(LLAMA, ffn=EXPERTS)
    state = build_model(LLAMA).state_dict()
    one, two = (upcycled(state, LLAMA, target, seed=seed) for seed in (0, 1))
    router = "stack.layers.{}.ffn.router.weight"
    assert not torch.equal(one[router.format(0)], two[router.format(0)])
    assert not torch.equal(one[router.format(0)], one[router.format(1)])
    for expert in range(4):
        assert torch.equal(one["stack.layers.0.ffn.experts.down"][expert], state["stack.layers.0.ffn.down.weight"])


@pytest.mark.parametrize(
    ("config", "target", "said"),
    [
        (LLAMA, replace(LLAMA, ffn=replace(EXPERTS, d_ff=24)), "same d_ff"),
        (LLAMA, replace(LLAMA, ffn=replace(EXPERTS, router=RouterConfig(renormalize=False))), "sum to one"),
        (LLAMA, replace(LLAMA, ffn=replace(EXPERTS, capacity=CapacityConfig(factor=2.0))), "factor=2.0"),
        (LLAMA, replace(LLAMA, ffn=EXPERTS, max_seq_len=32), "ffn of its layers only"),
        (GPT2, replace(GPT2, ffn=replace(EXPERTS, gated=False, activation="gelu_tanh")), "no biases"),
        (replace(LLAMA, ffn=EXPERTS), replace(LLAMA, ffn=replace(EXPERTS, n_experts=8)), "a dense network"),
        (VASWANI, replace(VASWANI, encoder=replace(VASWANI.encoder, max_seq_len=32)), "ffn of its layers only"),
        (VASWANI, replace(VASWANI, encoder=replace(VASWANI.encoder, ffn=EXPERTS)), "encoder layer 0 has a dense"),
    ],
)
def test_a_target_that_could_not_compute_the_same_is_refused(
    config: ModelConfig, target: ModelConfig, said: str
) -> None:
    state = build_model(config).state_dict()
    with pytest.raises(Refusal, match=said):
        upcycled(state, config, target)
