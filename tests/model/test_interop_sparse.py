"""Encoders with sparse attention: Hugging Face's classes are the reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from model.build import build_model
from model.config import ModelConfig, ModelError
from model.heads import LanguageHeadConfig
from model.interop import config_from_hf, family_of, from_hf, hf_config, load_pretrained, save_pretrained, to_hf
from model.mixers.longformer import LongformerConfig
from model.position import LearnedPositionConfig
from tests.model.configurations import BERT

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOKENS = 61

LONGFORMER = replace(
    BERT,
    max_seq_len=80,
    position=LearnedPositionConfig(offset=2),
    head=LanguageHeadConfig(bias=True, transform="gelu"),
    mixer=LongformerConfig(n_heads=4, window=5),
)


@st.composite
def longformers(draw: st.DrawFn) -> ModelConfig:
    heads = draw(st.integers(1, 3))
    return replace(
        LONGFORMER,
        vocab_size=draw(st.integers(20, 60)),
        d_model=heads * draw(st.sampled_from([4, 6])),
        n_layers=draw(st.integers(1, 2)),
        mixer=LongformerConfig(n_heads=heads, window=draw(st.integers(3, 12))),
    )


def reference(config: ModelConfig) -> transformers.PreTrainedModel:
    """A model of the matching class with its own random weights, biases and scales stirred too."""
    torch.manual_seed(0)
    described = transformers.AutoConfig.for_model(**hf_config(config))
    theirs = getattr(transformers, family_of(config).architecture)(described).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs


def batch(config: ModelConfig, tokens: int = TOKENS) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Ours and theirs: a full row and one whose last tokens are padding."""
    generator = torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    tokens_BT = torch.randint(2, config.vocab_size, (2, tokens), generator=generator)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, tokens - 9 :], tokens_BT[1, tokens - 9 :] = 0, 1
    types_BT = torch.randint(0, 2, (2, tokens), generator=generator)
    ours = {"tokens_BT": tokens_BT, "documents_BT": mask_BT.int(), "token_types_BT": types_BT}
    return ours, {"input_ids": tokens_BT, "attention_mask": mask_BT, "token_type_ids": types_BT}


def assert_equal(
    config: ModelConfig,
    theirs: transformers.PreTrainedModel,
    ours_batch: dict[str, torch.Tensor],
    their_batch: dict[str, torch.Tensor],
) -> None:
    """Logits of real tokens and gradients of a loss over some of them."""
    imported, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
    assert replace(imported, init=config.init) == config
    ours = build_model(imported).eval()
    ours.load_state_dict(state)
    targets = ours_batch["tokens_BT"].masked_fill(ours_batch["documents_BT"] == 0, -100).roll(-1, 1)
    targets[:, ::3] = -100
    real, answer = ours_batch["documents_BT"] != 0, theirs(**their_batch, labels=targets)
    found = ours(**ours_batch)["logits"]
    assert (answer.logits[real] - found[real]).abs().max() <= 1e-5 * answer.logits[real].abs().max()
    count = int((targets != -100).sum())
    (count * answer.loss).backward()
    ours(**ours_batch, targets_BT=targets)["loss_sum"].backward()
    renamed = to_hf({name: p.grad for name, p in ours.named_parameters(remove_duplicate=False)}, imported)  # type: ignore[misc]
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for name, parameter in theirs.named_parameters():
        if name in renamed:  # what has no gradient with them has a zero one with us
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert (expected - renamed[name]).abs().max() <= 2e-5 * largest, name


@pytest.mark.parametrize("global_tokens", [False, True], ids=["none global", "some global"])
def test_longformer_has_the_references_logits_and_gradients(global_tokens: bool) -> None:
    @settings(max_examples=6, deadline=None, phases=[Phase.generate])
    @given(config=longformers())
    def check(config: ModelConfig) -> None:
        ours, theirs = batch(config)
        if global_tokens:  # as many in one row as none in the other would hide how they are gathered
            places = torch.zeros(2, TOKENS, dtype=torch.bool)
            places[0, [0, 7, 40]] = places[1, [0]] = True
            ours["globals_BT"], theirs["global_attention_mask"] = places, places.long()
        assert_equal(config, reference(config), ours, theirs)

    check()


@pytest.mark.parametrize("config", [LONGFORMER], ids=["longformer"])
def test_import_and_export_are_exact_and_transformers_loads_it(config: ModelConfig, tmp_path: Path) -> None:
    theirs = reference(config)
    imported, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
    save_pretrained(state, imported, tmp_path)
    loaded, again = load_pretrained(tmp_path)
    assert loaded == imported
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    architecture = getattr(transformers, family_of(config).architecture)
    other, loading = architecture.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    kept = other.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in theirs.state_dict().items())


def test_a_window_that_differs_between_layers_is_refused() -> None:
    described = {**hf_config(LONGFORMER), "attention_window": [4, 8]}
    with pytest.raises(ModelError, match=r"attention_window=\[4, 8\]"):
        config_from_hf(described)


def test_longformers_time_and_what_it_holds_do_not_depend_on_global_tokens_being_there() -> None:
    model = build_model(LONGFORMER)
    ours, _ = batch(LONGFORMER)
    model(**ours, targets_BT=ours["tokens_BT"])["loss_sum"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ModelError, match=r"causal is true with mixer\.kind=longformer"):
        replace(LONGFORMER, causal=True)
