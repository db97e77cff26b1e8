"""Every kernel computes what the dense definition says, forward and backward, whatever the mask."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.build import build_model
from model.kernels.accelerated import SEQUENCES_QUANTUM, Sequences, flex_attention, packed_attention, sequence_starts
from model.kernels.attention import AttentionKernel, dense_attention
from model.kernels.blockwise import QUERY_BLOCK, TILE_ELEMENTS
from model.kernels.chunked import CHUNK_ELEMENTS
from model.kernels.documents import BATCH_PAIRS, document_batches
from model.kernels.select import select_kernel
from model.masks import Mask, dense
from tests.model.configurations import LLAMA

FAST = ["auto", "sdpa", "chunked"]
KERNELS: dict[str, AttentionKernel] = {name: select_kernel(name) for name in ("dense", *FAST)}


def packed(lengths: list[int], tokens: int) -> list[int]:
    """A row of documents of these lengths, cut or padded to `tokens`."""
    row = [number for number, length in enumerate(lengths, start=1) for _ in range(length)][:tokens]
    return row + [0] * (tokens - len(row))


Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Mask]


@st.composite
def masks(draw: st.DrawFn, rows: int, tokens: int, heads: int) -> Mask:
    """Any mask there is: direction, window, documents, prefix, global tokens, blocks and a bias, each or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    mask = Mask(causal=draw(st.booleans()), window=draw(st.none() | st.integers(1, tokens + 3)))
    if draw(st.booleans()):
        lengths = st.lists(st.integers(1, 25), max_size=8)
        documents = torch.tensor([packed(draw(lengths), tokens) for _ in range(rows)], dtype=torch.int32)
        mask = replace(mask, documents_BT=documents)
    if draw(st.booleans()):
        mask = replace(mask, prefix_B=torch.randint(0, tokens + 1, (rows,), generator=generator))
    if draw(st.booleans()):
        mask = replace(mask, globals_BT=torch.rand(rows, tokens, generator=generator) < 0.2)
    block = draw(st.sampled_from([4, 16]))
    mask = replace(mask, block=block)
    if draw(st.booleans()):
        count = -(-tokens // block)
        layout = torch.rand(draw(st.sampled_from([1, heads])), count, count, generator=generator) < 0.5
        counts = torch.randint(0, 4, layout.shape, generator=generator)
        mask = replace(mask, layout_HQJ=layout * counts if draw(st.booleans()) else layout)
    if draw(st.booleans()):
        bias = torch.randn(heads, 2 * tokens - 1 + 2 * draw(st.integers(0, 2)), generator=generator)
        mask = replace(mask, bias_HL=bias.double().requires_grad_())
    return mask


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """(q, k, v, gradient of the output, mask) of any small shape, with shared heads or not."""
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    kv_heads, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    q, k, v, grad = (
        torch.randn(rows, tokens, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (kv_heads * groups, kv_heads, kv_heads, kv_heads * groups)
    )
    return q, k, v, grad, draw(masks(rows, tokens, kv_heads * groups))


def output_and_gradients(
    kernel: AttentionKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, mask: Mask
) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = kernel(*leaves, mask, 0.3)
    leaves += [] if mask.bias_HL is None else [mask.bias_HL]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_a_kernel_agrees_with_the_definition_forward_and_backward(name: str, problem: Problem) -> None:
    expected = output_and_gradients(dense_attention, *problem)
    found = output_and_gradients(KERNELS[name], *problem)
    # fp64, but the oracle's softmax is fp32: 2^-24 relative per weight, gathered over at most 40 keys.
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs - ours).abs().max() <= 40 * 2**-24 * max(1.0, theirs.abs().max())


def long_masks() -> dict[str, Mask]:
    """Masks of three rows of 300 tokens and four heads: several blocks of every kernel."""
    generator = torch.Generator().manual_seed(1)
    rows = [packed([300], 300), packed([7, 140, 100, 53], 300), packed([129, 16, 17, 30], 300)]
    documents = torch.tensor(rows, dtype=torch.int32)
    both = Mask(causal=False, block=16)
    some = torch.zeros(3, 300, dtype=torch.bool).index_fill_(1, torch.tensor([0, 150, 299]), True)
    bias = torch.randn(4, 611, generator=generator).requires_grad_()
    return {
        "causal": Mask(),
        "documents": Mask(documents_BT=documents),
        "both ways": replace(both, documents_BT=documents),
        "window": Mask(window=70, documents_BT=documents),
        "window both ways": replace(both, window=40, documents_BT=documents),
        "bias": Mask(window=100, bias_HL=bias),
        "bias both ways": replace(both, bias_HL=bias, documents_BT=documents),
        "global tokens": replace(both, window=33, globals_BT=some, documents_BT=documents),
        "prefix": Mask(prefix_B=torch.tensor([0, 40, 300]), block=16),
        "blocks": replace(both, layout_HQJ=torch.rand(4, 19, 19, generator=generator) < 0.3),
        "blocks that count": replace(both, layout_HQJ=torch.randint(0, 3, (4, 19, 19), generator=generator)),
        "blocks and bias": replace(both, layout_HQJ=torch.rand(1, 19, 19, generator=generator) < 0.3, bias_HL=bias),
    }


@pytest.mark.parametrize("kind", long_masks())
@pytest.mark.parametrize("name", FAST)
def test_a_kernel_agrees_with_the_definition_over_several_blocks_of_tokens(name: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(3, 300, heads, 16, generator=generator) for heads in (4, 2, 2, 4))
    mask = long_masks()[kind]
    expected = output_and_gradients(dense_attention, q, k, v, grad, mask)
    found = output_and_gradients(KERNELS[name], q, k, v, grad, mask)
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs - ours).abs().max() <= 300 * 2**-24 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize(("batch_pairs", "batches"), [(0, 7), (BATCH_PAIRS, 3), (10**9, 1)])
def test_documents_agree_with_the_definition_in_many_batches_and_in_few(
    batch_pairs: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.kernels.documents.BATCH_PAIRS", batch_pairs)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(3, 300, heads, 16, generator=generator) for heads in (4, 2, 2, 4))
    mask = long_masks()["documents"]
    assert mask.documents_BT is not None
    made = list(document_batches(q, mask.documents_BT))
    assert len(made) == batches
    assert sum(batch.real_N.numel() for batch in made if batch.real_N is not None) == (mask.documents_BT != 0).sum()
    expected = output_and_gradients(dense_attention, q, k, v, grad, mask)
    found = output_and_gradients(KERNELS["auto"], q, k, v, grad, mask)
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs - ours).abs().max() <= 300 * 2**-24 * max(1.0, theirs.abs().max())


def test_in_half_precision_blockwise_attention_errs_no_more_than_the_definition_does() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 256, 4, 64, generator=generator).bfloat16() for _ in range(4))
    mask = Mask(documents_BT=torch.tensor([packed([200, 56], 256), packed([90, 90, 60], 256)], dtype=torch.int32))
    exact = output_and_gradients(dense_attention, *(x.float() for x in (q, k, v, grad)), mask)
    theirs = output_and_gradients(dense_attention, q, k, v, grad, mask)
    ours = output_and_gradients(KERNELS["auto"], q, k, v, grad, mask)
    for truth, dense_rounded, rounded in zip(exact, theirs, ours, strict=True):
        assert (rounded - truth).norm() <= 1.5 * (dense_rounded - truth).norm()


@settings(max_examples=30, deadline=None)
@given(
    kept=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    tokens=st.integers(1, 5),
    groups=st.sampled_from([1, 3]),
    seed=st.integers(0, 100),
    window=st.none() | st.integers(1, 80),
    biased=st.booleans(),
)
@pytest.mark.parametrize("name", FAST)
def test_cached_decoding_agrees_with_the_definition(
    name: str, kept: list[int], tokens: int, groups: int, seed: int, window: int | None, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.tensor(kept)[:, None] + torch.arange(tokens)
    keys = int(slots.max()) + 4
    bias = torch.randn(2 * groups, 2 * keys - 1, generator=generator) if biased else None
    mask = Mask(slots_BT=slots, keys=keys, window=window, bias_HL=bias)
    q = torch.randn(len(kept), tokens, 2 * groups, 8, generator=generator)
    k, v = (torch.randn(len(kept), mask.keys, 2, 8, generator=generator) for _ in range(2))
    found, expected = KERNELS[name](q, k, v, mask, 0.3), dense_attention(q, k, v, mask, 0.3)
    assert (found - expected).abs().max() <= mask.keys * 2**-24 * max(1.0, float(expected.abs().max()))


def in_words(mask: Mask, row: int, head: int, query: int, key: int) -> bool:
    """The rule as its docstring says it, for one pair."""
    near = mask.window is None or abs(key - query) < mask.window
    if mask.layout_HQJ is not None:
        layouts = mask.layout_HQJ.tolist()
        near = near and layouts[head % len(layouts)][query // mask.block][key // mask.block]
    if mask.globals_BT is not None:
        near = near or bool(mask.globals_BT[row, query]) or bool(mask.globals_BT[row, key])
    seen = near and (key <= query or not mask.causal)
    if mask.prefix_B is not None:
        seen = seen or key < int(mask.prefix_B[row])
    if mask.documents_BT is not None:
        documents = mask.documents_BT[row].tolist()
        seen = seen and documents[query] == documents[key] != 0
    return seen


@settings(max_examples=40, deadline=None)
@given(mask=masks(2, 12, 3))
def test_the_dense_mask_is_the_rule_in_words(mask: Mask) -> None:
    visible = dense(mask, 12, 12, torch.device("cpu")).expand(2, 3, 12, 12).tolist()
    for row, head, query, key in itertools.product(range(2), range(3), range(12), range(12)):
        assert visible[row][head][query][key] == in_words(mask, row, head, query, key)


def test_keys_of_another_row_of_tokens_are_hidden_where_they_are_padding() -> None:
    mask = Mask(causal=False, key_documents_BS=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]))
    q, (k, v) = torch.randn(2, 3, 2, 8), (torch.randn(2, 5, 2, 8) for _ in range(2))
    for kernel in KERNELS.values():
        out = kernel(q, k, v, mask, 0.3)
        short = dense_attention(q[:1], k[:1, :2], v[:1, :2], Mask(causal=False), 0.3)
        assert torch.allclose(out[:1], short, atol=1e-6)
        assert torch.allclose(out[1:], dense_attention(q[1:], k[1:], v[1:], Mask(causal=False), 0.3), atol=1e-6)


def by_sequences(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float) -> torch.Tensor:
    return packed_attention(q, k, v, mask, scale, one_by_one)


@st.composite
def pairs(draw: st.DrawFn) -> Problem:
    """Rows of packed documents that look at rows of others: some without a partner, in another order, of any length."""
    rows, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3]))
    lengths = st.lists(st.integers(1, 40), max_size=6)
    queries, keys = draw(st.integers(1, 60)), draw(st.integers(1, 200))
    own, others = (torch.tensor([packed(draw(lengths), n) for _ in range(rows)]).int() for n in (queries, keys))
    if draw(st.booleans()):
        others = torch.where(others > 0, 7 - others, 0)  # numbers fall along the row, down to 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    q, k, v, grad = (
        torch.randn(rows, tokens, heads, 8, generator=generator, dtype=torch.float64)
        for tokens, heads in ((queries, 2 * groups), (keys, 2), (keys, 2), (queries, 2 * groups))
    )
    return q, k, v, grad, Mask(causal=False, documents_BT=own, key_documents_BS=others)


@pytest.mark.parametrize("kernel", [*(KERNELS[name] for name in FAST), by_sequences], ids=[*FAST, "varlen"])
@settings(max_examples=40, deadline=None)
@given(problem=pairs())
def test_documents_that_look_at_others_see_their_partners_only(kernel: AttentionKernel, problem: Problem) -> None:
    expected = output_and_gradients(dense_attention, *problem)
    for theirs, ours in zip(expected, output_and_gradients(kernel, *problem), strict=True):
        assert (theirs - ours).abs().max() <= 200 * 2**-24 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_padding_gives_zero_and_takes_no_gradient(name: str) -> None:
    documents = torch.tensor([packed([3, 4], 12), packed([], 12)], dtype=torch.int32)
    q, k, v = (torch.randn(2, 12, 2, 8, requires_grad=True) for _ in range(3))
    out = KERNELS[name](q, k, v, Mask(documents_BT=documents), 0.3)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    for tensor in (out, *gradients):
        assert tensor[documents == 0].abs().max() == 0
        assert tensor[documents != 0].isfinite().all()


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_blockwise_attention_never_holds_the_scores_of_a_whole_row(tokens: int) -> None:
    assert 0 < largest_allocation(Mask(), tokens) <= 4 * max(TILE_ELEMENTS, QUERY_BLOCK * tokens)


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_sparse_attention_never_holds_the_scores_of_a_whole_row(tokens: int) -> None:
    mask = Mask(causal=False, window=65, globals_BT=(torch.arange(tokens) == 0)[None])
    assert 0 < largest_allocation(mask, tokens) <= 8 * CHUNK_ELEMENTS  # the distances of a chunk, as int64


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_packed_cross_attention_never_holds_the_scores_of_a_whole_row(tokens: int) -> None:
    documents = torch.tensor([packed([tokens // 2, tokens // 4, 9], tokens)], dtype=torch.int32)
    mask = Mask(causal=False, documents_BT=documents, key_documents_BS=documents)
    assert 0 < largest_allocation(mask, tokens) <= 4 * max(TILE_ELEMENTS, QUERY_BLOCK * tokens)


def largest_allocation(mask: Mask, tokens: int) -> int:
    """Bytes of the largest tensor of a forward and backward pass of two fp32 heads."""
    leaves = [torch.randn(1, tokens, 2, 16, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile(profile_memory=True) as profile:
        KERNELS["auto"](*leaves, mask, 0.25).sum().backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.slow
def test_compiled_training_never_compiles_again_for_other_documents() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of what other tests compiled
    model = build_model(replace(LLAMA, n_layers=1))
    compiled = torch.compile(model, backend="aot_eager")  # traces as any backend does, without minutes of C++
    generator = torch.Generator().manual_seed(0)
    counts = []
    for step in range(4):
        rows = [packed(torch.randint(1, 20, (8,), generator=generator).tolist(), 48) for _ in range(2)]
        tokens = torch.randint(0, 97, (2, 48), generator=generator)
        batch = {"targets_BT": tokens.roll(-1, 1), "documents_BT": torch.tensor(rows, dtype=torch.int32)}
        eager, loss = model(tokens, **batch)["loss_sum"], compiled(tokens, **batch)["loss_sum"]
        loss.backward()
        assert abs(loss.item() - eager.item()) <= 1e-5 * eager.item(), step
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", long_masks())
def test_flex_attention_reads_the_rule_as_the_definition_does(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 300, heads, 16, generator=generator) for heads in (4, 2, 2))
    with torch.no_grad():  # on the CPU it has no backward pass
        found, expected = (attend(q, k, v, long_masks()[kind], 0.3) for attend in (flex_attention, dense_attention))
    assert (found - expected).abs().max() <= 300 * 2**-24 * max(1.0, expected.abs().max())


def one_by_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    reach: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """What a varlen kernel is to compute, one sequence at a time."""
    mask = Mask(causal=reach[1] == 0, window=None if reach[0] < 0 else reach[0] + 1)
    out = torch.zeros_like(q)
    pairs = (itertools.pairwise(starts.tolist()) for starts in (sequences.starts, sequences.key_starts))
    for (start, end), (key_start, key_end) in zip(*pairs, strict=True):
        assert 0 <= end - start <= sequences.longest and 0 <= key_end - key_start <= sequences.longest_key
        if end > start:
            row, keys = slice(start, end), slice(key_start, key_end)
            out[row] = dense_attention(q[None, row], k[None, keys], v[None, keys], mask, scale)[0]
    return out


@pytest.mark.parametrize("kind", ["causal", "documents", "both ways", "window", "window both ways"])
def test_packed_documents_reach_a_varlen_kernel_as_sequences(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(3, 300, heads, 16, generator=generator) for heads in (4, 2, 2, 4))

    mask = long_masks()[kind]
    expected = output_and_gradients(dense_attention, q, k, v, grad, mask)
    for theirs, ours in zip(expected, output_and_gradients(by_sequences, q, k, v, grad, mask), strict=True):
        assert (theirs - ours).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())
    starts = sequence_starts(mask, 3, 300, torch.device("cpu"))
    assert len(starts) == 4 if mask.documents_BT is None else len(starts) % SEQUENCES_QUANTUM == 0
