"""Sound to text: log-mel frames, an encoder, a decoder, as Hugging Face's Whisper computes them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.costs import forward_flops, parameter_counts
from model.decoding.beam import BeamConfig, beam_generate
from model.decoding.generate import Sampling, generate
from model.ffns.dense import FfnConfig
from model.frontends.mel import MelFrontendConfig, log_mel, mel_filters
from model.frontends.patches import PatchFrontendConfig
from model.frontends.waveform import WaveformFrontendConfig
from model.heads.language import NoHeadConfig
from model.init import parameter_roles
from model.interop import config_from_hf, from_hf, has_hf_class, hf_config
from model.interop.native import config_from_native, native_config
from model.mixers.attention import AttentionConfig
from model.norms.norm import NormConfig
from model.positions.learned import LearnedPositionConfig
from model.positions.sinusoidal import SinusoidalPositionConfig
from tests.model.configurations import LIVELY
from tests.model.learning import learn
from tests.model.parity import (
    assert_close,
    assert_same_bytes,
    assert_same_gradients,
    exported,
    gradients_of,
    imported,
    saved,
    saved_gradients,
    stirred,
    stirred_ours,
    trimmed,
)

pytestmark = pytest.mark.slow  # whole models beside transformers' own

NORM = NormConfig(kind="layer", bias=True)
MIXER = AttentionConfig(n_heads=4, qkv_bias=True, k_bias=False, out_bias=True)
FFN = FfnConfig(d_ff=48, activation="gelu", gated=False, bias=True)
WHISPER = ModelConfig(
    vocab_size=61,
    d_model=32,
    n_layers=2,
    max_seq_len=24,
    norm=NORM,
    position=LearnedPositionConfig(),
    mixer=MIXER,
    ffn=FFN,
    encoder=ModelConfig(
        d_model=32,
        n_layers=2,
        max_seq_len=20,
        causal=False,
        norm=NORM,
        frontend=MelFrontendConfig(bands=16),
        position=SinusoidalPositionConfig(inclusive=True),
        mixer=MIXER,
        ffn=FFN,
        head=NoHeadConfig(),
        init=LIVELY,
    ),
    init=LIVELY,
)
PATCHES = PatchFrontendConfig(image_size=8, patch_size=4)
WAVEFORM = WaveformFrontendConfig(
    channels=(8, 8), kernels=(5, 3), strides=(3, 2), conv_norm="layer", positional_kernel=4, positional_groups=2
)
SINUSOIDS = "model.encoder.embed_positions.weight"


@st.composite
def described(draw: st.DrawFn) -> transformers.WhisperConfig:
    """Any small Whisper."""
    heads = draw(st.sampled_from([1, 2, 4]))
    return transformers.WhisperConfig(
        vocab_size=draw(st.integers(20, 70)),
        num_mel_bins=draw(st.integers(3, 20)),
        d_model=heads * draw(st.sampled_from([4, 6])),
        encoder_attention_heads=heads,
        decoder_attention_heads=draw(st.sampled_from([heads, 1])),
        encoder_layers=draw(st.integers(1, 2)),
        decoder_layers=draw(st.integers(1, 2)),
        encoder_ffn_dim=draw(st.integers(3, 40)),
        decoder_ffn_dim=draw(st.integers(3, 40)),
        max_source_positions=draw(st.integers(5, 20)),
        max_target_positions=24,
        activation_function=draw(st.sampled_from(["gelu", "relu"])),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        attn_implementation="eager",
    )


def mels(rows: int, bands: int, frames: int) -> torch.Tensor:
    return torch.randn((rows, bands, frames), generator=torch.Generator().manual_seed(0))


def tokens_of(rows: int, tokens: int, vocab_size: int = 20) -> torch.Tensor:
    """Without 0, the padding, whose embedding gets no gradient in transformers."""
    return torch.randint(1, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))


@settings(max_examples=10, deadline=None)
@given(config=described())
def test_an_imported_whisper_has_the_references_logits_gradients_and_bytes(config: transformers.WhisperConfig) -> None:
    theirs = stirred(transformers.WhisperForConditionalGeneration(config))
    ours = imported(theirs)
    x, tokens = mels(2, config.num_mel_bins, 2 * config.max_source_positions), tokens_of(2, 9)
    expected = theirs(input_features=x, decoder_input_ids=tokens).logits
    assert_close(expected, ours(tokens, encoder_mels_BAW=x)["logits"])
    assert_same_bytes(saved(theirs), ours)
    targets = tokens.roll(-1, 1)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours(tokens, encoder_mels_BAW=x, targets_BT=targets)["loss_sum"].backward()
    gradients = gradients_of(ours)
    del gradients[SINUSOIDS]
    reference = saved_gradients(theirs)
    del reference[SINUSOIDS]
    assert_same_gradients(reference, gradients)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_an_export_and_agrees_on_logits_and_greedy_tokens(tied: bool) -> None:
    ours = stirred_ours(replace(WHISPER, tie_embeddings=tied))
    theirs = exported(ours, transformers.WhisperForConditionalGeneration)
    x, begin = mels(3, 16, 40), tokens_of(3, 2)
    with torch.no_grad():
        assert_close(
            theirs(input_features=x, decoder_input_ids=begin).logits, ours(begin, encoder_mels_BAW=x)["logits"]
        )
        plain = transformers.GenerationConfig(
            max_new_tokens=20, do_sample=False, pad_token_id=0, decoder_start_token_id=3
        )
        expected = transformers.GenerationMixin.generate(
            theirs, input_features=x, decoder_input_ids=begin, generation_config=plain
        )
    found = generate(ours, begin.tolist(), Sampling(max_new_tokens=20, temperature=0.0), sources=list(x))
    assert found == expected[:, 2:].tolist()
    if not tied:  # a tied head repeats what it reads until it is trained
        assert len({tuple(row) for row in found}) == 3


@settings(max_examples=6, deadline=None)
@given(config=described(), beams=st.integers(1, 3), stops=st.integers(0, 8), seed=st.integers(0, 9))
def test_greedy_and_beam_search_from_sound_give_the_tokens_of_transformers(
    config: transformers.WhisperConfig, beams: int, stops: int, seed: int
) -> None:
    theirs = stirred(transformers.WhisperForConditionalGeneration(config))
    ours = imported(theirs)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((3, config.num_mel_bins, 2 * config.max_source_positions), generator=generator)
    begin, stop_ids = tokens_of(3, 2), list(range(4, 4 + stops))
    plain = transformers.GenerationConfig(
        max_new_tokens=12, do_sample=False, num_beams=beams, pad_token_id=0, eos_token_id=stop_ids or None
    )
    answer = transformers.GenerationMixin.generate(
        theirs, input_features=x, decoder_input_ids=begin, generation_config=plain
    )
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    if beams == 1:
        found = generate(ours, begin.tolist(), sampling, stop_ids=stop_ids, sources=list(x))
    else:
        searched = beam_generate(
            ours, begin.tolist(), sampling, BeamConfig(beams=beams), stop_ids=stop_ids, sources=list(x)
        )
        found = [hypotheses[0].tokens for hypotheses in searched]
    expected = [trimmed(row, stop_ids) for row in answer[:, 2:].tolist()]
    assert found == expected


def test_one_sound_given_again_is_read_once_and_sounds_of_different_lengths_are_refused() -> None:
    model, x, sampling = build_model(WHISPER), mels(2, 16, 40), Sampling(max_new_tokens=5, temperature=0.0)
    assert model.encoder is not None
    read: list[int] = []
    handle = model.encoder.register_forward_pre_hook(
        lambda _, args, inputs: read.append(len(inputs["mels_BAW"])), with_kwargs=True
    )
    once, again, other = generate(model, [[3]] * 3, sampling, sources=[x[0], other_row := x[1], other_row])
    handle.remove()
    assert (read, again) == ([2], other)
    assert once == generate(model, [[3]], sampling, sources=[x[0]])[0]
    with pytest.raises(Refusal, match="Bring them to one shape"):
        generate(model, [[3], [3]], sampling, sources=[x[0], x[1][:, :30]])
    with pytest.raises(Refusal, match="no encoder"):
        generate(build_model(replace(WHISPER, encoder=None)), [[3]], sampling, sources=[x[0]])


@pytest.mark.parametrize("frontend", [PATCHES, WAVEFORM], ids=["pixels", "waveform"])
def test_text_is_generated_from_images_and_waveforms_as_from_sound(frontend: Any) -> None:
    """No class to compare with: the tokens are the likeliest of the whole forward pass."""
    assert WHISPER.encoder is not None
    encoder = replace(WHISPER.encoder, frontend=frontend, position=LearnedPositionConfig())
    model = build_model(replace(WHISPER, tie_embeddings=False, encoder=encoder)).eval()
    shapes = [(3, 8, 8)] * 2 if frontend is PATCHES else [(400,), (250,)]
    sources = [torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) for shape in shapes]
    found = generate(model, [[3, 5], [4]], Sampling(max_new_tokens=6, temperature=0.0), sources=sources)
    for prompt, source, text in zip([[3, 5], [4]], sources, found, strict=True):
        inputs = {f"encoder_{name}": x for name, x in model.encoder.frontend.batched([source], source.device).items()}
        logits = model(torch.tensor([[*prompt, *text]]), **inputs)["logits"][0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text


def test_a_configuration_comes_back_from_theirs_and_from_our_own_format() -> None:
    loaded = transformers.AutoConfig.for_model(**hf_config(WHISPER))
    assert hf_config(config_from_hf(loaded.to_dict())) == hf_config(WHISPER)
    assert config_from_native(native_config(WHISPER)) == WHISPER
    assert not has_hf_class(replace(WHISPER, mixer=replace(MIXER, k_bias=None)))


def test_the_sinusoids_are_computed_and_a_table_that_was_trained_is_refused() -> None:
    theirs = transformers.WhisperForConditionalGeneration(transformers.AutoConfig.for_model(**hf_config(WHISPER)))
    tensors = saved(theirs)
    tensors[SINUSOIDS][3, 3] += 0.5
    with pytest.raises(Refusal, match=r"weight is not what its config\.json implies"):
        from_hf(hf_config(WHISPER), tensors)
    positions = SinusoidalPositionConfig(inclusive=True).build(1500, 64)
    assert positions is not None
    from transformers.models.whisper.modeling_whisper import sinusoids

    assert torch.equal(positions(torch.arange(1500)[None])[0], sinusoids(1500, 64))


@pytest.mark.parametrize("bands", [80, 128])
def test_log_mel_frames_are_those_of_the_feature_extractor(bands: int) -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands, chunk_length=2)
    time = torch.arange(32000) / 16000
    generator = torch.Generator().manual_seed(0)
    tone = 0.3 * torch.sin(2 * torch.pi * (200 + 900 * time) * time)
    rows = torch.stack((tone, 0.1 * torch.randn(32000, generator=generator), torch.zeros(32000)))
    rows[0, 20000:] = 0
    found = log_mel(rows, bands)
    for row, mine in zip(rows.numpy(), found, strict=True):
        expected = extractor(row, sampling_rate=16000, return_tensors="np").input_features[0]
        assert_close(torch.from_numpy(expected), mine)
        by_definition = extractor._np_extract_fbank_features(np.array([row]), "cpu")[0]
        assert (torch.from_numpy(by_definition) - mine).abs().max() < 1e-4
    assert_close(torch.from_numpy(extractor.mel_filters.T).float(), mel_filters(bands, torch.device("cpu")), 1e-6)


def test_it_learns_to_write_what_it_hears() -> None:
    model, x, text = build_model(WHISPER), mels(4, 16, 40), tokens_of(4, 9)

    def loss() -> torch.Tensor:
        return model(text[:, :-1], encoder_mels_BAW=x, targets_BT=text[:, 1:])["loss_sum"] / 32

    losses = learn(model, loss, steps=40, lr=3e-3)
    assert losses[-1] < losses[0] / 4


def test_costs_are_those_counted() -> None:
    assert WHISPER.encoder is not None
    for config in (WHISPER, replace(WHISPER, encoder=replace(WHISPER.encoder, frontend=MelFrontendConfig(norm=True)))):
        model, counts = build_model(config, kernel="dense"), parameter_counts(config)
        assert counts.total == sum(parameter.numel() for parameter in model.parameters())
        assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()
        assert config.encoder is not None
        assert isinstance(config.encoder.frontend, MelFrontendConfig)
        x = mels(2, config.encoder.frontend.bands, 18)
        with FlopCounterMode(display=False) as counted:
            model(tokens_of(2, 5), encoder_mels_BAW=x)
        assert counted.get_total_flops() == forward_flops(config, rows=2, seq_len=5, encoder_len=9, masked=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MelFrontendConfig(bands=0), "bands = 0"),
        (
            lambda: build_model(WHISPER)(tokens_of(1, 2), encoder_mels_BAW=mels(1, 8, 20)),
            "8 bands: this model takes 16",
        ),
        (lambda: SinusoidalPositionConfig(inclusive=True).build(8, 5), "d_model = 5"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()
