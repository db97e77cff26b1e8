"""Starting values are a function of seed and name; every parameter has a role."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from model.build import build_model
from model.config import ModelConfig, parameter_roles
from model.init import InitConfig, declarations, initialize, no_weight_decay
from tests.model.configurations import GPT2, LLAMA, any_config


def state(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return build_model(config, seed=seed).state_dict()


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    first, second, other = state(LLAMA, 3), state(LLAMA, 3), state(LLAMA, 4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    matrices = [name for name in first if first[name].ndim == 2]
    assert all(not torch.equal(first[name], other[name]) for name in matrices)


def test_a_layer_more_changes_no_value_of_the_others() -> None:
    plain = replace(LLAMA, init=InitConfig(residual="plain"))
    shallow, deep = state(plain), state(replace(plain, n_layers=3))
    assert len(deep) > len(shallow)
    assert all(torch.equal(deep[name], value) for name, value in shallow.items())


def test_a_half_precision_model_starts_as_the_rounded_full_precision_one() -> None:
    half, full = build_model(LLAMA, dtype=torch.bfloat16).state_dict(), state(LLAMA)
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


def test_a_model_built_without_memory_can_be_filled_later_with_the_same_values() -> None:
    later = build_model(LLAMA, device="meta").to_empty(device="cpu")
    later.tie_weights()
    initialize(later, config=LLAMA.init, n_layers=LLAMA.n_layers, seed=7)
    assert later.head.weight is later.frontend.tokens.weight
    built = state(LLAMA, 7)
    assert all(torch.equal(value, built[name]) for name, value in later.state_dict().items())


@settings(max_examples=25, deadline=None)
@given(any_config())
def test_every_parameter_has_one_role_under_its_own_name(config: ModelConfig) -> None:
    model = build_model(config, device="meta")
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    for name, role in roles.items():
        if name.endswith("bias"):
            assert role == "bias"
        elif "norm" in name:
            assert role == "norm"
        else:
            assert role == (
                "embedding"
                if name.startswith("frontend")
                else "head"
                if name == "head.weight"
                else "router"
                if "router" in name
                else "expert"
                if "experts" in name
                else "matrix"
            )


def test_only_matrices_and_an_untied_head_are_decayed() -> None:
    model = build_model(replace(GPT2, tie_embeddings=False))
    decayed = {name for name, _ in model.named_parameters()} - no_weight_decay(model)
    assert {parameter_roles(model)[name] for name in decayed} == {"matrix", "head"}
    assert all(model.get_parameter(name).ndim == 2 for name in decayed)


def test_weights_have_the_spread_the_configuration_asks_for() -> None:
    wide = replace(LLAMA, d_model=256, n_layers=8, tie_embeddings=False, vocab_size=500)
    for init, residual, matrix, head in (
        (InitConfig(std=0.02), 0.02 / 16**0.5, 0.02, 0.02),
        (InitConfig(std=None, residual="plain", head_std=0.5), 1 / 16, 1 / 16, 0.5),
        (InitConfig(std=0.1, residual="zero", head_std=0.0), 0.0, 0.1, 0.0),
    ):
        values = state(replace(wide, init=init))
        found = [values[f"stack.layers.3.mixer.{name}.weight"].std().item() for name in ("out", "q")]
        # A sample of n draws has a standard error of std / sqrt(2 n); five of them.
        assert found[0] == pytest.approx(residual, rel=5 / (2 * 256 * 256) ** 0.5)
        assert found[1] == pytest.approx(matrix, rel=5 / (2 * 256 * 256) ** 0.5)
        assert values["head.weight"].std().item() == pytest.approx(head, rel=5 / (2 * 256 * 500) ** 0.5)


def test_a_tied_head_is_counted_once_and_is_the_embedding() -> None:
    model = build_model(LLAMA)
    names = [name for name, _, _ in declarations(model)]
    assert "head.weight" not in names
    assert model.head.weight is model.frontend.tokens.weight
