"""BERT, RoBERTa and DistilBERT with every head: Hugging Face's classes are the reference."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.frontends.text import TokenFrontendConfig
from model.heads.base import HeadConfig
from model.heads.classifiers import ClassifierHeadConfig, SpanHeadConfig, TokenClassifierHeadConfig
from model.heads.language import LanguageHeadConfig
from model.interop import config_from_hf, family_of, from_hf, hf_config, load_pretrained, save_pretrained, to_hf
from model.mixers.attention import AttentionConfig
from model.norms.norm import NormConfig
from model.positions.learned import LearnedPositionConfig
from tests.model.configurations import BERT, LIVELY

pytestmark = pytest.mark.slow  # whole models beside transformers' own

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

KINDS = ("bert", "roberta", "distilbert")
HEADS = ("language", "classifier", "token_classifier", "span")
KINDS_AND_HEADS = [(kind, head) for kind in KINDS for head in HEADS]
TOKENS = 11


def head_of(kind: str, head: str, activation: str) -> HeadConfig:
    if head == "language":
        return LanguageHeadConfig(bias=True, transform="gelu" if kind == "roberta" else activation)  # type: ignore[arg-type]
    if head == "classifier":
        return ClassifierHeadConfig(classes=3, hidden="relu" if kind == "distilbert" else "tanh")
    return TokenClassifierHeadConfig(classes=5) if head == "token_classifier" else SpanHeadConfig()


@st.composite
def encoders(draw: st.DrawFn, kind: str, head: str) -> ModelConfig:
    n_heads = draw(st.integers(1, 4))
    activation = draw(st.sampled_from(["gelu", "gelu_tanh", "relu"]))
    return replace(
        BERT,
        vocab_size=draw(st.integers(17, 70)),
        d_model=n_heads * draw(st.sampled_from([3, 4, 8])),
        n_layers=draw(st.integers(1, 2)),
        max_seq_len=draw(st.integers(TOKENS, 32)),
        norm=NormConfig(
            kind="layer", bias=True, eps=1e-12 if kind == "distilbert" else draw(st.sampled_from([1e-12, 1e-5]))
        ),
        frontend=TokenFrontendConfig(norm=True, token_types=0 if kind == "distilbert" else draw(st.integers(1, 3))),
        position=LearnedPositionConfig(offset=2 if kind == "roberta" else 0),
        mixer=AttentionConfig(n_heads=n_heads, qkv_bias=True, out_bias=True),
        ffn=replace(BERT.ffn, d_ff=draw(st.integers(3, 40)), activation=activation),
        head=head_of(kind, head, activation),
    )


def reference(config: ModelConfig) -> transformers.PreTrainedModel:
    """A model of the matching class with its own random weights, biases and scales stirred too."""
    described = hf_config(config)
    torch.manual_seed(0)
    theirs = getattr(transformers, family_of(config).architecture)(
        transformers.AutoConfig.for_model(**{**described, "attn_implementation": "eager"})
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs


def batch(config: ModelConfig) -> dict[str, torch.Tensor]:
    """A full row and a padded one; padding is token 1, RoBERTa's, and no other token is."""
    generator = torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    tokens_BT = torch.randint(2, config.vocab_size, (2, TOKENS), generator=generator)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, 7:], tokens_BT[1, 7:] = 0, 1
    inputs = {"tokens_BT": tokens_BT, "documents_BT": mask_BT.int()}
    if isinstance(config.frontend, TokenFrontendConfig) and config.frontend.token_types:
        inputs["token_types_BT"] = torch.randint(0, config.frontend.token_types, (2, TOKENS), generator=generator)
    return inputs


def their_batch(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"tokens_BT": "input_ids", "documents_BT": "attention_mask", "token_types_BT": "token_type_ids"}
    return {names[name]: tensor.long() for name, tensor in inputs.items()}


def targets_of(config: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Ours, theirs, and how many targets their mean is over."""
    generator = torch.Generator().manual_seed(1)
    head = config.head
    if isinstance(head, ClassifierHeadConfig):
        classes = torch.randint(0, head.classes, (2,), generator=generator)
        return {"classes_B": classes}, {"labels": classes}, 2
    if isinstance(head, SpanHeadConfig):
        starts, ends = torch.tensor([2, 0]), torch.tensor([5, 3])
        return {"starts_B": starts, "ends_B": ends}, {"start_positions": starts, "end_positions": ends}, 4
    choices = head.classes if isinstance(head, TokenClassifierHeadConfig) else config.vocab_size
    targets = torch.randint(0, choices, (2, TOKENS), generator=generator)  # type: ignore[arg-type]
    targets[0, ::3], targets[1, 5:] = -100, -100
    return {"targets_BT": targets}, {"labels": targets}, int((targets != -100).sum())


def outputs(found: Any) -> list[torch.Tensor]:
    if "starts" in found:
        return [found["starts"], found["ends"]]
    return [found["start_logits"], found["end_logits"]] if "start_logits" in found else [found["logits"]]


@pytest.mark.parametrize(("kind", "head"), KINDS_AND_HEADS)
def test_an_encoder_has_the_references_outputs_and_gradients(kind: str, head: str) -> None:
    @settings(max_examples=4, deadline=None, phases=[Phase.generate])
    @given(config=encoders(kind, head))
    def check(config: ModelConfig) -> None:
        theirs = reference(config)
        imported, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
        assert replace(imported, init=config.init) == config
        ours = build_model(imported).eval()
        ours.load_state_dict(state)
        inputs, (targets, labels, count) = batch(config), targets_of(config)
        answer = theirs(**their_batch(inputs), **labels)
        for expected, found in zip(outputs(answer), outputs(ours(**inputs)), strict=True):
            real = inputs["documents_BT"] != 0 if found.shape[:2] == (2, TOKENS) else slice(None)
            assert (expected[real] - found[real]).abs().max() <= 1e-5 * expected[real].abs().max()
        if head == "span":  # their softmax is over padding too
            inputs = {name: tensor[:1].repeat(2, 1) for name, tensor in inputs.items() if name != "documents_BT"}
            answer = theirs(**their_batch(inputs), **labels)
        sums = ours(**inputs, **targets)
        assert abs(sums["loss_sum"] - count * answer.loss) <= 1e-5 * count * answer.loss
        assert int(sums["target_count"]) == count // (2 if head == "span" else 1)
        (count * answer.loss).backward()
        sums["loss_sum"].backward()
        renamed = to_hf(
            {name: p.grad for name, p in ours.named_parameters(remove_duplicate=False) if p.grad is not None}, imported
        )
        expected_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        assert renamed.keys() == expected_gradients.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
        for name, gradient in expected_gradients.items():
            assert (gradient - renamed[name]).abs().max() <= 2e-5 * largest, name

    check()


@pytest.mark.parametrize(("kind", "head"), KINDS_AND_HEADS)
def test_import_and_export_of_an_encoder_are_exact_and_transformers_loads_it(
    kind: str, head: str, tmp_path: Path
) -> None:
    position = LearnedPositionConfig(offset=2 if kind == "roberta" else 0)
    frontend = TokenFrontendConfig(norm=True, token_types=0 if kind == "distilbert" else 2)
    config = replace(BERT, frontend=frontend, position=position, head=head_of(kind, head, "gelu"))
    theirs = reference(config)
    state = theirs.state_dict()
    imported, ours = from_hf(theirs.config.to_dict(), state)
    again = to_hf(ours, imported)
    copies = set(family_of(config).copies) | {
        n for n in state if "decoder.weight" in n or n == "vocab_projector.weight"
    }
    assert again.keys() == state.keys() - copies
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())
    save_pretrained(ours, imported, tmp_path)
    loaded, loading = type(theirs).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(loading.values())
    inputs = their_batch(batch(config))
    with torch.no_grad():
        for one, other in zip(outputs(theirs(**inputs)), outputs(loaded.eval()(**inputs)), strict=True):
            assert torch.equal(one, other)
    loaded.save_pretrained(tmp_path / "theirs")
    back, tensors = load_pretrained(tmp_path / "theirs")
    assert back == imported and tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in ours.items())


def test_an_older_checkpoint_with_other_names_and_other_heads_is_understood(tmp_path: Path) -> None:
    config = replace(BERT, position=LearnedPositionConfig())
    model = build_model(config)
    save_pretrained(model.state_dict(), config, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored.items()
    }
    older |= {"cls.seq_relationship.weight": torch.zeros(2, 32), "bert.pooler.dense.weight": torch.zeros(32, 32)}
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "architectures": ["BertForPreTraining"]}))
    loaded, state = load_pretrained(tmp_path)
    assert loaded == replace(config, init=loaded.init)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_bert_cannot_be_is_not_called_bert() -> None:
    bert = replace(BERT, position=LearnedPositionConfig())
    assert family_of(bert).architecture == "BertForMaskedLM"
    for changed in (
        replace(bert, causal=True),
        replace(bert, frontend=TokenFrontendConfig(norm=True)),  # without token types only DistilBERT, whose eps is set
        replace(bert, head=ClassifierHeadConfig(pool="mean")),
        replace(bert, mixer=AttentionConfig(n_heads=4, qkv_bias=True)),
    ):
        with pytest.raises(Refusal, match="no Hugging Face class"):
            family_of(replace(changed, norm=NormConfig(kind="layer", bias=True, eps=1e-5)))
    seven = replace(bert, head=TokenClassifierHeadConfig(classes=7))
    labels_only = {**hf_config(seven), "id2label": {str(label): "?" for label in range(7)}}
    del labels_only["num_labels"]
    assert config_from_hf(labels_only).head == seven.head


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_a_row_is_classified_by_its_real_tokens_alone(pool: Any) -> None:
    model = build_model(replace(BERT, head=ClassifierHeadConfig(classes=3, pool=pool), init=LIVELY))
    row = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[1] * 6 + [0] * 3], dtype=torch.int32)
    padded, alone = model(row, documents_BT=documents)["logits"], model(row[:, :6])["logits"]
    assert (padded - alone).abs().max() <= 2e-5 * alone.abs().max()
