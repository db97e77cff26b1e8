"""The chunked loss is the plain one: value, gradients, z-loss, soft cap, ignored targets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import model.losses.cross_entropy
from model.losses.cross_entropy import (
    IGNORED,
    Terms,
    chunk_tokens,
    chunked_cross_entropy,
    softmax_gradient_,
    token_scores,
)


@contextmanager
def small_chunks(budget: int = 1) -> Iterator[None]:
    """Chunks of `budget` bytes, by default of 64 tokens, the least there is, and passes of a few rows, so that small
    inputs take several of both."""
    before = model.losses.cross_entropy.LOGITS_BYTES, model.losses.cross_entropy.CPU_PASS
    model.losses.cross_entropy.LOGITS_BYTES, model.losses.cross_entropy.CPU_PASS = budget, max(500, budget // 32)
    try:
        yield
    finally:
        model.losses.cross_entropy.LOGITS_BYTES, model.losses.cross_entropy.CPU_PASS = before


def plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    soft_cap: float | None,
    z_loss: float,
    bias: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ NLL, Σ weighted squared logsumexp) as textbooks write them."""
    logits = x @ weight.T if bias is None else x @ weight.T + bias
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    nll = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    return nll, z_loss * logits.logsumexp(-1)[targets != IGNORED].square().sum()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 200),
    vocab_size=st.integers(2, 50),
    soft_cap=st.sampled_from([None, 3.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    smoothing=st.sampled_from([0.0, 0.1]),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_value_and_gradients_are_those_of_the_plain_loss(
    tokens: int, vocab_size: int, soft_cap: float | None, z_loss: float, smoothing: float, ignored: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 12, generator=generator, requires_grad=True)
    weight = torch.randn(vocab_size, 12, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    bias = torch.randn(vocab_size, generator=generator, requires_grad=True)
    nll, z = plain(x, weight, targets, soft_cap, z_loss, bias)
    smoothed, _ = plain(x, weight, targets, soft_cap, z_loss, bias, smoothing)
    expected = torch.autograd.grad(3 * (smoothed + z), (x, weight, bias))
    with small_chunks():
        sums = chunked_cross_entropy(x, weight, targets, bias_V=bias, terms=Terms(soft_cap, z_loss, smoothing))
    found = torch.autograd.grad(3 * sums["loss_sum"], (x, weight, bias))
    # Each of `tokens` terms is rounded a few times at 2^-24 of its size, which 12 products of normals keep below 50.
    bound = 50 * tokens * 2**-23
    assert abs(float(sums["loss_sum"] - nll)) <= bound
    assert int(sums["target_count"]) == int((targets != IGNORED).sum())
    assert ("z_loss_sum" in sums) == (z_loss > 0)
    if z_loss:
        assert abs(float(sums["z_loss_sum"] - z)) <= bound
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs - ours).abs().max() <= 3 * bound


def test_targets_that_are_all_ignored_give_zero_and_no_gradient() -> None:
    x, weight = torch.randn(70, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    sums = chunked_cross_entropy(x, weight, torch.full((70,), IGNORED))
    sums["loss_sum"].backward()
    assert (float(sums["loss_sum"]), int(sums["target_count"])) == (0.0, 0)
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.abs().max() == weight.grad.abs().max() == 0


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_hopeless_target_still_has_a_finite_loss(scale: float) -> None:
    x = torch.tensor([[scale]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = chunked_cross_entropy(x, weight, torch.tensor([1]))["loss_sum"]
    loss.backward()
    assert float(loss) == pytest.approx(2 * scale, rel=0.1)
    assert x.grad is not None
    assert x.grad.isfinite().all()


class Watch(TorchDispatchMode):
    """elements: the most that any tensor made under it has. products: how many matrix products."""

    elements = products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_tensor_of_the_step_holds_the_logits_of_all_tokens() -> None:
    tokens, vocab_size = 1024, 16384
    x, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab_size, 4, requires_grad=True)
    with small_chunks(2**24), Watch() as watch:
        chunked_cross_entropy(x, weight, torch.randint(0, vocab_size, (tokens,)))["loss_sum"].backward()
    assert watch.elements == 256 * vocab_size
    assert watch.products == 3 * 4  # of each chunk: logits and two gradients


def test_a_batch_within_the_budget_is_one_product_of_each_kind() -> None:
    x, weight = torch.randn(300, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        chunked_cross_entropy(x, weight, torch.randint(0, 4096, (300,)))["loss_sum"].backward()
    assert watch.products == 3


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "d_model", "dtype_bytes", "expected"),
    [
        (1024, 50304, 384, 2, 1024),  # 98 MiB: whole
        (4096, 4096, 384, 2, 4096),
        (8192, 50304, 768, 2, 4096),  # 786 MiB: two equal shares of it
        (65536, 128256, 4096, 2, 8192),  # as large as the weight's own gradient, 2 GiB
        (5000, 128256, 64, 4, 1024),  # 489 MiB; no equal shares in sight
        (100, 10**7, 8, 4, 64),  # the least, whatever the budget
    ],
)
def test_a_chunk_is_as_large_as_the_budget_allows(
    tokens: int, vocab_size: int, d_model: int, dtype_bytes: int, expected: int
) -> None:
    assert chunk_tokens(tokens, vocab_size, d_model, dtype_bytes) == expected


@given(st.integers(1, 10**6), st.integers(2, 300_000), st.integers(1, 8192), st.sampled_from([2, 4]))
def test_chunks_keep_to_the_budget_and_waste_none_of_it(tokens: int, vocab: int, width: int, size: int) -> None:
    chunk = chunk_tokens(tokens, vocab, width, size)
    budget = max(model.losses.cross_entropy.LOGITS_BYTES, 4 * vocab * width)
    assert chunk <= 64 or chunk * vocab * size <= budget
    assert chunk == tokens or chunk % 64 == 0
    assert 1 <= chunk <= tokens
    assert chunk == tokens or 3 * chunk * vocab * size > budget


def test_what_is_compiled_traces_whole_and_computes_the_same() -> None:
    compiled = torch.compile(softmax_gradient_, backend="aot_eager", fullgraph=True, dynamic=False)
    x, weight = torch.randn(90, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets = torch.randint(0, 40, (90,))
    results = []
    for each in (None, compiled):
        sums = chunked_cross_entropy(x, weight, targets, terms=Terms(5.0, 1e-2, 0.1), compiled=each)
        results.append((sums["loss_sum"], *torch.autograd.grad(sums["loss_sum"], (x, weight))))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


def test_the_same_batch_has_the_same_bits_again() -> None:
    x, weight = torch.randn(700, 16, requires_grad=True), torch.randn(3000, 16, requires_grad=True)
    targets = torch.randint(0, 3000, (700,))
    results = []
    for _ in range(2):
        with small_chunks(2**20), torch.autocast("cpu", torch.bfloat16):
            loss = chunked_cross_entropy(x, weight, targets)["loss_sum"]
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_under_autocast_the_loss_is_computed_in_half_precision_and_summed_in_full() -> None:
    x, weight = torch.randn(80, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    targets = torch.randint(0, 30, (80,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(x, weight, targets)["loss_sum"]
    loss.backward()
    nll, _ = plain(x.bfloat16().float(), weight.bfloat16().float(), targets, None, 0.0)
    assert loss.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert abs(float(loss - nll)) <= 80 * 16 * 2**-8  # logits of up to 16 rounded to 8 bits


@given(st.integers(1, 100), st.integers(2, 40))
def test_scores_for_evaluation_are_the_terms_of_the_sum(tokens: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, 8, generator=generator), torch.randn(vocab_size, 8, generator=generator)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    targets[::3] = IGNORED
    with small_chunks():
        nll, is_top = token_scores(x, weight, targets)
        total = chunked_cross_entropy(x, weight, targets)["loss_sum"]
    assert float(nll.sum()) == pytest.approx(float(total), rel=1e-5, abs=1e-5)
    assert (nll[targets == IGNORED] == 0).all()
    assert torch.equal(is_top, (x @ weight.T).argmax(-1) == targets)
