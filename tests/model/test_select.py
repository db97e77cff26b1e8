"""Kernels are chosen once, said in one line, and held to the oracle before they train."""

import logging
from dataclasses import replace

import pytest
import torch

from model.build import build_model
from model.errors import ModelError
from model.kernels import select
from model.kernels.check import check_kernels
from model.kernels.select import CAN, KERNELS, KINDS, Selection, kind_of, select_kernel
from model.masks import Mask
from model.mixers.attention import Attention
from tests.model.configurations import ALIBI, LLAMA, WINDOWED

CPU = torch.device("cpu")


def selection_of(model: torch.nn.Module) -> Selection:
    kernels = {id(m.kernel): m.kernel for m in model.modules() if isinstance(m, Attention)}
    (only,) = kernels.values()
    assert isinstance(only, Selection)
    return only


def test_every_kind_of_mask_is_recognised() -> None:
    documents, bias = torch.ones(1, 4, dtype=torch.int32), torch.zeros(2, 7)
    masks = {
        "plain": Mask(),
        "window": Mask(window=2),
        "documents": Mask(window=2, documents_BT=documents),
        "biased": Mask(documents_BT=documents, bias_HL=bias),
        "sparse": Mask(bias_HL=bias, globals_BT=documents == 0),
        "cross": Mask(causal=False, key_documents_BS=documents),
        "paired": Mask(causal=False, documents_BT=documents, key_documents_BS=documents),
        "cached": Mask(slots_BT=torch.tensor([[3]]), keys=4, window=2),
    }
    assert {kind_of(mask, 4, 4): mask for mask in masks.values()} == {kind: masks[kind] for kind in KINDS}
    assert kind_of(Mask(causal=False), 4, 5) == "cross"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["auto", *sorted(KERNELS.keys() - {"cached"})])
def test_every_kind_of_mask_has_a_kernel_that_honours_it(name: str, device_type: str) -> None:
    selection = select_kernel(name)
    for kind in KINDS:
        assert kind in CAN[selection.named(device_type, kind)]
        if name != "auto" and kind in CAN[name] and kind != "cached":
            assert selection.named(device_type, kind) == name


def test_the_choice_is_said_in_one_line_at_build(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "athanor.model"):
        build_model(LLAMA)
    assert [record.getMessage() for record in caplog.records] == [
        "attention kernels on cpu: blockwise for plain window documents biased paired, chunked for sparse, sdpa for cross, "
        "cached for cached"
    ]


@pytest.mark.parametrize(
    ("config", "kernel", "said"),
    [
        (ALIBI, "flash", r"kernel is 'flash', which has no biased masks, and the model needs them: choose auto or one"),
        (ALIBI, "varlen", "'varlen', which has no biased"),
        (LLAMA, "cached", "kernel is 'cached': choose auto, or one of blockwise"),
    ],
)
def test_a_kernel_that_lacks_what_the_model_needs_is_refused(config: object, kernel: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        build_model(config, kernel=kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, WINDOWED, ALIBI], ids=["llama", "windowed", "alibi"])
def test_sound_kernels_stay(config: object, dtype: torch.dtype) -> None:
    model = build_model(config)  # type: ignore[arg-type]
    before = selection_of(model).described("cpu")
    assert check_kernels(model, device=CPU, dtype=dtype, tokens=200) == []
    assert selection_of(model).described("cpu") == before


def unsound(how: str) -> select.AttentionKernel:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float) -> torch.Tensor:
        out = KERNELS["sdpa"](q, k, v, mask, scale)
        if how == "raises":
            raise RuntimeError("no kernel image\nis available")
        if how == "wrong backward":
            return out.detach() + (out - out.detach()) * 1.5
        if how == "NaN backward" and mask.documents_BT is not None:
            return out + (q * 0).sqrt()  # zero forward, infinity times zero backward
        if how == "wrong window":
            return KERNELS["sdpa"](q, k, v, replace(mask, window=mask.window + 1), scale) if mask.window else out
        return out

    return kernel


@pytest.mark.parametrize(
    ("how", "config", "kinds", "said"),
    [
        ("raises", LLAMA, ["plain", "documents"], "cannot run (RuntimeError: no kernel image)"),
        ("wrong backward", LLAMA, ["plain", "documents"], "differs from the definition"),
        ("NaN backward", LLAMA, ["documents"], "gives NaN or infinity"),
        ("wrong window", WINDOWED, ["window", "documents"], "differs from the definition"),
    ],
)
def test_an_unsound_kernel_is_demoted_with_a_line_that_says_why(
    how: str, config: object, kinds: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "blockwise", unsound(how))
    model = build_model(config)  # type: ignore[arg-type]
    lines = check_kernels(model, device=CPU, dtype=torch.float32, tokens=64)
    assert len(lines) == len(kinds)
    assert all(said in line and line.endswith("using sdpa") and "\n" not in line for line in lines)
    assert [kind for kind in KINDS if selection_of(model).named("cpu", kind) == "sdpa"] == [*kinds, "cross"]
    assert check_kernels(model, device=CPU, dtype=torch.float32, tokens=64) == []


def test_where_nothing_else_is_sound_the_oracle_itself_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("blockwise", "sdpa"):
        monkeypatch.setitem(KERNELS, name, lambda q, k, v, *_: (q + k.mean() + v.mean()) * torch.nan)
    model = build_model(LLAMA)
    assert len(check_kernels(model, device=CPU, dtype=torch.float32, tokens=64)) == 4
    assert selection_of(model).named("cpu", "documents") == "dense"
    tokens = torch.arange(20)[None]
    assert model(tokens, documents_BT=torch.ones(1, 20, dtype=torch.int32))["logits"].isfinite().all()
