"""Distillation losses are zero for a copy, have the gradients of their definitions, and teach."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.adapt.distill import hidden_distillation, logit_distillation
from model.build import build_model
from tests.model.configurations import LLAMA
from tests.model.learning import learn


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(6, 11, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(temperature=st.sampled_from([0.5, 1.0, 4.0]), seed=st.integers(0, 100), masked=st.booleans())
def test_the_logit_loss_is_the_scaled_divergence_and_only_the_student_has_a_gradient(
    temperature: float, seed: int, masked: bool
) -> None:
    student, teacher = logits(seed).requires_grad_(), logits(seed + 1).requires_grad_()
    valid = torch.tensor([True, False, True, True, False, True]) if masked else None
    kept = slice(None) if valid is None else valid
    found = logit_distillation(student, teacher, temperature=temperature, valid_N=valid)
    expected = temperature**2 * torch.nn.functional.kl_div(
        (student[kept] / temperature).log_softmax(-1), (teacher[kept] / temperature).softmax(-1), reduction="sum"
    )
    assert torch.allclose(found, expected, rtol=1e-4)
    [gradient] = torch.autograd.grad(found, student)
    by_hand = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    if valid is not None:
        by_hand = by_hand * valid[:, None]
    assert torch.allclose(gradient, by_hand, atol=1e-5)
    assert logit_distillation(teacher, teacher).abs() < 1e-5
    with pytest.raises(RuntimeError):
        torch.autograd.grad(logit_distillation(student.detach(), teacher), teacher)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_states_are_compared_through_a_projection_where_widths_differ(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, projection = torch.randn(5, 4, generator=generator), torch.randn(8, 4, generator=generator)
    teacher = student @ projection.T
    valid = torch.tensor([True, True, False, True, True])
    assert hidden_distillation(student, teacher, kind=kind, projection_DD=projection).abs() < 1e-5
    apart = teacher.clone()
    apart[2] += 3  # which does not count
    assert hidden_distillation(student, apart, kind=kind, projection_DD=projection, valid_N=valid).abs() < 1e-5
    assert hidden_distillation(student, apart, kind=kind, projection_DD=projection) > 0.1


def test_a_student_comes_nearer_to_its_teacher() -> None:
    teacher, student = build_model(LLAMA, seed=1), build_model(LLAMA, seed=2)
    tokens = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    target = teacher(tokens)["logits"].detach()

    def loss() -> torch.Tensor:
        return logit_distillation(student(tokens)["logits"].flatten(0, 1), target.flatten(0, 1), temperature=2.0) / 64

    losses = learn(student, loss, steps=25, lr=3e-3)
    assert losses[-1] < losses[0] / 2


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(Refusal, match="same vocabulary"):
        logit_distillation(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(Refusal, match="temperature = 0"):
        logit_distillation(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0)
    with pytest.raises(Refusal, match="Give a projection"):
        hidden_distillation(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(Refusal, match="kind = 'l1'"):
        hidden_distillation(torch.zeros(2, 3), torch.zeros(2, 3), kind="l1")
