"""Rotation depends on distance alone; positions restart with every document."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from model.positions.alibi import alibi_bias
from model.positions.documents import document_positions
from model.positions.rope import LinearScaling, Llama3Scaling, RopeConfig, inverse_frequencies
from tests.model.test_attention import packed

CPU = torch.device("cpu")


@given(first=st.integers(0, 2000), distance=st.integers(0, 2000), shift=st.integers(0, 2000))
def test_a_rotated_product_depends_on_the_distance_alone(first: int, distance: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(first)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator) for _ in range(2))

    def score(q_at: int, k_at: int) -> float:
        at_q, at_k = (RopeConfig().rotation(torch.tensor([[at]]), 16) for at in (q_at, k_at))
        return float((at_q(q) * at_k(k)).sum())

    # An angle is a position times a frequency of at most 1 in fp32: 2^-24 of 6,000 radians, on each side.
    bound = 2 * 6000 * 2**-24 * float(q.norm() * k.norm()) + 1e-5
    assert abs(score(first, first + distance) - score(first + shift, first + distance + shift)) <= bound


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 20])
def test_alibi_discounts_distance_as_blooms_class_does(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 11), heads, torch.float32).view(heads, 11)  # by position, not distance
    ours = alibi_bias(heads, 11, CPU)[:, :11]  # what stands 10, 9 … 0 tokens behind
    assert torch.allclose(ours, theirs - theirs[:, -1:], atol=1e-6)


def test_rotation_keeps_lengths_and_leaves_position_zero_alone() -> None:
    x = torch.randn(2, 7, 3, 16)
    rotated = RopeConfig().rotation(torch.arange(7)[None], 16)(x)
    assert torch.equal(rotated[:, 0], x[:, 0])
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert not torch.allclose(rotated[:, 1:], x[:, 1:])


def test_angles_stay_in_full_precision_in_a_half_precision_model() -> None:
    far = torch.tensor([[4097]])
    turned = RopeConfig().rotation(far, 8)(torch.ones(1, 1, 1, 8, dtype=torch.bfloat16))
    exact = RopeConfig().rotation(far, 8)(torch.ones(1, 1, 1, 8))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, exact.bfloat16())


def test_linear_scaling_divides_positions() -> None:
    x = torch.randn(1, 3, 1, 16)
    stretched = RopeConfig(scaling=LinearScaling(factor=4.0)).rotation(torch.tensor([[0, 8, 40]]), 16)(x)
    assert torch.allclose(stretched, RopeConfig().rotation(torch.tensor([[0, 2, 10]]), 16)(x), atol=1e-5)


def test_llama3_scaling_leaves_short_wavelengths_and_stretches_long_ones() -> None:
    plain = inverse_frequencies(RopeConfig(theta=5e5), 128, CPU)
    scaled = inverse_frequencies(RopeConfig(theta=5e5, scaling=Llama3Scaling(factor=32.0)), 128, CPU)
    wavelength = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    assert torch.allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 32)
    assert (scaled.diff() <= 0).all()


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 30))
def test_positions_restart_with_every_document(lengths: list[int], tokens: int) -> None:
    row = packed(lengths, tokens)
    expected = [row[:at].count(number) if number else None for at, number in enumerate(row)]
    found = document_positions(torch.tensor([row], dtype=torch.int32))[0].tolist()
    assert all(theirs is None or theirs == ours for theirs, ours in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_are_64_bit_whatever_numbers_documents_have(dtype: torch.dtype) -> None:
    assert document_positions(torch.tensor([[1, 1, 2]], dtype=dtype)).dtype == torch.int64
