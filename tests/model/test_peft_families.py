"""What is attached to a model of any class is exported so that the peft package computes the same over that class."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from model.interop import save_adapter
from model.interop.families import FAMILIES
from model.peft import LoraConfig, attach_lora
from tests.model.parity import imported, stirred
from tests.model.peft_families import CLASSES, answer, inputs

LORA = LoraConfig(rank=2, alpha=5.0)
NAMES = [f"{number}-{cls.__name__}" for number, (cls, _) in enumerate(CLASSES)]


def pair(cls: Any, config: Any) -> tuple[Any, Any]:
    """A model of theirs, and ours of it."""
    torch.manual_seed(0)
    theirs = stirred(cls(config))
    return theirs, imported(theirs)


def moved(model: Any) -> None:
    """What is trained leaves its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_every_class_is_tried() -> None:
    assert {cls.__name__ for cls, _ in CLASSES} == {family.architecture for family in FAMILIES}


@pytest.mark.parametrize(("cls", "config"), CLASSES, ids=NAMES)
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
    print(f"LORA {(expected - found).abs().max() / expected.abs().max():.1e}", cls.__name__)
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
