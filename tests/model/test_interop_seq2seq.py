"""Marian (the original Transformer), BART and T5: Hugging Face's classes are the reference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from model.build import build_model
from model.config import ModelConfig
from model.decoding.beam import BeamConfig, beam_generate
from model.decoding.generate import Sampling, generate, unpadded
from model.ffns.dense import FfnConfig
from model.frontends.text import TokenFrontendConfig
from model.heads.language import LanguageHeadConfig, NoHeadConfig
from model.interop import config_from_hf, family_of, from_hf, hf_config, load_pretrained, save_pretrained, to_hf
from model.mixers.attention import AttentionConfig
from model.norms.norm import NormConfig
from model.positions.base import PositionConfig
from model.positions.learned import LearnedPositionConfig
from model.positions.relative import RelativePositionConfig
from model.positions.sinusoidal import SinusoidalPositionConfig
from tests.model.configurations import LIVELY

pytestmark = pytest.mark.slow  # whole models beside transformers' own

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

KINDS = ("marian", "bart", "t5", "t5-v1.1")
SOURCE, TARGET = 11, 9


@st.composite
def seq2seq(draw: st.DrawFn, kind: str) -> ModelConfig:
    t5 = kind.startswith("t5")
    n_heads = draw(st.integers(1, 4))
    d_model = n_heads * draw(st.sampled_from([4, 6, 8]))
    head_dim = draw(st.sampled_from([None, 4, 10])) if t5 else None
    head_dim = None if head_dim == d_model // n_heads else head_dim
    activation: Any = {"t5": "relu", "t5-v1.1": "gelu_tanh"}.get(kind) or draw(
        st.sampled_from(["relu", "gelu", "silu"])
    )
    scaled = not t5 and draw(st.booleans())
    position: PositionConfig = RelativePositionConfig(buckets=draw(st.sampled_from([4, 8, 32])), max_distance=40)
    if not t5:
        position = SinusoidalPositionConfig() if kind == "marian" else LearnedPositionConfig(offset=2)
    norm = (
        NormConfig(kind="rms", eps=draw(st.sampled_from([1e-6, 1e-5]))) if t5 else NormConfig(kind="layer", bias=True)
    )

    def stack(heads: int) -> dict[str, Any]:
        attention = AttentionConfig(n_heads=heads, head_dim=head_dim, qkv_bias=not t5, out_bias=not t5, scaled=not t5)
        return {
            "d_model": d_model,
            "n_layers": draw(st.integers(1, 2)),
            "max_seq_len": 32,
            "layout": "pre" if t5 else "post",
            "norm": norm,
            "frontend": TokenFrontendConfig(scale_by_sqrt_width=scaled, norm=kind == "bart"),
            "position": position,
            "mixer": attention,
            "ffn": FfnConfig(d_ff=d_ff, activation=activation, gated=kind == "t5-v1.1", bias=not t5),
            "init": LIVELY,
        }

    d_ff = draw(st.integers(3, 40))
    encoder = ModelConfig(**stack(n_heads), causal=False, head=NoHeadConfig())
    return ModelConfig(
        **stack(n_heads),
        vocab_size=draw(st.integers(17, 70)),
        encoder=encoder,
        tie_embeddings=kind != "t5-v1.1",
        head=LanguageHeadConfig(bias=not t5, scale_input=kind == "t5"),
    )


def stirred(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The state dict of a model whose biases and scales are no longer those it starts with."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def exported(config: ModelConfig, folder: Path) -> tuple[dict[str, torch.Tensor], transformers.PreTrainedModel]:
    """A model of ours, and the one that transformers makes of its export."""
    state = stirred(config)
    save_pretrained(state, config, folder)
    cls = getattr(transformers, family_of(config).architecture)
    theirs, loading = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(loading.values())
    return state, theirs.eval()


def batch(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Rows padded on both sides of the model; no token is padding's."""
    generator = torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    source_BS = torch.randint(2, config.vocab_size, (2, SOURCE), generator=generator)
    target_BT = torch.randint(2, config.vocab_size, (2, TARGET), generator=generator)
    source_mask, target_mask = torch.ones_like(source_BS).int(), torch.ones_like(target_BT).int()
    source_mask[1, 6:], target_mask[1, 5:] = 0, 0
    return {
        "tokens_BT": target_BT,
        "documents_BT": target_mask,
        "encoder_tokens_BT": source_BS,
        "encoder_documents_BT": source_mask,
    }


NAMES = {
    "tokens_BT": "decoder_input_ids",
    "documents_BT": "decoder_attention_mask",
    "encoder_tokens_BT": "input_ids",
    "encoder_documents_BT": "attention_mask",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_has_the_references_logits_and_gradients(kind: str, tmp_path_factory: Any) -> None:
    @settings(max_examples=5, deadline=None, phases=[Phase.generate])
    @given(config=seq2seq(kind))
    def check(config: ModelConfig) -> None:
        state, theirs = exported(config, tmp_path_factory.mktemp("export"))
        ours = build_model(config).eval()
        ours.load_state_dict(state)
        inputs = batch(config)
        targets = inputs["tokens_BT"].roll(-1, 1).masked_fill(inputs["documents_BT"] == 0, -100)
        expected = theirs(**{NAMES[name]: tensor.long() for name, tensor in inputs.items()}).logits
        real = inputs["documents_BT"] != 0
        found = ours(**inputs)["logits"]
        assert (expected - found)[real].abs().max() <= 1e-5 * expected[real].abs().max()
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
        sums = ours(**inputs, targets_BT=targets)
        assert abs(loss - sums["loss_sum"]) <= 1e-5 * loss
        loss.backward()
        sums["loss_sum"].backward()
        renamed = to_hf({name: p.grad for name, p in ours.named_parameters(remove_duplicate=False)}, config)  # type: ignore[misc]
        expected_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        assert renamed.keys() - {"final_logits_bias"} == expected_gradients.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
        for name, gradient in expected_gradients.items():
            assert (gradient - renamed[name]).abs().max() <= 2e-5 * largest, name

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_of_an_encoder_decoder_are_exact(kind: str, tmp_path_factory: Any) -> None:
    @settings(max_examples=5, deadline=None, phases=[Phase.generate])
    @given(config=seq2seq(kind))
    def check(config: ModelConfig) -> None:
        folder = tmp_path_factory.mktemp("export")
        state, theirs = exported(config, folder)
        for described in (hf_config(config), theirs.config.to_dict()):
            if config.tie_embeddings:  # transformers says of every T5 that it is tied
                assert replace(config_from_hf(described), init=LIVELY, encoder=None) == replace(config, encoder=None)
                assert replace(config_from_hf(described).encoder, init=LIVELY) == config.encoder
        loaded, again = load_pretrained(folder)
        assert loaded.encoder is not None and config.encoder is not None
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
        stored = theirs.state_dict()
        if config.tie_embeddings:
            imported, ours = from_hf(theirs.config.to_dict(), stored)
            written = to_hf(ours, imported)
            assert all(torch.equal(stored[name], tensor) for name, tensor in written.items())
            left_out = {name for name in stored if name not in written}
            assert all(
                n.endswith(("embed_tokens.weight", "lm_head.weight", "embed_positions.weight")) for n in left_out
            )

    check()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_continues_as_transformers_does(kind: str, beams: int, tmp_path_factory: Any) -> None:
    @settings(max_examples=3, deadline=None, phases=[Phase.generate])
    @given(config=seq2seq(kind))
    def check(config: ModelConfig) -> None:
        assert config.encoder is not None
        # Their cache has as many layers as the encoder, and fails where the decoder has more.
        config = replace(config, n_layers=min(config.n_layers, config.encoder.n_layers))
        state, theirs = exported(config, tmp_path_factory.mktemp("export"))
        ours = build_model(config).eval()
        ours.load_state_dict(state)
        start, stop = theirs.config.decoder_start_token_id, theirs.config.eos_token_id
        assert start == hf_config(config)["decoder_start_token_id"]
        inputs = batch(config)
        expected = theirs.generate(
            inputs["encoder_tokens_BT"],
            attention_mask=inputs["encoder_documents_BT"].long(),
            max_new_tokens=12,
            num_beams=beams,
            do_sample=False,
        )
        sources = unpadded(inputs["encoder_tokens_BT"], inputs["encoder_documents_BT"])
        sampling = Sampling(max_new_tokens=12, temperature=0.0)
        if beams == 1:
            found = generate(ours, [[start], [start]], sampling, stop_ids=[stop], sources=sources)
        else:
            beam = BeamConfig(beams=beams)
            best = beam_generate(ours, [[start], [start]], sampling, beam, stop_ids=[stop], sources=sources)
            found = [texts[0].tokens for texts in best]
        for row, text in zip(expected.tolist(), found, strict=True):
            new = row[1:]
            assert row[0] == start
            assert text == (new[: new.index(stop)] if stop in new else new)

    check()
