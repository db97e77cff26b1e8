"""Decoding with a cache computes what the whole forward pass does; sampling keeps its promises."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.decoding.generate import Sampling, choose, generate, unpadded
from model.decoding.joined import arranged_products
from tests.model.configurations import (
    ALIBI,
    FALCON,
    GPT2,
    GPTJ,
    LATENT,
    LLAMA,
    MIXTRAL,
    RECURRENT,
    WINDOWED,
    any_config,
    recurrent_config,
)

FAMILIES = pytest.mark.parametrize(
    "config",
    [LLAMA, GPT2, WINDOWED, ALIBI, GPTJ, FALCON, MIXTRAL, LATENT],
    ids=["llama", "gpt2", "windowed", "alibi", "gptj", "falcon", "mixtral", "latent"],
)
EVERY = pytest.mark.parametrize(
    "config", [LLAMA, GPT2, LATENT, *RECURRENT.values()], ids=["llama", "gpt2", "latent", *RECURRENT.keys()]
)
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
PROMPTS = [[5, 3, 9], [7], [1, 2, 3, 4, 5, 6, 7, 8], [90, 4]]


def greedy_by_whole_passes(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(model(torch.tensor([tokens]))["logits"][0, -1].argmax()))
    return tokens[len(prompt) :]


@settings(max_examples=20, deadline=None)
@given(
    config=st.one_of(any_config(), recurrent_config()),
    steps=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    seed=st.integers(0, 50),
    static=st.booleans(),
    joined=st.booleans(),
)
def test_cached_logits_are_those_of_the_whole_pass(
    config: ModelConfig, steps: list[int], rows: int, seed: int, static: bool, joined: bool
) -> None:
    assert config.vocab_size is not None
    model = build_model(config, seed=seed)
    tokens = torch.randint(0, config.vocab_size, (rows, sum(steps)), generator=torch.Generator().manual_seed(seed))
    whole = model(tokens)["logits"]
    cache = model.new_cache(rows, sum(steps), static=static)
    with arranged_products(model) if joined else nullcontext():
        pieces = [model(piece, cache=cache)["logits"] for piece in tokens.split(steps, dim=1)]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() <= 2e-5 * whole.abs().max()
    assert cache.lengths == [sum(steps)] * rows


@FAMILIES
def test_a_cache_can_be_rewound_and_its_rows_reordered(config: ModelConfig) -> None:
    model = build_model(config)
    tokens = torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(3, 20)
    model(tokens, cache=cache)
    cache.rewind([4, 10, 7])
    cache.reorder([2, 0, 0])
    found = model(torch.tensor([[11], [12], [13]]), cache=cache)["logits"][:, 0]
    for row, (source, length, token) in enumerate([(2, 7, 11), (0, 4, 12), (0, 4, 13)]):
        expected = model(torch.cat([tokens[source, :length], torch.tensor([token])])[None])["logits"][0, -1]
        assert (found[row] - expected).abs().max() <= 2e-5 * expected.abs().max()


@FAMILIES
@pytest.mark.parametrize("static", [False, True])
def test_prompts_that_begin_alike_are_begun_once_and_continue_as_alone(config: ModelConfig, static: bool) -> None:
    model = build_model(config)
    start = torch.randint(0, 97, (32,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [start + ending for ending in ([1], [2, 3, 4], [5, 6], [2, 3, 4])]
    read = []
    hook = model.frontend.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    together = generate(model, prompts, GREEDY, static=static)
    hook.remove()
    assert read[:2] == [32, 3 * 3]  # what all share once; of the rest each distinct prompt
    assert together == [greedy_by_whole_passes(model, prompt, 12) for prompt in prompts]


@FAMILIES
def test_prompts_of_one_length_continue_as_alone(config: ModelConfig) -> None:
    model, prompts = build_model(config), [[5, 3, 9, 2], [7, 90, 4, 1]]
    expected = [greedy_by_whole_passes(model, prompt, 12) for prompt in prompts]
    assert generate(model, prompts, GREEDY) == expected


def test_one_prompt_has_many_continuations_and_is_read_once() -> None:
    model = build_model(LLAMA)
    read = []
    model.frontend.register_forward_hook(lambda module, inputs, output: read.append(tuple(inputs[0].shape)))
    texts = generate(model, [PROMPTS[2]] * 5, Sampling(max_new_tokens=8))
    assert read[0] == (1, 8)
    assert read[1] == (5, 1)
    assert len({tuple(text) for text in texts}) == 5


def test_a_static_caches_steps_have_one_shape_and_the_same_tokens() -> None:
    model = build_model(LLAMA)
    seen = set()

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x_BTD, shared = inputs[0], inputs[1]
        if x_BTD.shape[1] == 1:
            seen.add((x_BTD.shape, shared.mask.keys, shared.rotation.cos_BT1C.shape, shared.common_slot))

    hook = model.stack.register_forward_pre_hook(note)
    texts = generate(model, PROMPTS, replace(GREEDY, max_new_tokens=50), static=True)
    hook.remove()
    assert seen == {((4, 1, 32), 64, (4, 1, 1, 8), None)}
    assert texts == generate(model, PROMPTS, replace(GREEDY, max_new_tokens=50))


def test_joined_projections_hold_nothing_twice_and_leave_a_model_that_trains() -> None:
    model = build_model(LLAMA)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate(model, PROMPTS, GREEDY)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.parameters()}
    assert sum(held.values()) == sum(tensor.nbytes for tensor in model.parameters())
    places = [tensor.data_ptr() for tensor in model.parameters()]
    generate(model, PROMPTS, GREEDY)
    assert places == [tensor.data_ptr() for tensor in model.parameters()]  # joined once
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(torch.tensor(PROMPTS[2])[None], targets_BT=torch.tensor(PROMPTS[2])[None])["loss_sum"].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.5 * parameter.grad
    assert generate(model, PROMPTS[:1], GREEDY) == [greedy_by_whole_passes(model, PROMPTS[0], 12)]


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_batch_gives_its_prompts(left: bool) -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]] if left else [[1, 0, 0], [1, 1, 1]])
    assert unpadded(torch.tensor([[8, 8, 8], [1, 2, 3]]), mask) == [[8], [1, 2, 3]]


@EVERY
def test_rows_of_unequal_length_are_read_together_and_reordered(config: ModelConfig) -> None:
    model = build_model(config)
    tokens = torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(3, 30)
    for lengths in ([4, 10, 1], [7, 2, 10]):  # the second time behind what is there
        model(tokens[:, : max(lengths)], cache=cache, lengths=lengths)
    cache.reorder([2, 0, 0])
    assert cache.lengths == [11, 11, 11]
    found = model(torch.tensor([[11], [12], [13]]), cache=cache)["logits"][:, 0]
    for row, (source, first, second, token) in enumerate([(2, 1, 10, 11), (0, 4, 7, 12), (0, 4, 7, 13)]):
        whole = torch.cat([tokens[source, :first], tokens[source, :second], torch.tensor([token])])
        expected = model(whole[None])["logits"][0, -1]
        assert (found[row] - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_cache_that_is_full_says_so() -> None:
    model = build_model(LLAMA)
    cache = model.new_cache(1, 8)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    with pytest.raises(Refusal, match="cache of 8"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


@EVERY
def test_a_ragged_batch_continues_each_prompt_as_it_would_alone(config: ModelConfig) -> None:
    model = build_model(config)
    together = generate(model, PROMPTS, GREEDY)
    assert together == [greedy_by_whole_passes(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(text) for text in together}) == len(PROMPTS)


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=15), Sampling(max_new_tokens=15, top_k=9, top_p=0.8)])
def test_a_prompts_draws_do_not_depend_on_the_rest_of_the_batch(sampling: Sampling) -> None:
    model = build_model(LLAMA)
    together = generate(model, PROMPTS, sampling)
    assert [generate(model, PROMPTS[: row + 1], sampling)[row] for row in range(4)] == together
    assert generate(model, PROMPTS, sampling) == together
    assert generate(model, PROMPTS, replace(sampling, seed=1)) != together


def test_a_stop_id_ends_its_row_alone_and_is_left_out() -> None:
    model = build_model(LLAMA)
    free = generate(model, PROMPTS, GREEDY)
    stop_id = free[0][4]
    stopped = generate(model, PROMPTS, GREEDY, stop_ids={stop_id})
    assert stopped == [text[: text.index(stop_id)] if stop_id in text else text for text in free]
    assert len(stopped[0]) < 12 == max(len(text) for text in stopped)


def test_a_stop_function_ends_a_row_and_every_kept_token_is_told_in_order() -> None:
    model = build_model(LLAMA)
    told: list[tuple[int, int]] = []
    texts = generate(
        model,
        PROMPTS,
        GREEDY,
        stop=lambda new: len(new) >= 3 and new[-1] % 2 == 0,
        on_token=lambda row, token: told.append((row, token)),
    )
    for row, text in enumerate(texts):
        assert [token for at, token in told if at == row] == text
        ends = [at for at in range(3, 13) if at == 12 or (text[at - 1 : at] and text[at - 1] % 2 == 0)]
        assert len(text) == ends[0]


@FAMILIES
def test_a_row_ends_where_the_models_context_does(config: ModelConfig) -> None:
    model = build_model(replace(config, max_seq_len=10))
    texts = generate(model, PROMPTS, replace(GREEDY, max_new_tokens=100))
    assert [len(text) for text in texts] == [10 - len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(("prompts", "said"), [([[1], []], "prompt 1 has no tokens"), ([[1] * 64], "64 tokens")])
def test_a_prompt_that_cannot_be_continued_is_refused(prompts: list[list[int]], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        generate(build_model(LLAMA), prompts, GREEDY)


def test_no_prompts_give_no_texts_and_training_mode_is_left_as_it_was() -> None:
    model = build_model(replace(LLAMA, dropout=0.5))
    assert generate(model, [], GREEDY) == []
    assert model.training
    assert generate(model, PROMPTS, GREEDY) == generate(model, PROMPTS, GREEDY)
    assert model.training


LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.5, 0.5])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), {0, 1, 2, 3, 4}),
        (Sampling(temperature=0.5), {0, 1, 2, 3, 4}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_k=50), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.5), {1, 3}),  # 0.49, and what brings it past a half
        (Sampling(top_p=0.01), {1}),
        (Sampling(top_k=3, top_p=0.99), {1, 3, 4}),
        (Sampling(temperature=0.0), {1}),
    ],
)
def test_draws_follow_the_renormalised_probability_of_what_is_kept(sampling: Sampling, kept: set[int]) -> None:
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # evenly spread: shares come out to one in 4,000
    chosen = Counter(choose(LOGITS.expand(4000, 5), sampling, draws).tolist())
    weights = torch.softmax(LOGITS.double() / (sampling.temperature or 1e-9), -1)
    total = sum(float(weights[token]) for token in kept)
    assert set(chosen) == kept
    for token in kept:
        assert chosen[token] / 4000 == pytest.approx(float(weights[token]) / total, abs=2 / 4000)


def test_half_precision_decodes_what_its_whole_pass_says() -> None:
    model = build_model(LLAMA, dtype=torch.bfloat16)
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)["logits"].float()
    cache = model.new_cache(2, 40)
    steps = torch.cat([model(token, cache=cache)["logits"].float() for token in tokens.split(1, dim=1)], dim=1)
    # Both round some 20 times at 2^-9 on their own ways.
    assert (steps - whole).abs().max() <= 40 * 2**-9 * whole.abs().max()
    assert (steps - whole).norm() <= 4 * 2**-9 * whole.norm() * 4
