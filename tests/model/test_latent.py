"""Latent attention, and DeepSeek-V3 as a whole: Hugging Face's class is the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from conf.refusal import Refusal
from model.adapt import LoraConfig, attach_lora
from model.build import build_model
from model.config import LayerChange
from model.costs import activation_bytes, forward_flops, kv_cache_bytes, parameter_counts
from model.decoding.beam import BeamConfig, beam_generate
from model.decoding.generate import Sampling, generate, unpadded
from model.ffns.experts.layer import rebalance
from model.ffns.experts.receipts import loads, receipts
from model.interop import config_from_hf, from_hf, hf_config, to_hf
from model.kernels.check import check_kernels
from model.mixers.latent import LatentAttentionConfig, LatentState
from model.positions.none import NoPositionConfig
from model.positions.rope import YarnScaling
from tests.model.configurations import LATENT, preset
from tests.model.learning import kept_bytes, learn
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
    trimmed,
)

pytestmark = pytest.mark.slow  # whole models beside transformers' own

CLASS = transformers.DeepseekV3ForCausalLM
TOKENS = 15


@st.composite
def described(draw: st.DrawFn) -> transformers.DeepseekV3Config:
    """A DeepSeek-V3 of theirs of any shape that is small."""
    layers, groups, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    top_groups = draw(st.integers(1, groups))
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "beta_fast": 4, "beta_slow": 0.3}
    yarn |= {"mscale": 0.7, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
    return transformers.DeepseekV3Config(
        vocab_size=draw(st.integers(17, 70)),
        hidden_size=draw(st.sampled_from([8, 12, 20])),
        intermediate_size=draw(st.integers(3, 40)),
        moe_intermediate_size=draw(st.integers(3, 12)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers - 1)),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=draw(st.sampled_from([None, 5, 10])),
        kv_lora_rank=draw(st.integers(3, 12)),
        qk_nope_head_dim=draw(st.integers(1, 8)),
        qk_rope_head_dim=draw(st.sampled_from([2, 4, 6])),
        v_head_dim=draw(st.sampled_from([3, 8, 20])),
        n_shared_experts=draw(st.integers(1, 2)),
        n_routed_experts=groups * draw(st.integers(2, 3)),
        n_group=groups,
        topk_group=top_groups,
        num_experts_per_tok=draw(st.integers(1, 2 * top_groups)),
        norm_topk_prob=False,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        rope_parameters=draw(st.sampled_from([None, yarn])),
        rope_interleave=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-4])),
        max_position_embeddings=64,
        num_nextn_predict_layers=0,
    )


def made(config: transformers.DeepseekV3Config) -> transformers.PreTrainedModel:
    """Their model with biases of selection that count; norm_topk_prob wherever more than one expert is chosen."""
    config.norm_topk_prob = config.num_experts_per_tok > 1
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    theirs = stirred(CLASS(config))
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.1)
    return theirs


def inputs(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_BT = torch.randint(2, vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    real_BT = torch.ones_like(tokens_BT)
    real_BT[1, 9:] = 0
    return tokens_BT, real_BT


@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(config=described())
def test_logits_gradients_and_bytes_are_the_references(config: transformers.DeepseekV3Config) -> None:
    theirs = made(config)
    ours, (tokens_BT, real_BT) = imported(theirs), inputs(config.vocab_size)
    targets_BT = tokens_BT.roll(-1, 1).masked_fill(real_BT == 0, -100)
    expected = theirs(input_ids=tokens_BT, attention_mask=real_BT).logits
    assert_close(expected[real_BT != 0], ours(tokens_BT, documents_BT=real_BT.int())["logits"][real_BT != 0])
    sums = ours(tokens_BT, targets_BT=targets_BT, documents_BT=real_BT.int())
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    assert abs(loss - sums["loss_sum"]) <= 1e-5 * loss
    loss.backward()
    sums["loss_sum"].backward()
    assert_same_bytes(saved(theirs), ours)
    again = exported(ours, CLASS)
    again.set_experts_implementation("eager")
    assert_close(expected, again(input_ids=tokens_BT, attention_mask=real_BT).logits, within=1e-5)
    biases = {name for name in saved(theirs) if name.endswith("e_score_correction_bias")}
    assert len(biases) == config.num_hidden_layers - config.first_k_dense_replace
    gradients = {name: gradient for name, gradient in saved_gradients(theirs).items() if name not in biases}
    assert_same_gradients(gradients, gradients_of(ours))


@pytest.mark.parametrize("beams", [1, 3])
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(config=described())
def test_it_continues_as_transformers_does(beams: int, config: transformers.DeepseekV3Config) -> None:
    theirs = made(config)
    ours, (tokens_BT, _) = imported(theirs), inputs(config.vocab_size)
    real_BT = torch.ones_like(tokens_BT)
    real_BT[1, :6] = 0  # their prompts are padded on the left
    sampling = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    expected = theirs.generate(tokens_BT, attention_mask=real_BT, num_beams=beams, **sampling)[:, TOKENS:]
    prompts, greedy = unpadded(tokens_BT, real_BT), Sampling(max_new_tokens=12, temperature=0.0)
    if beams == 1:
        found = generate(ours, prompts, greedy, stop_ids=[1])
    else:
        texts = beam_generate(ours, prompts, greedy, BeamConfig(beams=beams), stop_ids=[1])
        found = [best.tokens for best, *_ in texts]
    for row, text in zip(expected.tolist(), found, strict=True):
        assert text == trimmed(row, [1])


def test_the_layer_that_predicts_one_token_further_is_left_out_and_fused_tensors_are_read() -> None:
    theirs = made(described_once())
    state = saved(theirs)
    further = {name.replace("layers.1.", "layers.2."): t for name, t in state.items() if "layers.1." in name}
    config, ours = from_hf(
        theirs.config.to_dict(), {**state, **further, "model.layers.2.eh_proj.weight": torch.ones(1)}
    )
    fused = to_hf(ours, config, in_memory=True)
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused
    again = from_hf(theirs.config.to_dict(), fused)[1]
    assert all(torch.equal(ours[name], tensor) for name, tensor in again.items())


def described_once() -> transformers.DeepseekV3Config:
    return transformers.DeepseekV3Config(
        vocab_size=30, hidden_size=8, intermediate_size=10, moe_intermediate_size=4, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=4,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, num_nextn_predict_layers=0,
    )  # fmt: skip


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("absorbed", [True, False])
def test_cached_decoding_through_the_latents_is_the_whole_pass(static: bool, absorbed: bool) -> None:
    yarn = YarnScaling(factor=4.0, original_max_seq_len=8, mscale=1.0, mscale_all=1.0)
    for config in (LATENT, replace(LATENT, position=replace(LATENT.position, scaling=yarn))):
        model = build_model(config, seed=1)
        tokens_BT = torch.randint(0, 97, (3, 14), generator=torch.Generator().manual_seed(0))
        with torch.set_grad_enabled(not absorbed):
            whole = model(tokens_BT)["logits"]
            cache = model.new_cache(3, 20, static=static)
            pieces = [model(piece, cache=cache)["logits"] for piece in tokens_BT.split([5, 1, 3, 1, 4], dim=1)]
            assert (torch.cat(pieces, 1) - whole).abs().max() <= 2e-5 * whole.abs().max()
            cache.rewind([4, 10, 7])
            cache.reorder([2, 0, 0])
            found = model(torch.tensor([[11], [12], [13]]), cache=cache)["logits"][:, 0]
            for row, (source, length, token) in enumerate([(2, 7, 11), (0, 4, 12), (0, 4, 13)]):
                alone = torch.cat([tokens_BT[source, :length], torch.tensor([token])])[None]
                expected = model(alone)["logits"][0, -1]
                assert (found[row] - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_map_with_an_adapter_is_not_taken_for_its_weight() -> None:
    model = build_model(LATENT, seed=1)
    attach_lora(model, LoraConfig(rank=2))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    tokens_BT = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache = model(tokens_BT)["logits"], model.new_cache(2, 12)
        pieces = [model(piece, cache=cache)["logits"] for piece in tokens_BT.split([4, 1, 4], dim=1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("v_dim", [6, 30])
def test_kernels_agree_where_values_are_narrower_or_wider_than_keys(v_dim: int) -> None:
    config = replace(LATENT, mixer=replace(LATENT.mixer, v_dim=v_dim))
    tokens_BT = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    documents_BT = torch.ones_like(tokens_BT).int()
    documents_BT[:, 17:], documents_BT[1, 33:] = 2, 0
    found = {}
    for kernel in ("dense", "sdpa", "auto", "chunked"):
        model = build_model(config, seed=2, kernel=kernel)
        out = model(tokens_BT, documents_BT=documents_BT, targets_BT=tokens_BT.masked_fill(documents_BT == 0, -100))
        out["loss_sum"].backward()
        found[kernel] = [out["loss_sum"].detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        assert check_kernels(model, device=torch.device("cpu"), dtype=torch.float32, tokens=32) == []
    for kernel, results in found.items():
        for expected, ours in zip(found["dense"], results, strict=True):
            assert (expected - ours).abs().max() <= 1e-4 * expected.abs().max(), kernel


@pytest.mark.parametrize("q_rank", [None, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_costs_are_counted(q_rank: int | None, bias: bool) -> None:
    config = replace(LATENT, mixer=replace(LATENT.mixer, q_rank=q_rank, bias=bias))
    model = build_model(config, kernel="dense")
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as forward:
        logits = model(torch.zeros(2, 12, dtype=torch.int64))["logits"]
    expected = forward_flops(config, rows=2, seq_len=12, masked=False)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * expected
    states = [state for state in model.new_cache(3, 64).states if isinstance(state, LatentState)]
    held = sum(state.latent_BSR.nbytes for state in states)
    assert len(states) == 2
    assert kv_cache_bytes(config, rows=3, tokens=64, dtype_bytes=4) == held == 2 * 3 * 64 * (12 + 4) * 4


def test_activations_are_those_the_backward_pass_is_left() -> None:
    config = replace(LATENT, d_model=64, n_layers=4, max_seq_len=128, mixer=replace(LATENT.mixer, q_rank=24))
    expected = activation_bytes(config, 4, 128, 4) - 4 * 128 * 97 * 12
    expected += 4 * 128 * (9 * 64 + 4 * (24 + 12)) * 4  # PyTorch's composite RMSNorm on CPUs
    assert kept_bytes(config, 4, 128, torch.float32) == pytest.approx(expected, rel=0.04)


def test_it_works_without_positions_and_in_both_directions() -> None:
    for config in (replace(LATENT, position=NoPositionConfig()), replace(LATENT, causal=False)):
        assert build_model(config)(torch.zeros(2, 5, dtype=torch.int64))["logits"].isfinite().all()


def test_the_preset_is_the_published_model() -> None:
    config = preset("deepseek-v3", vocab_size=129280)
    with torch.device("meta"):
        theirs = CLASS(transformers.DeepseekV3Config(num_nextn_predict_layers=0))
    counts = parameter_counts(config)
    assert counts.total == sum(parameter.numel() for parameter in theirs.parameters())
    assert counts.active == pytest.approx(37e9, rel=0.02)
    assert config_from_hf(hf_config(config)).layers == config.layers
    assert config_from_hf(hf_config(config)).position == config.position


def test_the_preset_made_small_learns_and_keeps_its_experts_busy() -> None:
    mixer = {"kind": "latent", "n_heads": 4, "q_rank": 16, "kv_rank": 12, "plain_dim": 8, "rope_dim": 4, "v_dim": 8}
    experts = replace(preset("deepseek-v3").layers[3].ffn, n_experts=16, top_k=4, d_ff=24, shared_d_ff=24)  # type: ignore[arg-type]
    sizes = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "max_seq_len": 64, "mixer": mixer}
    small = preset("deepseek-v3", **sizes, ffn={"kind": "dense", "d_ff": 64}, pattern=[])
    model = build_model(replace(small, pattern=(LayerChange(first=1, ffn=experts),))).train()
    row = torch.randint(0, 50, (8, 25), generator=torch.Generator().manual_seed(0))
    told: dict[str, float] = {}

    def loss() -> torch.Tensor:
        out = model(row[:, :-1], targets_BT=row[:, 1:])
        rebalance(model, loads(out))
        told.update(receipts(out))
        return out["loss_sum"] / out["target_count"]

    losses = learn(model, loss, steps=20, lr=5e-3)
    assert losses[-1] < losses[0] - 1
    assert told["routing/1/dead_experts"] == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LatentAttentionConfig(kv_rank=0), "kv_rank = 0"),
        (lambda: LatentAttentionConfig(q_rank=0), "q_rank = 0"),
        (lambda: LatentAttentionConfig(rope_dim=3), "rope_dim = 3"),
        (lambda: YarnScaling(beta_slow=40.0), "beta_slow=40.0"),
        (
            lambda: hf_config(replace(LATENT, ffn=replace(preset("deepseek-v3").layers[3].ffn, shared_d_ff=7))),
            "multiple of ffn.d_ff",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()
