"""What every parity test does with a class of transformers: stir its weights, take what it would save, compare."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from model.architecture import Transformer
from model.build import build_model
from model.config import ModelConfig
from model.interop import from_hf, hf_config, load_pretrained, save_pretrained, to_hf

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def stirred(theirs: transformers.PreTrainedModel, by: float = 0.1) -> transformers.PreTrainedModel:
    """The model in evaluation, biases and scales no longer at zeros and ones; frozen tables stay."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


def saved(theirs: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def saved_gradients(theirs: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients under the names of the checkpoint; of a model that is not needed afterwards."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return saved(theirs)


def imported(theirs: transformers.PreTrainedModel) -> Transformer:
    """Our model of it."""
    described = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}
    config, state = from_hf(described, saved(theirs))
    ours = build_model(config)
    ours.load_state_dict(state)
    return ours.eval()


def exported(ours: Transformer, cls: Any) -> transformers.PreTrainedModel:
    """Our model as transformers loads it from what we write, after a round trip of ours bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours.state_dict(), ours.config, Path(folder))
        config, again = load_pretrained(Path(folder))
        assert hf_config(config) == hf_config(ours.config)
        assert again.keys() == ours.state_dict().keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())
        theirs, loading = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()), loading
    return theirs.eval()


def stirred_ours(config: ModelConfig) -> Transformer:
    """A model of ours, biases and scales no longer at zeros and ones."""
    ours, generator = build_model(config, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ours.eval()


def assert_close(theirs: torch.Tensor, ours: torch.Tensor, within: float = 1e-5) -> None:
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= within * theirs.abs().max()


def assert_same_bytes(theirs: Mapping[str, torch.Tensor], ours: Transformer) -> None:
    """Exporting what was imported gives their tensors bit for bit."""
    again = to_hf(ours.state_dict(), ours.config)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())


def gradients_of(ours: Transformer) -> dict[str, torch.Tensor]:
    """The gradients of our model, zeros where it has none, under the names of the checkpoint."""
    own = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in ours.named_parameters()}
    own |= {name: own[source] for name, source in ours.config.tied_weights.items()}
    return to_hf(own, ours.config)


def assert_same_gradients(
    theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], within: float = 2e-5
) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (gradient - ours[name]).abs().max() <= within * largest, name


def trimmed(row: list[int], stop_ids: list[int]) -> list[int]:
    """Their new tokens up to the stop id."""
    ends = [at for at, token in enumerate(row) if token in stop_ids]
    return row[: ends[0]] if ends else row
