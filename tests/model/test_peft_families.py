"""What is attached to a model of any class is exported so that the peft package computes the same over that class."""

import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from conf.refusal import Refusal
from model.adapt import LoraConfig, PrefixConfig, PromptConfig, attach_lora, attach_prefix, attach_prompt, with_prompt
from model.interop import family_of, save_adapter, save_pretrained, save_virtual_tokens
from model.interop.families import FAMILIES
from tests.model.parity import imported, stirred
from tests.model.peft_families import CLASSES, answer, inputs

LORA = LoraConfig(rank=2, alpha=5.0)
# One of each difficulty is tried every time, all of them by `make check-slow`.
QUICK = {"DeepseekV3ForCausalLM", "FalconForCausalLM", "T5ForConditionalGeneration", "ViTForImageClassification"}
EVERY_CLASS = pytest.mark.parametrize(
    ("cls", "config"),
    [
        pytest.param(*row, id=f"{number}-{row[0].__name__}", marks=() if row[0].__name__ in QUICK else pytest.mark.slow)
        for number, row in enumerate(CLASSES)
    ],
)


def pair(cls: Any, config: Any) -> tuple[Any, Any]:
    """Theirs as it loads what we export, and our model."""
    torch.manual_seed(0)
    ours = imported(stirred(cls(config)))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours.state_dict(), ours.config, Path(folder))
        return cls.from_pretrained(folder).eval(), ours


def moved(model: Any) -> None:
    """What is trained leaves its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_every_class_is_tried() -> None:
    assert {cls.__name__ for cls, _ in CLASSES} == {family.architecture for family in FAMILIES}


@EVERY_CLASS
def test_peft_computes_what_our_adapters_do(cls: Any, config: Any, tmp_path: Path) -> None:
    theirs, ours = pair(cls, config)
    given, own = inputs(theirs)
    with torch.no_grad():
        plain = answer(ours(**own))
        attach_lora(ours, LORA)
        moved(ours)
        save_adapter(ours.state_dict(), ours.config, LORA, tmp_path)
        found = answer(peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()(**given))
        expected = answer(ours(**own))
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    assert (expected - found).abs().max() <= ROUNDED * expected.abs().max()


ROUNDED = 2e-5
"""Relative to the largest: fp32 through two layers, added up in another order; 1.3e-5 seen on a CPU with AVX-512."""

NO_PREFIX = {"DeepseekV3ForCausalLM": "have LatentAttention", "MambaForCausalLM": "have Mamba"}


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@EVERY_CLASS
def test_peft_computes_what_virtual_tokens_do_or_they_are_refused(
    cls: Any, config: Any, kind: str, tmp_path: Path
) -> None:
    theirs, ours = pair(cls, config)
    given, own = inputs(theirs)
    plain = answer(ours(**own))
    refused = NO_PREFIX.get(cls.__name__) if ours.config.causal else "causal is false"
    if kind == "prompt":
        refused = None if "input_ids" in given else "need a frontend of tokens"
        refused = None if cls.__name__.startswith("Whisper") else refused
    attach = {"prompt": attach_prompt, "prefix": attach_prefix}[kind]
    chosen = PromptConfig(tokens=3) if kind == "prompt" else PrefixConfig(tokens=3)
    if refused:
        with pytest.raises(Refusal, match=refused):
            attach(ours, chosen)
        assert all(parameter.requires_grad for parameter in ours.parameters())
        return
    attach(ours, chosen)
    moved(ours)
    if kind == "prompt":
        read = "encoder_tokens_BT" if "encoder_tokens_BT" in own else "tokens_BT"
        own[read] = torch.tensor([with_prompt(row, 3) for row in own[read].tolist()])
    else:
        own["cache"] = ours.new_cache(2, own["tokens_BT"].shape[1])
    with torch.no_grad():
        expected = answer(ours(**own))
    assert expected.shape != plain.shape or (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    if family_of(ours.config).peft_task is None:
        with pytest.raises(Refusal, match="Adapt it with lora"):
            save_virtual_tokens(ours.state_dict(), ours.config, tmp_path)
        return
    save_virtual_tokens(ours.state_dict(), ours.config, tmp_path)
    with torch.no_grad():
        found = answer(peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()(**given))
    assert (expected - found).abs().max() <= ROUNDED * expected.abs().max()
