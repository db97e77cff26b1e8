"""Mixtures of experts: routing and layers against Hugging Face's, drops counted, noise a function, losses once."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from conf.refusal import Refusal
from model.build import build_model
from model.config import LayerChange, ModelConfig
from model.costs import parameter_counts
from model.ffns.dense import FfnConfig
from model.ffns.experts.config import BalanceConfig, CapacityConfig, MoeConfig, RouterConfig
from model.ffns.experts.layer import MixtureOfExperts, rebalance
from model.ffns.experts.receipts import is_count, loads, receipts
from model.ffns.experts.routing import choose
from model.kernels.grouped import Gather, Scatter, by_expert, grouped_matmul
from model.masks import Mask
from model.mixers.base import MixerInput
from model.noise import row_keys, uniform
from tests.model.configurations import LIVELY, LLAMA, preset
from tests.model.learning import (
    assert_micro_batches_change_nothing,
    assert_recomputation_changes_nothing,
    sums_and_gradients,
)

QUICK = settings(max_examples=15, deadline=None)
EXPERTS = MoeConfig(n_experts=4, top_k=2, d_ff=24)
MOE = replace(LLAMA, ffn=EXPERTS)
EVERY_SECOND = replace(LLAMA, pattern=(LayerChange(every=2, first=1, ffn=EXPERTS),))


def layer(config: MoeConfig, d_model: int, seed: int = 0) -> MixtureOfExperts:
    made = MixtureOfExperts(config, d_model, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return made


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*module.parameters(), *module.buffers()]:
            parameter.normal_(0, 0.3, generator=generator)
    return module.eval()


def assert_same_function(ours: MixtureOfExperts, theirs: torch.nn.Module, x_BTD: torch.Tensor) -> None:
    """Outputs and gradients of the input within 1e-5 of the largest."""
    mine, other = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    y_BTD, expected_BTD = ours(mine, MixerInput(Mask()))[0], theirs(other * 1)
    assert (y_BTD - expected_BTD).abs().max() <= 1e-5 * expected_BTD.abs().max()
    weights_BTD = torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(3))
    (y_BTD * weights_BTD).sum().backward()
    (expected_BTD * weights_BTD).sum().backward()
    assert mine.grad is not None
    assert other.grad is not None
    assert (mine.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max()


SIZES = {"experts": st.sampled_from([2, 4, 6]), "width": st.sampled_from([8, 10]), "hidden": st.integers(3, 9)}


@QUICK
@given(**SIZES, top_k=st.integers(1, 2), qwen=st.booleans(), renormalize=st.booleans())
def test_softmax_routing_is_mixtrals_and_qwens(
    experts: int, width: int, hidden: int, top_k: int, qwen: bool, renormalize: bool
) -> None:
    renormalize = (renormalize or not qwen) and top_k > 1
    if not qwen and top_k == 1:
        top_k, renormalize = 2, True
    sizes: dict[str, Any] = {"hidden_size": width, "num_experts_per_tok": top_k}
    theirs = stirred(
        Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(**sizes, num_experts=experts, moe_intermediate_size=hidden, norm_topk_prob=renormalize)
        )
        if qwen
        else MixtralSparseMoeBlock(MixtralConfig(**sizes, num_local_experts=experts, intermediate_size=hidden))
    )
    ours = layer(
        MoeConfig(n_experts=experts, top_k=top_k, d_ff=hidden, router=RouterConfig(renormalize=renormalize)), width
    ).eval()
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            "router.weight": state["gate.weight"],
            "experts.gate_up": state["experts.gate_up_proj"],
            "experts.down": state["experts.down_proj"],
        }
    )
    assert_same_function(ours, theirs, torch.randn(2, 7, width))


@QUICK
@given(
    per_group=st.integers(2, 3),
    groups=st.sampled_from([1, 2, 4]),
    renormalize=st.booleans(),
    shared=st.integers(1, 2),
    hidden=st.integers(3, 9),
)
def test_sigmoid_groups_bias_and_shared_experts_are_deepseeks(
    per_group: int, groups: int, renormalize: bool, shared: int, hidden: int
) -> None:
    top_groups = max(1, groups // 2)
    theirs = stirred(
        DeepseekV3MoE(
            DeepseekV3Config(
                hidden_size=8,
                n_routed_experts=per_group * groups,
                num_experts_per_tok=2,
                moe_intermediate_size=hidden,
                n_shared_experts=shared,
                n_group=groups,
                topk_group=top_groups,
                norm_topk_prob=renormalize,
                routed_scaling_factor=2.5,
            )
        )
    )
    router = RouterConfig(scores="sigmoid", renormalize=renormalize, scale=2.5, groups=groups, top_groups=top_groups)
    config = MoeConfig(
        n_experts=per_group * groups,
        d_ff=hidden,
        shared_d_ff=shared * hidden,
        router=router,
        balance=BalanceConfig(bias_rate=0.001),
    )
    ours, state = layer(config, 8).eval(), theirs.state_dict()
    ours.load_state_dict(
        {
            "router.weight": state["gate.weight"],
            "selection_bias": state["gate.e_score_correction_bias"],
            "experts.gate_up": state["experts.gate_up_proj"],
            "experts.down": state["experts.down_proj"],
            **{f"shared.{name}.weight": state[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")},
        }
    )
    assert_same_function(ours, theirs, torch.randn(2, 7, 8))


@QUICK
@given(**SIZES, capacity=st.integers(1, 6))
def test_top_one_with_a_capacity_for_each_row_is_switchs(experts: int, width: int, hidden: int, capacity: int) -> None:
    theirs = stirred(
        SwitchTransformersSparseMLP(
            SwitchTransformersConfig(
                d_model=width, d_ff=hidden, num_experts=experts, expert_capacity=capacity, dropout_rate=0.0
            )
        )
    )
    config = MoeConfig(
        n_experts=experts,
        top_k=1,
        d_ff=hidden,
        activation="relu",
        gated=False,
        router=RouterConfig(renormalize=False),
        capacity=CapacityConfig(tokens=capacity),
    )
    ours, state = layer(config, width).eval(), theirs.state_dict()
    each = [f"experts.expert_{expert}" for expert in range(experts)]
    ours.load_state_dict(
        {
            "router.weight": state["router.classifier.weight"],
            "experts.up": torch.stack([state[f"{name}.wi.weight"] for name in each]),
            "experts.down": torch.stack([state[f"{name}.wo.weight"] for name in each]),
        }
    )
    x_BTD = torch.randn(3, 9, width)
    assert_same_function(ours, theirs, x_BTD)
    record = ours(x_BTD, MixerInput(Mask()))[1]
    chosen_BTE, _, _ = theirs.router(x_BTD)  # after the drops
    assert torch.equal(record["kept_E"], chosen_BTE.sum((0, 1)))
    assert int(record["load_E"].sum()) == 3 * 9


def plain_gshard(logits_TE: torch.Tensor, chance_T: torch.Tensor, limit: int) -> list[list[tuple[int, float]]]:
    """(expert, weight) of what each token of a row reaches, in the words of GShard's Algorithm 1."""
    gates = logits_TE.softmax(-1).tolist()
    best = [sorted(range(len(row)), key=lambda e, row=row: -row[e])[:2] for row in gates]
    taken, reached = [0] * logits_TE.shape[1], [[] for _ in gates]
    for rank in (0, 1):
        for t, row in enumerate(gates):
            weight = row[best[t][rank]] / (row[best[t][0]] + row[best[t][1]])
            if rank == 1 and 2 * weight <= float(chance_T[t]):
                continue
            if taken[best[t][rank]] < limit:
                reached[t].append((best[t][rank], weight))
            taken[best[t][rank]] += 1
    return reached


@QUICK
@given(seed=st.integers(0, 1000), factor=st.sampled_from([0.5, 1.0, 1.5]))
def test_gshard_keeps_second_experts_by_chance_and_first_choices_first(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BTE, chance_BT = torch.randn(2, 8, 4, generator=generator), torch.rand(2, 8, generator=generator)
    config = replace(EXPERTS, router=RouterConfig(second_by_chance=True), capacity=CapacityConfig(factor=factor))
    choices = choose(logits_BTE, config, chance_BT=chance_BT)
    for row in range(2):
        expected = plain_gshard(logits_BTE[row], chance_BT[row], math.ceil(factor * 2 * 8 / 4))
        for t in range(8):
            kept = choices.kept_BTJ[row, t]
            found = list(
                zip(choices.experts_BTJ[row, t][kept].tolist(), choices.weights_BTJ[row, t][kept].tolist(), strict=True)
            )
            assert [e for e, _ in found] == [e for e, _ in expected[t]]
            assert [w for _, w in found] == pytest.approx([w for _, w in expected[t]])


def test_a_second_expert_is_kept_as_often_as_twice_its_weight() -> None:
    keys_B = row_keys(torch.arange(64).view(64, 1))
    chance_BT = uniform(keys_B, seed=0, layer=0, tokens=500, draws=1)[..., 0]
    logits_BTE = torch.tensor([1.0, 0.0, -9.0]).expand(64, 500, 3)
    config = MoeConfig(n_experts=3, router=RouterConfig(second_by_chance=True))
    weight = 1 / (1 + math.e)
    kept = choose(logits_BTE, config, chance_BT=chance_BT).kept_BTJ[..., 1].float().mean().item()
    assert kept == pytest.approx(2 * weight, abs=4 * 0.5 / (64 * 500) ** 0.5)


@QUICK
@given(
    seed=st.integers(0, 1000),
    experts=st.integers(1, 5),
    inputs=st.sampled_from([8, 5]),
    outputs=st.sampled_from([16, 7]),
    keep=st.floats(0, 1),
    tokens=st.sampled_from([6, 150]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_grouped_product_is_each_rows_own_and_nothing_behind_the_last_group(
    seed: int, experts: int, inputs: int, outputs: int, keep: float, tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(tokens, inputs, generator=generator).to(dtype).requires_grad_()
    weight_EFD = torch.randn(experts, outputs, inputs, generator=generator).to(dtype).requires_grad_()
    experts_NJ = torch.randint(0, experts, (tokens, 2), generator=generator)
    kept_NJ = torch.rand(tokens, 2, generator=generator) < keep
    weights_NJ = torch.rand(tokens, 2, generator=generator).requires_grad_()
    to = by_expert(experts_NJ, kept_NJ, experts)
    y_QF = grouped_matmul(Scatter.apply(x_ND, to.order_Q, to.place_Q), weight_EFD, to.ends_E)
    y_NF = Gather.apply(y_QF, weights_NJ, to.order_Q, to.place_Q)
    leaves = (x_ND, weight_EFD, weights_NJ)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    products_NJF = torch.einsum("nd,njfd->njf", wide[0], wide[1][experts_NJ])
    expected_NF = (products_NJF * (wide[2] * kept_NJ)[..., None]).sum(1)
    grad_NF = torch.randn(tokens, outputs, generator=generator).to(dtype)
    found = (y_NF, *torch.autograd.grad(y_NF, leaves, grad_NF))
    expected = (expected_NF, *torch.autograd.grad(expected_NF, wide, grad_NF.double()))
    # A chain of at most three rounded products of terms of about 1, summed in fp32; rounding grows as the sums do.
    for one, other in zip(found, expected, strict=True):
        largest = max(1.0, other.detach().abs().max().item())
        assert (one - other).detach().abs().max() <= 16 * torch.finfo(dtype).eps * largest


def test_padding_reaches_no_expert_and_counts_for_nothing() -> None:
    config = replace(EXPERTS, capacity=CapacityConfig(tokens=3))
    ours = layer(config, 8).train()
    x_BTD = torch.randn(1, 6, 8)
    alone, record = ours(x_BTD, MixerInput(Mask()))
    padded_BTD = torch.cat([torch.randn(1, 4, 8), x_BTD], dim=1)
    documents_BT = torch.tensor([[0] * 4 + [1] * 6], dtype=torch.int32)
    among, again = ours(padded_BTD, MixerInput(Mask(documents_BT=documents_BT)))
    assert torch.allclose(among[:, 4:], alone, atol=1e-6)
    assert not among[:, :4].any()
    assert torch.equal(record["load_E"], again["load_E"])
    assert torch.equal(record["kept_E"], again["kept_E"])
    assert torch.allclose(record["auxiliary_B"], again["auxiliary_B"])


def batch(rows: int = 4, tokens: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    tokens_BT = torch.randint(0, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[0, :5] = -100
    documents_BT = torch.ones_like(tokens_BT, dtype=torch.int32)
    documents_BT[1, 9:] = 0
    targets_BT[1, 8:] = -100
    return {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "documents_BT": documents_BT}


NOISY = replace(
    MOE,
    ffn=replace(
        EXPERTS,
        router=RouterConfig(jitter=0.1, second_by_chance=True),
        balance=BalanceConfig(loss=0.1, z_loss=0.01),
        capacity=CapacityConfig(factor=1.0),
    ),
)


@pytest.mark.parametrize("config", [MOE, EVERY_SECOND, NOISY], ids=["plain", "hybrid", "noisy"])
def test_recomputation_changes_and_doubles_nothing(config: ModelConfig) -> None:
    assert_recomputation_changes_nothing(config, batch())


@pytest.mark.parametrize("config", [MOE, NOISY], ids=["plain", "noisy"])
def test_losses_counts_and_gradients_do_not_depend_on_micro_batches(config: ModelConfig) -> None:
    assert_micro_batches_change_nothing(config, batch())


def test_the_auxiliary_loss_is_in_the_gradient_and_not_in_the_value() -> None:
    with_loss = replace(MOE, ffn=replace(EXPERTS, balance=BalanceConfig(loss=0.5, z_loss=0.1)))
    without = replace(MOE, ffn=replace(EXPERTS, balance=BalanceConfig(loss=0.0)))
    (one, gradients), (other, others) = (sums_and_gradients(config, batch()) for config in (with_loss, without))
    assert "aux_loss_sum" not in other
    assert one["loss_sum"] == other["loss_sum"]
    assert one["aux_loss_sum"] > 0
    moved = {name for name in gradients if not torch.equal(gradients[name], others[name])}
    assert {name for name in gradients if "router" in name} <= moved
    assert "stack.layers.1.ffn.experts.down" not in moved  # nothing of the last layer but its router hears of it


@QUICK
@given(seed=st.integers(0, 100), tokens=st.integers(1, 9))
def test_the_balance_and_z_losses_are_their_formulas(seed: int, tokens: int) -> None:
    ours = layer(replace(EXPERTS, balance=BalanceConfig(loss=0.3, z_loss=0.2)), 8, seed).train()
    x_BTD = torch.randn(3, tokens, 8, generator=torch.Generator().manual_seed(seed))
    logits_BTE = x_BTD @ ours.router.weight.T
    expected = []
    for row_TE in logits_BTE:
        chosen = row_TE.topk(2).indices.flatten()
        share_E = torch.bincount(chosen, minlength=4) / (2 * tokens)
        balance = 4 * (share_E * row_TE.softmax(-1).mean(0)).sum()
        expected.append(0.3 * balance + 0.2 * row_TE.logsumexp(-1).square().mean())
    found = ours(x_BTD, MixerInput(Mask()))[1]["auxiliary_B"]
    assert torch.allclose(found, torch.stack(expected), rtol=1e-5)
    assert "auxiliary_B" not in ours.eval()(x_BTD, MixerInput(Mask()))[1]


def test_noise_is_a_function_of_seed_layer_row_and_place() -> None:
    tokens_BT = torch.randint(0, 50, (6, 8), generator=torch.Generator().manual_seed(0))
    keys_B = row_keys(tokens_BT)
    assert len(set(keys_B.tolist())) == 6
    assert keys_B[0] != row_keys(tokens_BT[:1].flip(1))[0]
    noise = uniform(keys_B, seed=1, layer=2, tokens=400, draws=3)
    assert torch.equal(noise[2:4], uniform(keys_B[2:4], seed=1, layer=2, tokens=400, draws=3))
    for other in ({"seed": 2, "layer": 2}, {"seed": 1, "layer": 3}, {"seed": 1, "layer": ~2}):
        assert (noise == uniform(keys_B, tokens=400, draws=3, **other)).float().mean() < 0.01
    assert 0 <= noise.min() < 0.001
    assert 0.999 < noise.max() < 1
    # Mean 1/2 and deviation 1/sqrt(12) of n draws, five standard errors; neighbours unrelated.
    n = noise.numel()
    assert noise.mean().item() == pytest.approx(0.5, abs=5 / (12 * n) ** 0.5)
    centred = (noise - 0.5).flatten()
    assert abs((centred[1:] * centred[:-1]).mean().item()) < 5 / 12 / n**0.5


def test_training_without_noise_and_evaluation_draw_none() -> None:
    model, whole = build_model(NOISY).eval(), batch()
    quiet = replace(NOISY, ffn=replace(NOISY.ffn, router=RouterConfig()))
    plain = build_model(quiet).eval()
    assert torch.equal(model(**whole)["loss_sum"], plain(**whole)["loss_sum"])
    assert not torch.equal(model.train()(**whole)["loss_sum"], plain.train()(**whole)["loss_sum"])


def test_the_selection_bias_moves_against_the_load_and_evens_it_out() -> None:
    config = replace(EXPERTS, router=RouterConfig(scores="sigmoid"), balance=BalanceConfig(loss=0.0, bias_rate=0.05))
    model = build_model(replace(MOE, ffn=config)).train()
    whole = batch(rows=16)
    first = receipts(model(**whole))
    for _ in range(60):
        with torch.no_grad():
            rebalance(model, loads(model(**whole)))
    last = receipts(model(**whole))
    assert model.stack.layers[0].ffn.selection_bias.abs().max() > 0
    for number in range(2):
        assert last[f"routing/{number}/load_entropy"] > first[f"routing/{number}/load_entropy"]
        assert last[f"routing/{number}/load_entropy"] > 0.98
    # Choosing only: with the bias equal for all experts, nothing changes at all.
    for block in model.stack.layers:
        block.ffn.selection_bias.fill_(7.0)
    again = model(**whole)["loss_sum"]
    for block in model.stack.layers:
        block.ffn.selection_bias.zero_()
    assert torch.equal(again, model(**whole)["loss_sum"])


def test_receipts_are_counts_put_into_words() -> None:
    counts = {
        "routed_tokens": torch.tensor(8),
        "expert_load.3": torch.tensor([8, 8, 0, 0]),
        "expert_kept.3": torch.tensor([8, 4, 0, 0]),
    }
    assert receipts(counts) == {
        "routing/3/load_entropy": pytest.approx(0.5),
        "routing/3/drop_rate": pytest.approx(0.25),
        "routing/3/effective_k": pytest.approx(1.5),
        "routing/3/dead_experts": 2,
    }


def test_experts_learn_and_stay_balanced() -> None:
    model = build_model(replace(MOE, init=replace(LIVELY, std=0.05), ffn=replace(EXPERTS, n_experts=8))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    whole = batch(rows=8, tokens=32)
    losses = []
    for _ in range(40):
        out = model(**whole)
        optimizer.zero_grad()
        loss = out["loss_sum"] / out["target_count"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    rows = receipts(out)
    for number in range(2):
        assert rows[f"routing/{number}/load_entropy"] > 0.9
        assert rows[f"routing/{number}/dead_experts"] == 0
        assert rows[f"routing/{number}/effective_k"] == 2


@pytest.mark.parametrize("name", ["mixtral-tiny", "switch-tiny", "gshard-tiny", "deepseek-moe-tiny", "moe-small"])
def test_a_preset_with_experts_learns_and_uses_them_all(name: str) -> None:
    config = preset(name, vocab_size=97, d_model=32, n_layers=2)
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    whole = batch(rows=8, tokens=32)
    losses = []
    for _ in range(25):
        out = model(**whole)
        loss = out["loss_sum"] / out["target_count"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rebalance(model, loads(out))
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    rows = receipts(out)
    assert rows["routing/1/dead_experts"] == 0
    assert rows["routing/1/load_entropy"] > 0.8
    assert 0.5 < rows["routing/1/effective_k"] <= config.layers[1].ffn.top_k
    assert (rows["routing/1/drop_rate"] == 0) is (config.layers[1].ffn.capacity is None) or name == "gshard-tiny"


def test_counted_published_sizes_have_the_published_active_share() -> None:
    for name, vocab_size, active in (("mixtral-8x7b", 32000, 12.88e9), ("qwen3-30b-a3b", 151936, 3.35e9)):
        assert parameter_counts(preset(name, vocab_size=vocab_size)).active == pytest.approx(active, rel=5e-3)


def test_the_small_model_with_experts_works_as_hard_for_a_token_as_the_one_without() -> None:
    counts = {}
    for name in ("small", "moe-small"):
        counts[name] = parameter_counts(preset(name, vocab_size=4096))
    assert counts["moe-small"].active == pytest.approx(counts["small"].active, rel=5e-3)
    assert counts["moe-small"].total > 2.5 * counts["small"].total


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: MoeConfig(n_experts=4, top_k=5), "top_k = 5: of 4"),
        (lambda: MoeConfig(n_experts=0), "n_experts = 0"),
        (lambda: MoeConfig(top_k=1), "top_k = 1: with router.renormalize"),
        (lambda: MoeConfig(router=RouterConfig(groups=3)), "groups must divide"),
        (lambda: MoeConfig(top_k=3, router=RouterConfig(groups=4)), "top_k = 3: of 2"),
        (lambda: MoeConfig(router=RouterConfig(groups=8, top_groups=4)), "groups = 8: for 8 experts"),
        (lambda: MoeConfig(top_k=3, router=RouterConfig(second_by_chance=True)), "second_by_chance = true"),
        (lambda: RouterConfig(groups=2, top_groups=3), "top_groups=3"),
        (lambda: RouterConfig(jitter=1.0), "jitter = 1.0"),
        (lambda: RouterConfig(scale=0.0), "scale = 0.0"),
        (lambda: BalanceConfig(loss=-1.0), "loss = -1.0"),
        (lambda: CapacityConfig(), "factor=None, tokens=None"),
        (lambda: CapacityConfig(factor=1.0, tokens=3), "tokens=3"),
        (lambda: CapacityConfig(tokens=0), "tokens=0"),
    ],
)
def test_impossible_mixtures_are_refused_naming_the_value(make: Any, value: str) -> None:
    with pytest.raises(Refusal, match=value):
        make()


def test_a_mixture_and_a_dense_layer_stand_in_one_stack() -> None:
    model = build_model(EVERY_SECOND)
    kinds = [type(block.ffn).__name__ for block in model.stack.layers]
    assert kinds == ["FeedForward", "MixtureOfExperts"]
    assert isinstance(EVERY_SECOND.layers[0].ffn, FfnConfig)
    assert sorted(name for name in model(**batch()) if is_count(name)) == [
        "expert_kept.1",
        "expert_load.1",
        "routed_tokens",
    ]
