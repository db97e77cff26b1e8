"""Encoders with sparse attention: Hugging Face's classes are the reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.heads.language import LanguageHeadConfig
from model.interop import config_from_hf, family_of, from_hf, hf_config, load_pretrained, save_pretrained, to_hf
from model.masks import Mask
from model.mixers.base import MixerInput
from model.mixers.bigbird import BigBirdAttention, BigBirdConfig
from model.mixers.longformer import LongformerConfig
from model.positions.learned import LearnedPositionConfig
from tests.model.configurations import ALIBI, BERT, MISTRAL

pytestmark = pytest.mark.slow  # whole models beside transformers' own

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
BIGBIRD = replace(
    BERT,
    max_seq_len=84,
    position=LearnedPositionConfig(),
    mixer=BigBirdConfig(n_heads=4, block=4, random_blocks=2),
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


@st.composite
def bigbirds(draw: st.DrawFn) -> ModelConfig:
    heads, activation = draw(st.integers(1, 3)), draw(st.sampled_from(["gelu", "gelu_tanh"]))
    return replace(
        BIGBIRD,
        vocab_size=draw(st.integers(20, 60)),
        d_model=heads * draw(st.sampled_from([4, 6])),
        n_layers=draw(st.integers(1, 2)),
        frontend=replace(BIGBIRD.frontend, scale_by_sqrt_width=draw(st.booleans())),
        ffn=replace(BIGBIRD.ffn, activation=activation),
        head=LanguageHeadConfig(bias=True, transform=activation),
        mixer=BigBirdConfig(
            n_heads=heads,
            qkv_bias=draw(st.booleans()),
            block=draw(st.sampled_from([3, 4, 5])),
            random_blocks=draw(st.integers(1, 3)),
        ),
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
    real = ours_batch["documents_BT"] != 0
    targets = ours_batch["tokens_BT"].roll(-1, 1).masked_fill(~real, -100)
    targets[:, ::3] = -100
    answer = theirs(**their_batch, labels=targets)
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


@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(config=bigbirds(), tokens=st.integers(12, 79))
def test_bigbird_has_the_references_logits_and_gradients(config: ModelConfig, tokens: int) -> None:
    assert_equal(config, reference(config), *batch(config, tokens))


def test_bigbird_draws_blocks_for_training_by_layer_and_head_and_always_the_same() -> None:
    model = build_model(replace(BIGBIRD, n_layers=2))
    mixers = [module for module in model.modules() if isinstance(module, BigBirdAttention)]
    shared = MixerInput(Mask(causal=False))
    layouts = [mixer.train().mask(shared, 80).layout_HQJ for mixer in mixers]
    again = [mixer.mask(MixerInput(Mask(causal=False)), 80).layout_HQJ for mixer in mixers]
    for found, expected in zip(again, layouts, strict=True):
        assert found is not None and expected is not None and torch.equal(found, expected)
        assert found.shape == (4, 20, 20)
        assert found[:, 2:-2].sum(-1).unique().tolist() == [5 + 2]  # three around, two ends, two drawn
        assert found[:, [0, -1]].all() and found[:, :, [0, -1]].all()
        assert not torch.equal(found[0], found[1])
    assert not torch.equal(layouts[0], layouts[1])  # type: ignore[arg-type]
    ours, _ = batch(BIGBIRD, 79)
    trained = model.train()(**ours)["logits"]
    assert not torch.allclose(trained, model.eval()(**ours)["logits"])


@pytest.mark.parametrize("config", [LONGFORMER, BIGBIRD], ids=["longformer", "bigbird"])
def test_import_and_export_are_exact_and_transformers_loads_it(config: ModelConfig, tmp_path: Path) -> None:
    theirs = reference(config)
    imported, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
    save_pretrained(state, imported, tmp_path)
    loaded, again = load_pretrained(tmp_path)
    assert loaded == imported
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    architecture = getattr(transformers, family_of(config).architecture)
    other, loading = architecture.from_pretrained(tmp_path, output_loading_info=True)
    unused = {name for name in theirs.state_dict() if "pooler" in name}  # BigBird's class has one and never calls it
    assert loading.pop("missing_keys") == unused
    assert not any(loading.values())
    kept = other.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in theirs.state_dict().items() if name not in unused)


def test_a_window_that_differs_between_layers_is_refused() -> None:
    described = {**hf_config(LONGFORMER), "attention_window": [4, 8]}
    with pytest.raises(Refusal, match=r"attention_window=\[4, 8\]"):
        config_from_hf(described)


@pytest.mark.parametrize(
    "config", [LONGFORMER, BIGBIRD, MISTRAL, ALIBI], ids=["longformer", "bigbird", "mistral", "alibi"]
)
def test_a_few_steps_lower_the_loss_and_recomputation_changes_no_gradient(config: ModelConfig) -> None:
    model = build_model(config)
    tokens = torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    inputs = {"tokens_BT": tokens, "targets_BT": tokens, "documents_BT": torch.ones(2, 60, dtype=torch.int32)}
    if config is LONGFORMER:
        inputs["globals_BT"] = torch.arange(60).expand(2, 60) == 0
    found = []
    for model.stack.recompute in (False, True):
        model.zero_grad()
        model(**inputs)["loss_sum"].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs)["loss_sum"] / tokens.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_every_parameter_of_longformer_has_a_gradient_without_global_tokens_and_it_is_no_decoder() -> None:
    model = build_model(LONGFORMER)
    ours, _ = batch(LONGFORMER)
    model(**ours, targets_BT=ours["tokens_BT"])["loss_sum"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(Refusal, match=r"causal = true: with mixer\.kind=longformer"):
        replace(LONGFORMER, causal=True)
