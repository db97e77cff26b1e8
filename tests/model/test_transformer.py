"""A whole model: documents are independent, the future is unseen, every way to run it computes the same."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.block import Layout
from model.build import build_model
from model.config import ModelConfig
from model.positions.rope import RopeConfig
from tests.model.configurations import ALIBI, GPT2, GPTJ, LIVELY, LLAMA, MIXTRAL, VASWANI, WINDOWED, any_config, preset
from tests.model.learning import learn

FAMILIES = pytest.mark.parametrize(
    "config",
    [LLAMA, GPT2, WINDOWED, ALIBI, GPTJ, MIXTRAL],
    ids=["llama", "gpt2", "windowed", "alibi", "gptj", "mixtral"],
)


def tokens_of(config: ModelConfig, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    assert config.vocab_size is not None
    return torch.randint(0, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_close(theirs: torch.Tensor, ours: torch.Tensor, relative: float = 2e-5) -> None:
    """Equal but for the order of fp32 sums: some 100 roundings of 2^-24 of the largest value."""
    assert (theirs - ours).abs().max() <= relative * theirs.abs().max()


@settings(max_examples=20, deadline=None)
@given(config=any_config(), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), padding=st.integers(0, 3))
def test_a_packed_document_computes_what_it_computes_alone(
    config: ModelConfig, lengths: list[int], padding: int
) -> None:
    lengths = lengths[: max(1, 28 // max(lengths))]
    model = build_model(config)
    documents = [tokens_of(config, 1, length, seed) for seed, length in enumerate(lengths)]
    numbers = [number for number, length in enumerate(lengths, start=1) for _ in range(length)] + [0] * padding
    row = torch.cat([*documents, torch.zeros(1, padding, dtype=torch.int64)], dim=1)
    packed = model(row, documents_BT=torch.tensor([numbers], dtype=torch.int32))["logits"]
    start = 0
    for document in documents:
        assert_close(model(document)["logits"], packed[:, start : start + document.shape[1]])
        start += document.shape[1]


@FAMILIES
def test_no_logit_depends_on_a_later_token(config: ModelConfig) -> None:
    model = build_model(config)
    row = tokens_of(config, 1, 20)
    changed = row.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 97
    before, after = model(row)["logits"][0], model(changed)["logits"][0]
    assert_close(before[:12], after[:12])  # experts take tokens in groups, whose size moves the last bits
    assert all((before[at] - after[at]).abs().max() > 1e-3 for at in range(12, 20))


@FAMILIES
def test_a_prefix_is_seen_both_ways_and_what_follows_it_is_not(config: ModelConfig) -> None:
    model = build_model(config)
    row = tokens_of(config, 1, 20)
    prefix, found = torch.tensor([8]), []
    for changed_at in (7, 12):
        changed = row.clone()
        changed[0, changed_at] = (changed[0, changed_at] + 1) % 97
        before, after = (model(tokens, prefix_B=prefix)["logits"][0] for tokens in (row, changed))
        found.append([bool((before[at] - after[at]).abs().max() > 1e-4) for at in range(20)])
    assert found == [[True] * 20, [at >= 12 for at in range(20)]]


def test_a_window_bounds_how_far_a_token_is_felt() -> None:
    config = replace(WINDOWED, pattern=())  # two layers of five tokens, so eight tokens further on at most
    model = build_model(config)
    row = tokens_of(config, 1, 20)
    changed = row.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 97
    difference = (model(row)["logits"][0] - model(changed)["logits"][0]).abs().amax(-1)
    assert [bool(value > 1e-4) for value in difference] == [3 <= at <= 11 for at in range(20)]


@FAMILIES
def test_the_loss_is_the_cross_entropy_of_the_logits_and_so_are_its_gradients(config: ModelConfig) -> None:
    model = build_model(replace(config, tie_embeddings=False))
    row, targets = tokens_of(config, 2, 20), tokens_of(config, 2, 20, seed=1)
    targets[0, :7] = -100
    sums = model(row, targets_BT=targets)
    sums["loss_sum"].backward()
    ours = gradients(model)
    logits = model(row)["logits"]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    assert_close(loss, sums["loss_sum"])
    assert int(sums["target_count"]) == 33
    theirs = gradients(model)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())  # that of a key's bias is zero in theory
    for name in theirs:
        assert (theirs[name] - ours[name]).abs().max() <= 2e-5 * largest


@FAMILIES
def test_rows_looked_up_in_a_tied_table_are_added_to_the_heads_gradient_bit_for_bit(config: ModelConfig) -> None:
    model = build_model(replace(config, tie_embeddings=True))
    assert model.frontend.tokens.is_tied
    row = tokens_of(config, 2, 20)  # some ids several times
    found = []
    for model.frontend.tokens.is_tied in (True, False):
        for _ in range(2):  # the second adds to the gradient there is
            model(row, targets_BT=row)["loss_sum"].backward()
        found.append(gradients(model))
    assert not any(gradient.is_sparse for gradient in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@FAMILIES
def test_recomputing_activations_changes_no_gradient(config: ModelConfig) -> None:
    model = build_model(config)
    row = tokens_of(config, 2, 20)
    found = []
    for model.stack.recompute in (False, True):
        model(row, targets_BT=row)["loss_sum"].backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@FAMILIES
def test_scores_per_token_add_up_to_the_loss(config: ModelConfig) -> None:
    model = build_model(config)
    row, targets = tokens_of(config, 2, 20), tokens_of(config, 2, 20, seed=1)
    targets[1, 3:6] = -100
    scores, sums = model(row, targets_BT=targets, per_token=True), model(row, targets_BT=targets)
    assert_close(sums["loss_sum"], scores["nll"].sum())
    assert torch.equal(scores["is_top"], model(row)["logits"].argmax(-1) == targets)


@FAMILIES
def test_logits_can_be_asked_for_some_columns_only(config: ModelConfig) -> None:
    model = build_model(config)
    row = tokens_of(config, 3, 10)
    whole = model(row)["logits"]
    assert_close(whole[:, -1:], model(row, logits_for="last")["logits"])
    columns = torch.tensor([9, 0, 4])
    assert_close(whole[torch.arange(3), columns][:, None], model(row, logits_for=columns)["logits"])


def test_the_soft_cap_bounds_logits_and_z_loss_pulls_their_sum_to_one() -> None:
    row = tokens_of(LLAMA, 4, 32)
    assert build_model(replace(LLAMA, logit_soft_cap=2.0))(row)["logits"].abs().max() <= 2.0
    final = []
    for z_loss in (0.0, 0.1):
        model = build_model(replace(LLAMA, z_loss=z_loss))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(15):
            model(row, targets_BT=row)["loss_sum"].div(row.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
        final.append(float(model(row)["logits"].logsumexp(-1).square().mean()))
    assert final[1] < final[0] / 2


@settings(max_examples=8, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), d_ff=st.integers(3, 40), seed=st.integers(0, 99))
def test_palms_preset_is_a_parallel_block_of_one_key_head_and_no_biases(heads: int, d_ff: int, seed: int) -> None:
    palm = preset("palm-8b", vocab_size=97, d_model=32, n_layers=2)
    small = replace(palm, mixer=replace(palm.mixer, n_heads=heads), ffn=replace(palm.ffn, d_ff=d_ff), init=LIVELY)
    model = build_model(small, seed=seed)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert model.head.weight is model.frontend.tokens.weight
    row = tokens_of(small, 2, 12, seed)
    rope = RopeConfig().rotation(torch.arange(12)[None], 32 // heads)
    x = model.frontend.tokens.weight[row]
    for block in model.stack.layers:
        # Written out from the paper, section 2: y = x + MLP(LayerNorm(x)) + Attention(LayerNorm(x)).
        normed = torch.nn.functional.layer_norm(x, (32,), block.mixer_norm.weight, eps=1e-5)
        q = rope((normed @ block.mixer.q.weight.T).view(2, 12, heads, -1))
        k, v = rope((normed @ block.mixer.k.weight.T)[:, :, None])[:, :, 0], normed @ block.mixer.v.weight.T
        scores = torch.einsum("bthc,bsc->bhts", q, k) / (32 // heads) ** 0.5
        scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
        attended = torch.einsum("bhts,bsc->bthc", scores.softmax(-1), v).flatten(2)
        gate, up = normed @ block.ffn.gate.weight.T, normed @ block.ffn.up.weight.T
        x = x + attended @ block.mixer.out.weight.T + (gate.sigmoid() * gate * up) @ block.ffn.down.weight.T
    x = torch.nn.functional.layer_norm(x, (32,), model.stack.final_norm.weight, eps=1e-5)
    assert_close(x @ model.head.weight.T, model(row)["logits"])


@pytest.mark.parametrize("layout", get_args(Layout))
@FAMILIES
def test_every_layout_learns(config: ModelConfig, layout: str) -> None:
    model = build_model(replace(config, layout=layout, dropout=0.05))
    row = tokens_of(config, 4, 24)

    def loss() -> torch.Tensor:
        return model(row[:, :-1], targets_BT=row[:, 1:])["loss_sum"] / row[:, 1:].numel()

    losses = learn(model, loss, steps=30, lr=3e-3)
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("how", ["bf16", "autocast"])
@FAMILIES
def test_half_precision_stays_close_to_full(config: ModelConfig, how: str) -> None:
    full, half = build_model(config), build_model(config, dtype=torch.bfloat16 if how == "bf16" else torch.float32)
    row = tokens_of(config, 4, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = half(row, targets_BT=row.roll(-1, 1))["loss_sum"]
    loss.backward()
    exact = full(row, targets_BT=row.roll(-1, 1))["loss_sum"]
    assert loss.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in half.parameters())
    # Some 20 roundings of 2^-9 on the way to a logit, of which 128 losses average.
    assert abs(float(loss - exact)) <= 20 * 2**-9 * float(exact)


def test_a_row_longer_than_its_learned_positions_is_refused() -> None:
    with pytest.raises(Refusal, match="65 tokens"):
        build_model(GPT2)(tokens_of(GPT2, 1, 65))


@pytest.mark.parametrize(
    ("config", "inputs", "said"),
    [
        (
            LLAMA,
            {"tokens_BT": 1, "classes_B": 1},
            "given classes_B: it reads tokens_BT, and takes targets_BT, token_types_BT",
        ),
        (LLAMA, {"pixels_BAYX": 1}, "given pixels_BAYX: it reads tokens_BT"),
        (LLAMA, {}, "nothing of what it reads: it reads tokens_BT"),
        (VASWANI, {"tokens_BT": 1, "encoder_token_BT": 1}, "given token_BT: it reads tokens_BT"),
        (VASWANI, {"tokens_BT": 1, "mask_BT": 1}, "mask_BT: .*, encoder_… besides documents_BT"),
    ],
)
def test_inputs_that_a_model_does_not_take_are_refused_naming_those_it_does(
    config: ModelConfig, inputs: dict[str, int], said: str
) -> None:
    ones = {name: torch.ones(1, 4, dtype=torch.int64) for name in inputs}
    with pytest.raises(Refusal, match=said):
        build_model(config)(**ones)
