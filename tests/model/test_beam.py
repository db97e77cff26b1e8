"""Beam search gives the tokens of transformers' `generate`, and lets go of nothing it should keep."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from model.build import build_model
from model.config import ModelConfig
from model.decoding.beam import BeamConfig, beam_generate
from model.decoding.generate import Sampling, generate, unpadded
from model.interop import from_hf, hf_config
from tests.model.configurations import FALCON, GPT2, GPTJ, LLAMA, MAMBA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE
from tests.model.parity import trimmed

transformers.logging.set_verbosity_error()
PAD = 0


def both(config: ModelConfig, seed: int = 0) -> tuple[Any, Any]:
    """A model of the matching class with lively random weights, and ours with the same."""
    described = transformers.AutoConfig.for_model(**hf_config(config))
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    imported, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
    ours = build_model(imported)
    ours.load_state_dict(state)
    return theirs, ours


def left_padded(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return tokens.masked_fill(mask == 0, PAD), mask


CONFIGS = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt2": GPT2,
    "gptj": GPTJ,
    "falcon": FALCON,
    "mamba": MAMBA,
}
MODELS = {name: both(config) for name, config in CONFIGS.items()}


def test_each_family_is_compared_with_its_own_class() -> None:
    assert {name: theirs.config.model_type for name, (theirs, _) in MODELS.items()} == {name: name for name in CONFIGS}


@pytest.mark.parametrize("family", list(MODELS))
@settings(max_examples=8, deadline=None)
@given(
    beams=st.integers(1, 4),
    length_penalty=st.sampled_from([0.0, 1.0, 2.0, -1.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
    penalty=st.sampled_from([1.0, 1.3]),
    ngram=st.sampled_from([None, 2]),
    min_new_tokens=st.sampled_from([0, 5]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    stops=st.integers(0, 25),
    seed=st.integers(0, 100),
)
def test_beam_search_gives_the_tokens_of_transformers(
    family: str,
    beams: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
    penalty: float,
    ngram: int | None,
    min_new_tokens: int,
    lengths: list[int],
    stops: int,
    seed: int,
) -> None:
    theirs, ours = MODELS[family]
    tokens, mask = left_padded(lengths, seed)
    stop_ids = list(range(1, 1 + stops))
    options: dict[str, Any] = {"eos_token_id": stop_ids or None, "pad_token_id": PAD, "max_new_tokens": 12}
    if beams > 1:
        options |= {"length_penalty": length_penalty, "early_stopping": early_stopping, "num_return_sequences": beams}
    if ngram is not None and len(lengths) == 1:  # theirs counts padding as text
        options["no_repeat_ngram_size"] = ngram
    if stop_ids and min_new_tokens:
        options["min_new_tokens"] = min_new_tokens
    if penalty != 1:
        options["repetition_penalty"] = penalty
    found = theirs.generate(tokens, attention_mask=mask, num_beams=beams, do_sample=False, **options)
    expected = [trimmed(row, stop_ids) for row in found[:, tokens.shape[1] :].tolist()]
    sampling = Sampling(
        max_new_tokens=12,
        min_new_tokens=min_new_tokens if stop_ids else 0,
        temperature=0,
        repetition_penalty=penalty,
        no_repeat_ngram_size=options.get("no_repeat_ngram_size"),
    )
    prompts = unpadded(tokens, mask)
    if beams == 1:
        assert generate(ours, prompts, sampling, stop_ids=stop_ids) == expected
        return
    beam = BeamConfig(beams=beams, length_penalty=length_penalty, early_stopping=early_stopping)
    texts = [text.tokens for item in beam_generate(ours, prompts, sampling, beam, stop_ids=stop_ids) for text in item]
    assert texts == expected


def test_one_beam_is_greedy_and_scores_are_those_of_the_whole_pass() -> None:
    _, ours = MODELS["llama"]
    prompts, sampling = [[5, 3, 9], [7]], Sampling(max_new_tokens=8, temperature=0)
    [best, _] = [item[0].tokens for item in beam_generate(ours, prompts, sampling, BeamConfig(beams=1))]
    assert best == generate(ours, prompts, sampling)[0]
    for text in beam_generate(ours, [prompts[0]], sampling, BeamConfig(beams=3, length_penalty=0.0))[0]:
        whole = torch.tensor([prompts[0] + text.tokens])
        log_p = ours(whole)["logits"].log_softmax(-1)[0, 2:-1]
        assert text.score == pytest.approx(float(log_p.gather(1, whole[0, 3:, None]).sum()), rel=1e-4)


def test_a_search_ends_where_the_models_context_does() -> None:
    model = build_model(replace(LLAMA, max_seq_len=10))
    items = beam_generate(model, [[1, 2, 3], [4] * 8], Sampling(max_new_tokens=50), BeamConfig(beams=2))
    assert [{len(text.tokens) for text in item} for item in items] == [{7}, {2}]


@pytest.mark.parametrize(
    ("values", "said"),
    [({"beams": 0}, "beams = 0"), ({"early_stopping": "always"}, "early_stopping = '?'always''?")],
)
def test_an_impossible_search_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        BeamConfig(**values)
