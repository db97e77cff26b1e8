"""Closed forms against counts: parameters, FLOPs, cache and activation bytes."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model.block import Layout
from model.build import build_model
from model.config import LayerChange, ModelConfig
from model.costs import (
    activation_bytes,
    attended_pairs,
    forward_flops,
    kv_cache_bytes,
    parameter_counts,
    row_and_once_bytes,
    train_flops_per_token,
)
from model.ffns.dense import FfnConfig, NoFfnConfig
from model.ffns.experts.layer import MixtureOfExperts
from model.kernels.attention import Mask, dense, dense_attention
from model.kernels.linear_attention import CHUNK
from model.mixers.attention import KeyValueState
from model.mixers.base import MixerInput
from model.mixers.bigbird import BigBirdAttention, BigBirdConfig
from model.mixers.linear_attention import LinearAttentionConfig
from model.mixers.mamba import MambaConfig
from tests.model.configurations import (
    GPT2,
    HYBRID,
    LINEAR,
    LLAMA,
    MAMBA,
    MIXTRAL,
    PERFORMER,
    WINDOWED,
    any_config,
    recurrent_config,
)
from tests.model.learning import kept_bytes


def with_wider_last(config: ModelConfig) -> ModelConfig:
    change = LayerChange(every=2, first=config.n_layers - 1, ffn=FfnConfig(d_ff=29))
    return replace(config, pattern=(*config.pattern, change))


@settings(max_examples=40, deadline=None)
@given(
    config=st.one_of(any_config(), recurrent_config()), layout=st.sampled_from(get_args(Layout)), wider=st.booleans()
)
def test_parameters_are_those_of_the_built_model(config: ModelConfig, layout: str, wider: bool) -> None:
    config = replace(with_wider_last(config) if wider else config, layout=layout)
    model, counts = build_model(config, device="meta"), parameter_counts(config)
    idle = 0
    for block in model.stack.layers:
        if isinstance(block.ffn, MixtureOfExperts):
            chosen, experts = block.ffn.config.top_k, block.ffn.config.n_experts
            idle += sum(p.numel() for p in block.ffn.experts.parameters()) * (experts - chosen) // experts
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.active == counts.total - idle
    assert counts.embedding == sum(parameter.numel() for parameter in model.frontend.parameters())


@settings(max_examples=15, deadline=None)
@given(config=any_config(), rows=st.integers(1, 3), tokens=st.integers(2, 20), wider=st.booleans())
def test_flops_are_those_torch_counts_forward_and_backward(
    config: ModelConfig, rows: int, tokens: int, wider: bool
) -> None:
    config = with_wider_last(config) if wider else config
    model = build_model(config, kernel="dense")
    batch = torch.zeros(rows, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        logits = model(batch)["logits"]
    expected = forward_flops(config, rows=rows, seq_len=tokens, masked=False)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * expected


def test_of_a_scan_torch_counts_the_projections_and_of_linear_attention_each_chunks_products_too() -> None:
    tokens, batch = 2 * CHUNK, torch.zeros(3, 2 * CHUNK, dtype=torch.int64)
    for config in (MAMBA, HYBRID, LINEAR, PERFORMER):
        config = replace(config, max_seq_len=tokens)
        with FlopCounterMode(display=False) as forward:
            build_model(config, kernel="dense")(batch)
        beside = 0
        for layer in config.layers:
            if isinstance(layer.mixer, MambaConfig):
                beside -= layer.mixer.costs(32, config.norm).token_flops
            elif isinstance(layer.mixer, LinearAttentionConfig):
                beside += 4 * 2 * CHUNK * (layer.mixer.n_features(32) + 8 + 1)
        expected = forward_flops(config, rows=3, seq_len=tokens, masked=False) + 3 * tokens * beside
        assert forward.get_total_flops() == expected


def test_a_recurrence_costs_what_its_definition_multiplies_and_adds() -> None:
    mixer = LinearAttentionConfig(n_heads=2)
    token, norm = mixer.costs(8, LLAMA.norm).token_flops, LLAMA.norm
    assert token == 2 * 2 * 2 * 4 * 5  # heads, update and reading, multiply and add, features, channels and a one
    mamba = MambaConfig(d_state=3, d_conv=4).costs(8, norm)
    assert mamba.token_flops == 16 * (2 * 4 + 3 * (1 + 1 + 2 + 2) + 1 + 2 + 1)


def test_the_training_step_as_it_runs_costs_three_forward_passes() -> None:
    model = build_model(LLAMA, kernel="dense")
    batch = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as step:
        model(batch, targets_BT=batch)["loss_sum"].backward()
    assert step.get_total_flops() == 3 * forward_flops(LLAMA, rows=2, seq_len=16, masked=False)


@given(st.integers(1, 12), st.integers(1, 6))
def test_attended_pairs_are_those_of_the_mask(length: int, documents: int) -> None:
    tokens = length * documents
    numbers = torch.arange(documents, dtype=torch.int32).repeat_interleave(length)[None] + 1
    cpu = torch.device("cpu")
    assert attended_pairs(tokens) == int(dense(Mask(), tokens, tokens, cpu).sum())
    for window in range(1, tokens + 2):
        counted = int(dense(Mask(window=window), tokens, tokens, cpu).sum())
        assert attended_pairs(tokens, None, window) == pytest.approx(counted)
        both_ways = int(dense(Mask(causal=False, window=window), tokens, tokens, cpu).sum())
        assert attended_pairs(tokens, None, window, causal=False) == pytest.approx(both_ways)
    assert attended_pairs(tokens, length) == int(dense(Mask(documents_BT=numbers), tokens, tokens, cpu).sum())


@pytest.mark.parametrize("drawn_in_eval", [True, False], ids=["drawn", "the first again"])
@pytest.mark.parametrize("random_blocks", [0, 1, 3])
def test_bigbirds_pairs_are_those_of_its_layout(random_blocks: int, drawn_in_eval: bool) -> None:
    config = BigBirdConfig(n_heads=2, block=4, random_blocks=random_blocks, drawn_in_eval=drawn_in_eval)
    attention = config.build(8, LLAMA.norm, dense_attention).eval()
    assert isinstance(attention, BigBirdAttention)
    for tokens in (1, 20, 21, 44, 45, 46, 47, 48, 49, 83, 200):
        mask = attention.mask(MixerInput(Mask(causal=False)), tokens)
        seen = dense(mask, tokens, tokens, torch.device("cpu"))
        counted = seen if mask.layout_HQJ is None else seen * spread(mask.layout_HQJ, tokens)
        assert (counted.sum((-1, -2)) == config.pairs(tokens)).all(), tokens
    costs = BigBirdConfig().costs(512, LLAMA.norm)
    assert costs.pattern is not None and costs.pattern.pairs(4096) == 2_547_712


def spread(layout_HQJ: torch.Tensor, tokens: int) -> torch.Tensor:
    """How many times each pair of a query and a key counts, in blocks of 4."""
    return layout_HQJ.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :tokens, :tokens]


def test_packed_documents_cost_less_and_a_token_of_training_three_of_forward() -> None:
    whole, packed = train_flops_per_token(LLAMA, 64), train_flops_per_token(LLAMA, 64, 8)
    assert whole - packed == pytest.approx(3 * 4 * 2 * 4 * 8 * (65 - 9) / 2)  # layers 2, heads 4, channels 8
    assert whole * 64 == pytest.approx(3 * forward_flops(LLAMA, rows=1, seq_len=64))


@pytest.mark.parametrize("config", [LLAMA, GPT2, WINDOWED], ids=["llama", "gpt2", "windowed"])
def test_cache_bytes_are_those_of_the_cache(config: ModelConfig) -> None:
    cache = build_model(config).new_cache(3, 64)
    states = [state for state in cache.states if isinstance(state, KeyValueState)]
    held = sum(state.k_BKSC.nbytes + state.v_BKSC.nbytes for state in states)
    assert kv_cache_bytes(config, rows=3, tokens=64, dtype_bytes=4) == held


@pytest.mark.parametrize("config", [MAMBA, LINEAR, PERFORMER, HYBRID], ids=["mamba", "linear", "performer", "hybrid"])
def test_a_states_bytes_are_those_of_the_cache_at_any_length(config: ModelConfig) -> None:
    model = build_model(config, dtype=torch.bfloat16)
    for tokens in (64, 640):
        tensors = [tensor for state in model.new_cache(3, tokens).states for tensor in vars(state).values()]
        held = sum(tensor.nbytes for tensor in tensors)
        assert kv_cache_bytes(config, rows=3, tokens=tokens, dtype_bytes=2) == held


FAMILIES = pytest.mark.parametrize("family", [LLAMA, GPT2, MIXTRAL], ids=["llama", "gpt2", "mixtral"])
EVERY = pytest.mark.parametrize(
    "family",
    [LLAMA, GPT2, MIXTRAL, MAMBA, LINEAR, PERFORMER, HYBRID],
    ids=["llama", "gpt2", "mixtral", "mamba", "linear", "performer", "hybrid"],
)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ROWS, TOKENS = 4, 128


@PRECISIONS
@EVERY
def test_activation_bytes_are_those_the_backward_pass_is_left(family: ModelConfig, dtype: torch.dtype) -> None:
    config = replace(family, d_model=64, n_layers=4, max_seq_len=TOKENS)
    logits_not_kept = ROWS * TOKENS * 97 * (8 + dtype.itemsize)
    weight_not_kept = 0 if dtype == torch.float32 else 97 * 64 * dtype.itemsize
    expected = activation_bytes(config, ROWS, TOKENS, dtype.itemsize) - logits_not_kept - weight_not_kept
    if config.norm.kind == "rms":  # PyTorch's composite on CPUs, as the docstring says
        norms = sum(1 if isinstance(layer.ffn, NoFfnConfig) else 2 for layer in config.layers)
        elements = ROWS * TOKENS * (norms + 1) * 64
        expected += elements * (4 if dtype == torch.float32 else 8 - dtype.itemsize)
    assert kept_bytes(config, ROWS, TOKENS, dtype) == pytest.approx(expected, rel=0.04)


def test_the_loss_over_a_vocabulary_takes_no_more_memory_for_more_rows() -> None:
    config = replace(LLAMA, vocab_size=128_256, d_model=4096)
    row, once = row_and_once_bytes(config, 2048, 2)
    # 8,192 tokens' logits and a bf16 weight with two gradients, one of them fp32: 2 GiB each but for the bf16 ones.
    assert once == 128_256 * (8192 * 2 + 4096 * (2 + 2 + 4)) + 8 * 2**22
    assert activation_bytes(config, 32, 2048, 2) == 32 * row + once


@PRECISIONS
@FAMILIES
def test_with_recomputation_a_layer_more_keeps_its_input_more(family: ModelConfig, dtype: torch.dtype) -> None:
    shallow, deep = (replace(family, d_model=64, n_layers=layers, max_seq_len=TOKENS) for layers in (2, 5))
    formula = [activation_bytes(c, ROWS, TOKENS, dtype.itemsize, recompute=True) for c in (shallow, deep)]
    found = [kept_bytes(c, ROWS, TOKENS, dtype, recompute=True) for c in (shallow, deep)]
    assert found[1] - found[0] == formula[1] - formula[0] == 3 * ROWS * TOKENS * 64 * dtype.itemsize
