"""Kernels are chosen once, said in one line, and held to the oracle before they train."""

import logging
from dataclasses import replace

import pytest
import torch

from conf.refusal import Refusal
from model.build import build_model
from model.kernels import select
from model.kernels.check import check_kernels
from model.kernels.select import CAN, KERNELS, KINDS, Selection, kind_of, select_kernel
from model.masks import Mask
from model.mixers.attention import Attention
from model.mixers.bigbird import BigBirdConfig
from model.mixers.latent import LatentAttention
from model.mixers.longformer import LongformerConfig
from model.positions.relative import RelativePositionConfig
from tests.model.configurations import ALIBI, BERT, DALLE, HYBRID, LATENT, LLAMA, VASWANI, WINDOWED

CPU = torch.device("cpu")
LONGFORMER = replace(BERT, mixer=LongformerConfig(n_heads=4, window=5))
BIGBIRD = replace(BERT, mixer=BigBirdConfig(n_heads=4, block=4, random_blocks=2))
assert VASWANI.encoder is not None
T5 = replace(
    VASWANI,
    position=RelativePositionConfig(),
    encoder=replace(VASWANI.encoder, position=RelativePositionConfig()),
)
PACKED = torch.tensor([[1] * 20 + [2] * 25 + [0] * 15], dtype=torch.int32)
ALL = {"llama": LLAMA, "windowed": WINDOWED, "alibi": ALIBI, "vaswani": VASWANI, "t5": T5, "latent": LATENT}
ALL |= {"longformer": LONGFORMER, "bigbird": BIGBIRD, "dalle": DALLE, "hybrid": HYBRID}


def selection_of(model: torch.nn.Module) -> Selection:
    kernels = {id(m.kernel): m.kernel for m in model.modules() if isinstance(m, Attention | LatentAttention)}
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
        (
            ALIBI,
            "flash",
            r"kernel = 'flash': it has no biased masks, and the model needs them\. Choose auto or one",
        ),
        (ALIBI, "varlen", "'varlen': it has no biased"),
        (LLAMA, "cached", "kernel = 'cached': there is no such kernel. Choose auto, or one of blockwise"),
    ],
)
def test_a_kernel_that_lacks_what_the_model_needs_is_refused(config: object, kernel: str, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        build_model(config, kernel=kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
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


def of_nan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float) -> torch.Tensor:
    return (q + k.mean() + v.mean()) * torch.nan


ASKED = [
    ("chunked", "llama", {"prefix_B": torch.tensor([5])}),
    ("chunked", "latent", {"prefix_B": torch.tensor([5])}),
    ("chunked", "longformer", {"globals_BT": (torch.arange(60) == 0)[None]}),
    ("chunked", "bigbird", {}),
    ("blockwise", "longformer", {"globals_BT": (torch.arange(60) == 0)[None]}),
    ("blockwise", "vaswani", {"encoder_documents_BT": PACKED, "documents_BT": PACKED}),
    ("blockwise", "t5", {"encoder_documents_BT": PACKED, "documents_BT": PACKED}),
    ("sdpa", "vaswani", {}),
    ("sdpa", "t5", {"encoder_documents_BT": PACKED}),
]


@pytest.mark.parametrize(("broken", "name", "given"), ASKED)
def test_whatever_a_model_is_asked_no_kernel_answers_that_was_not_tried(
    broken: str, name: str, given: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(60)[None]
    model, length = build_model(ALL[name]).train(), 41 if name in ("vaswani", "t5") else 60
    inputs = {"targets_BT": tokens[:, :length], **given}
    if ALL[name].encoder is not None:
        inputs |= {"encoder_tokens_BT": tokens}
    inputs |= {"documents_BT": given["documents_BT"][:, :length]} if "documents_BT" in given else {}
    monkeypatch.setitem(KERNELS, broken, of_nan)
    assert not loss(model, tokens[:, :length], inputs).isfinite()
    said = check_kernels(model, device=CPU, dtype=torch.float32, tokens=60)
    assert any(f"kernel {broken} for" in line and "NaN" in line for line in said)
    assert loss(model, tokens[:, :length], inputs).isfinite()


def loss(model: torch.nn.Module, tokens_BT: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(tokens_BT, **inputs)["loss_sum"]
    return found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["t5", "longformer", "bigbird", "llama"])
def test_a_kernel_without_a_backward_pass_on_this_device_is_replaced_before_training(name: str) -> None:
    tokens = torch.arange(60)[None]
    model, inputs = build_model(ALL[name], kernel="flex").train(), {"targets_BT": tokens}
    inputs |= {} if ALL[name].encoder is None else {"encoder_tokens_BT": tokens[:, :50]}
    with pytest.raises(NotImplementedError):
        loss(model, tokens, inputs).backward()
    assert all("kernel flex for" in line for line in check_kernels(model, device=CPU, dtype=torch.float32, tokens=60))
    documents = {} if ALL[name].encoder is None else {"encoder_documents_BT": PACKED[:, :50], "documents_BT": PACKED}
    as_long = {} if ALL[name].encoder is None else {"encoder_tokens_BT": tokens}
    for given in (documents, as_long, {"globals_BT": tokens == 0}, {"prefix_B": torch.tensor([3])}):
        given = inputs | given
        loss(model, tokens, given).backward()


def test_the_gradient_of_a_learned_bias_is_held_to_the_definition_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float) -> torch.Tensor:
        bias = None if mask.bias_HL is None else mask.bias_HL.detach() + 0 * mask.bias_HL
        return KERNELS["sdpa"](q, k, v, replace(mask, bias_HL=bias), scale)

    monkeypatch.setitem(KERNELS, "blockwise", without)
    said = check_kernels(build_model(T5), device=CPU, dtype=torch.float32, tokens=60)
    assert len(said) == 1 and "kernel blockwise for biased masks differs" in said[0]


def test_where_nothing_else_is_sound_the_oracle_itself_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("blockwise", "sdpa"):
        monkeypatch.setitem(KERNELS, name, lambda q, k, v, *_: (q + k.mean() + v.mean()) * torch.nan)
    model = build_model(LLAMA)
    assert len(check_kernels(model, device=CPU, dtype=torch.float32, tokens=64)) == 4
    assert selection_of(model).named("cpu", "documents") == "dense"
    tokens = torch.arange(20)[None]
    assert model(tokens, documents_BT=torch.ones(1, 20, dtype=torch.int32))["logits"].isfinite().all()
