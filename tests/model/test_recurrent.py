"""Mamba and linear attention: the parallel form is the recurrence, documents reset the state, which never grows."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.init import initial_value, parameter_roles
from model.kernels import causal_conv, linear_attention, selective_scan
from model.kernels.attention import dense_attention
from model.masks import Mask
from model.mixers.base import MixerInput
from model.mixers.linear_attention import (
    FavorConfig,
    FavorFeatures,
    LinearAttention,
    LinearAttentionConfig,
    LinearState,
)
from model.mixers.mamba import MambaState
from model.positions.documents import document_starts
from tests.model.configurations import DALLE, HYBRID, LINEAR, LIVELY, MAMBA, PERFORMER, RECURRENT

ALL = pytest.mark.parametrize("config", RECURRENT.values(), ids=RECURRENT.keys())
PURE = pytest.mark.parametrize("name", ["mamba", "linear", "performer"])
Tensors = list[torch.Tensor]


def packed(rows: int, tokens: int, generator: torch.Generator, every: int = 6) -> torch.Tensor:
    """int32 document numbers from 1, or 0 for a run of padding at the end of the first row."""
    first = torch.rand(rows, tokens, generator=generator) < 1 / every
    documents = first.int().cumsum(1, dtype=torch.int32) + 1
    documents[0, tokens - tokens // 4 :] = 0
    return documents


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Equal up to fp32's rounding of sums of a few dozen terms."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max().clamp(min=1)


def differentiated(function: Callable[..., Any], inputs: Tensors, *others: Any) -> tuple[Tensors, Tensors]:
    """Outputs, and the gradients of their products with fixed random tensors."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = list(function(*inputs, *others))
    generator = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    return outputs, list(torch.autograd.grad(loss, inputs))  # type: ignore[arg-type]


def scan_inputs(rows: int, tokens: int, width: int, state: int, generator: torch.Generator) -> Tensors:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dt = torch.nn.functional.softplus(draw(rows, tokens, width) - 1)
    a = -torch.rand(width, state, generator=generator) * 4 - 0.1
    return [draw(rows, tokens, width), dt, a, draw(rows, tokens, state), draw(rows, tokens, state)]


SHAPES = {
    "rows": st.integers(1, 3),
    "tokens": st.sampled_from([1, 5, 32, 33, 75]),
    "width": st.integers(1, 7),
    "seed": st.integers(0, 99),
}


@settings(max_examples=25, deadline=None)
@given(**SHAPES, state=st.integers(1, 5), tile=st.sampled_from([1, 8, 10**6]), documents=st.booleans())
def test_the_chunked_scan_is_the_recurrence_forward_and_backward(
    rows: int, tokens: int, width: int, seed: int, state: int, tile: int, documents: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = scan_inputs(rows, tokens, width, state, generator)
    starts = document_starts(packed(rows, tokens, generator)) if documents else None
    before = torch.randn(rows, state, width, generator=generator)

    def with_state(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: function(*tensors[:5], starts, tensors[5])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_scan, "TILE_ELEMENTS", tile)
        for ours, tensors in ((with_state, [*inputs, before]), (lambda f: f, inputs)):
            found = differentiated(ours(selective_scan.selective_scan), tensors)
            expected = differentiated(ours(selective_scan.recurrent_scan), tensors)
            assert_same(found[0], expected[0])
            assert_same(found[1], expected[1])


def test_the_scan_and_the_convolution_are_operators_that_torch_compile_can_take() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [tensor.requires_grad_() for tensor in scan_inputs(2, 37, 3, 4, generator)]
    convolved = (inputs[0], torch.randn(3, 1, 4, requires_grad=True), torch.randn(3, requires_grad=True))
    for operator, arguments in (
        (selective_scan.chunked_scan, (*inputs, None, None)),
        (causal_conv.tap_by_tap, (*convolved, packed(2, 37, generator))),
    ):
        checks = torch.library.opcheck(operator, arguments, raise_exception=False)
        assert set(checks.values()) == {"SUCCESS"}, checks


def test_a_kernel_that_knows_no_documents_is_given_tokens_that_forget() -> None:
    def like_mamba_ssm(
        x_BFT: torch.Tensor, dt_BFT: torch.Tensor, a_FZ: torch.Tensor, b_BZT: torch.Tensor, c_BZT: torch.Tensor
    ) -> torch.Tensor:
        x, dt, b, c = (tensor.transpose(1, 2) for tensor in (x_BFT, dt_BFT, b_BZT, c_BZT))
        return selective_scan.recurrent_scan(x, dt, a_FZ, b, c)[0].transpose(1, 2)

    generator = torch.Generator().manual_seed(0)
    inputs = scan_inputs(3, 40, 4, 3, generator)
    for starts in (None, document_starts(packed(3, 40, generator))):
        found = differentiated(lambda *i, s=starts: [selective_scan.fused_scan(like_mamba_ssm, *i, s)], inputs)
        expected = differentiated(lambda *i, s=starts: [selective_scan.recurrent_scan(*i, s)[0]], inputs)
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1])


@settings(max_examples=15, deadline=None)
@given(**SHAPES, taps=st.integers(1, 5), bias=st.booleans())
def test_the_convolution_is_torchs_and_of_a_packed_row_that_of_its_documents(
    rows: int, tokens: int, width: int, seed: int, taps: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(s, generator=generator) for s in ((rows, tokens, width), (width, 1, taps)))
    inputs = [x, weight, *([torch.randn(width, generator=generator)] if bias else [])]

    def theirs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        padded = torch.nn.functional.pad(x.transpose(1, 2), (taps - 1, 0))
        return torch.nn.functional.conv1d(padded, weight, bias, groups=width).transpose(1, 2)

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Tensors:
        return [causal_conv.causal_conv(x, weight, bias, documents)]

    def document_by_document(x: torch.Tensor, *others: torch.Tensor) -> Tensors:
        cuts = [document_starts(numbers[None])[0].nonzero()[1:, 0].tolist() for numbers in documents]
        return [
            torch.cat(
                [
                    torch.cat([theirs(piece[None], *others) for piece in row.tensor_split(cut)], dim=1)
                    for row, cut in zip(x, cuts, strict=True)
                ]
            )
        ]

    documents: Any = None
    found, expected = differentiated(ours, inputs), differentiated(lambda *i: [theirs(*i)], inputs)
    assert_same([*found[0], *found[1]], [*expected[0], *expected[1]])
    documents = packed(rows, tokens, generator)
    found, expected = differentiated(ours, inputs), differentiated(document_by_document, inputs)
    assert_same([*found[0], *found[1]], [*expected[0], *expected[1]])


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 2),
    tokens=st.sampled_from([1, 9, 64, 65, 150]),
    heads=st.integers(1, 2),
    features=st.integers(1, 5),
    channels=st.integers(1, 4),
    documents=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunked_linear_attention_is_the_recurrence_forward_and_backward(
    rows: int, tokens: int, heads: int, features: int, channels: int, documents: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, tokens, heads, n) for n in (features, features, channels)]
    inputs = [torch.rand(shape, generator=generator) for shape in shapes]
    numbers = packed(rows, tokens, generator, every=40) if documents else None
    starts = None if numbers is None else document_starts(numbers)
    if starts is not None:
        starts[:, 0] = False  # the state belongs to the first document
    before = torch.rand(rows, heads, features, channels, generator=generator)
    found = differentiated(
        lambda q, k, v, s: linear_attention.causal_linear_attention(q, k, v, numbers, s), [*inputs, before]
    )
    expected = differentiated(
        lambda q, k, v, s: linear_attention.recurrent_linear_attention(q, k, v, starts, s), [*inputs, before]
    )
    scale = tokens * features
    for one, other in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert (one - other).abs().max() <= 1e-6 * scale * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_attention_with_products_of_features_as_weights(causal: bool, documents: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mixer = LinearAttention(LinearAttentionConfig(n_heads=2), 12)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(2, 150, 12, generator=generator)
    numbers = packed(2, 150, generator, every=40) if documents else None
    mask = Mask(causal=causal, documents_BT=numbers)
    found = mixer(x, MixerInput(mask))
    q, k, v = (part(x).view(2, 150, 2, 6) for part in (mixer.q, mixer.k, mixer.v))
    weights = torch.einsum("bthp,bshp->bhts", *mixer.features(q, k))
    place = torch.arange(150)
    visible = (place <= place[:, None] if causal else torch.ones(150, 150, dtype=torch.bool))[None]
    if numbers is not None:
        visible = visible & (numbers[:, :, None] == numbers[:, None]) & (numbers != 0)[:, None]
    weights = weights * visible[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    expected = mixer.out(torch.einsum("bhts,bshc->bthc", weights, v).flatten(2))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("channels", [8, 64])
def test_performers_error_against_softmax_attention_falls_as_features_grow(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # The estimate's variance grows with exp(|q + k|²), so much longer vectors need very many features.
    q, k, v = (0.5 * torch.randn(1, 60, 1, channels, generator=generator) for _ in range(3))
    exact = dense_attention(q, k, v, Mask(), channels**-0.5)

    def error(features: int, seed: int) -> float:
        maps = FavorFeatures(features, channels)
        drawn = initial_value(
            name="w", shape=maps.weight.shape, draw="orthogonal", config=LIVELY, n_layers=1, seed=seed
        )
        maps.weight.data.copy_(drawn)
        q_features, k_features = maps(q, k)
        ones = torch.nn.functional.pad(v, (0, 1), value=1.0)
        out, _ = linear_attention.causal_linear_attention(q_features, k_features, ones)
        return float((out[..., :-1] / out[..., -1:] - exact).square().mean())

    errors = [sum(error(features, seed) for seed in range(12)) / 12 for features in (16, 128, 1024, 8192)]
    assert all(more < fewer / 2 for fewer, more in pairwise(errors)), errors
    assert errors[-1] < 0.03 * float(exact.square().mean())


def test_features_are_orthogonal_as_long_as_gaussian_rows_and_never_trained() -> None:
    model = build_model(PERFORMER, seed=3)
    weight = model.get_parameter("stack.layers.1.mixer.features.weight")
    assert not weight.requires_grad
    assert parameter_roles(model)["stack.layers.1.mixer.features.weight"] == "features"
    products = weight[:8] @ weight[:8].T
    assert (products - products.diag().diag()).abs().max() <= 1e-5
    drawn = initial_value(name="w", shape=(4096, 16), draw="orthogonal", config=LIVELY, n_layers=1, seed=0)
    assert drawn.square().sum(1).mean().item() == pytest.approx(16, rel=5 * (2 / 16 / 4096) ** 0.5)
    assert drawn.mean().abs() <= 5 * (16 * 4096) ** -0.5


def test_mamba_starts_as_its_paper_says() -> None:
    state = build_model(replace(MAMBA, d_model=512, n_layers=1)).state_dict()
    mixer = {name.removeprefix("stack.layers.0.mixer."): value for name, value in state.items() if "mixer." in name}
    steps = torch.nn.functional.softplus(mixer["dt_proj.bias"])
    assert steps.min() >= 0.999e-3 and steps.max() <= 0.1001
    assert steps.log().mean().item() == pytest.approx(-4.605, abs=5 * 4.605 / (12 * 1024) ** 0.5)
    assert torch.equal(mixer["a_log"], torch.arange(1.0, 9).log().expand(1024, 8))
    assert torch.equal(mixer["skip"], torch.ones(1024))
    assert 0.49 < mixer["conv.weight"].abs().max() <= 0.5
    assert mixer["dt_proj.weight"].abs().max() <= 32**-0.5


def losses(model: torch.nn.Module, tokens: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    return model(tokens, targets_BT=tokens.roll(-1, 1), documents_BT=documents)["loss_sum"]


@ALL
def test_a_packed_row_gives_what_its_documents_give_alone_forward_and_backward(config: ModelConfig) -> None:
    model = build_model(replace(config, max_seq_len=256), seed=1)
    lengths = [1, 70, 2, 3, 40, 64]  # shorter than the convolution, across chunks of both kinds, ending with one
    tokens = torch.randint(0, 97, (1, sum(lengths) + 9), generator=torch.Generator().manual_seed(0))
    numbers = torch.repeat_interleave(torch.arange(1, 7), torch.tensor(lengths))
    documents = torch.cat((numbers, torch.zeros(9, dtype=torch.int64))).int()[None]
    pieces = tokens[0].split([*lengths, 9])[:-1]
    together = model(tokens, documents_BT=documents)["logits"][:, :-9]
    alone = torch.cat([model(piece[None])["logits"] for piece in pieces], dim=1)
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, expected = (torch.autograd.grad((logits * weights).sum(), trained) for logits in (together, alone))
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert all((one - other).abs().max() <= 1e-5 * largest for one, other in zip(found, expected, strict=True))


@PURE
def test_rows_padded_in_front_are_read_into_a_cache_as_rows_of_their_own(name: str) -> None:
    model = build_model(RECURRENT[name])
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    documents = torch.ones(2, 9, dtype=torch.int32)
    documents[1, :7] = 0
    cache = model.new_cache(2, 12)
    shared = MixerInput(Mask(documents_BT=documents), slots_BT=cache.claim(9).slots_BT)
    positions = (torch.arange(9) - (9 - documents.sum(1))[:, None]).clamp(min=0)
    x = model.frontend(positions, tokens_BT=tokens)
    model.stack(x, shared, cache.states)
    cache.lengths = [9, 2]
    found = model(torch.tensor([[4], [5]]), cache=cache)["logits"][1, 0]
    expected = model(torch.tensor([[*tokens[1, 7:].tolist(), 5]]))["logits"][0, -1]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@PURE
def test_a_state_is_as_large_after_many_tokens_as_before_the_first(name: str) -> None:
    model = build_model(RECURRENT[name])

    def held(cache: Any) -> int:
        tensors = [tensor for state in cache.states for tensor in vars(state).values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, torch.Tensor))

    cache = model.new_cache(2, 60)
    assert all(isinstance(state, MambaState | LinearState) for state in cache.states)
    before = held(cache)
    with torch.no_grad():
        for _ in range(5):
            model(torch.ones(2, 9, dtype=torch.int64), cache=cache)
            model(torch.ones(2, 1, dtype=torch.int64), cache=cache)
    assert held(cache) == before == held(model.new_cache(2, 10**9))


@ALL
def test_a_state_without_places_for_tokens_cannot_be_rewound(config: ModelConfig) -> None:
    model = build_model(config)
    cache = model.new_cache(2, 20)
    model(torch.ones(2, 9, dtype=torch.int64), cache=cache)
    cache.rewind([9, 9])
    with pytest.raises(Refusal, match=r"cannot be rewound to \[9, 4\].*give `lengths`"):
        cache.rewind([9, 4])


@pytest.mark.parametrize(
    "given", [{"prefix_B": torch.tensor([3, 0])}, {"globals_BT": torch.ones(2, 9) > 0}], ids=["prefix", "globals"]
)
@pytest.mark.parametrize("config", [MAMBA, LINEAR, HYBRID, DALLE], ids=["mamba", "linear", "hybrid", "grid"])
def test_what_a_mixer_cannot_honour_of_a_mask_is_refused_not_ignored(
    config: ModelConfig, given: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(Refusal, match=r"prefix_B or globals_BT was given"):
        build_model(config)(torch.ones(2, 9, dtype=torch.int64), **given)


@pytest.mark.slow
@ALL
def test_torch_compile_takes_every_block_as_one_graph(config: ModelConfig) -> None:
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    documents = packed(2, 40, torch.Generator().manual_seed(0))
    plain, compiled = build_model(config), build_model(config)
    for block in compiled.stack.layers:
        block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    for model in (plain, compiled):
        losses(model, tokens, documents).backward()
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max().clamp(min=1e-3)


@ALL
def test_half_precision_stays_near_full_precision(config: ModelConfig) -> None:
    model = build_model(config)
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    full = losses(model, tokens, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses(model, tokens, None)
    half.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    assert half.item() == pytest.approx(full.item(), rel=0.02)


@ALL
def test_training_makes_the_loss_fall(config: ModelConfig) -> None:
    model = build_model(replace(config, init=replace(LIVELY, std=None)))
    tokens = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    documents = torch.ones_like(tokens, dtype=torch.int32)
    documents[:, 36:] = 2
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    history = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = losses(model, tokens, documents) / tokens.numel()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


def test_features_that_are_all_zero_give_no_nan() -> None:
    mixer = LinearAttention(LinearAttentionConfig(n_heads=1, features=FavorConfig(n_features=16)), 8)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(30.0)
    x = torch.randn(1, 70, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = mixer(x, MixerInput(Mask()))
    out.sum().backward()
    assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
