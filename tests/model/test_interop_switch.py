"""Switch Transformers over T5's body: Hugging Face's class is the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from conf.typed import from_plain
from model.build import build_model
from model.config import LayerChange, ModelConfig
from model.costs import parameter_counts
from model.decoding.beam import BeamConfig, beam_generate
from model.decoding.generate import Sampling, generate, unpadded
from model.ffns.experts.layer import rebalance
from model.ffns.experts.receipts import loads, receipts
from model.interop import config_from_hf, family_of, hf_config
from tests.model.configurations import preset, preset_values
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
    trimmed,
)

pytestmark = pytest.mark.slow  # whole models beside transformers' own

SOURCE, TARGET = 14, 11
CLASS = transformers.SwitchTransformersForConditionalGeneration


@st.composite
def described(draw: st.DrawFn, capacities: tuple[int, ...] = (2, 4, 64)) -> transformers.SwitchTransformersConfig:
    """A Switch Transformer of theirs of any shape that is small, some so short of capacity that tokens pass by."""
    layers = draw(st.integers(2, 4))
    sparse = {f"num_sparse_{stack}_layers": draw(st.integers(1, layers)) for stack in ("encoder", "decoder")}
    return transformers.SwitchTransformersConfig(
        vocab_size=draw(st.integers(20, 70)),
        d_model=draw(st.sampled_from([8, 12, 20])),
        d_kv=draw(st.sampled_from([4, 10])),
        d_ff=draw(st.integers(3, 30)),
        num_heads=draw(st.integers(1, 3)),
        num_layers=layers,
        num_decoder_layers=layers,
        **sparse,
        num_experts=draw(st.integers(2, 5)),
        expert_capacity=draw(st.sampled_from(capacities)),
        relative_attention_num_buckets=draw(st.sampled_from([4, 8, 32])),
        relative_attention_max_distance=40,
        dense_act_fn=draw(st.sampled_from(["relu", "gelu_new"])),
        decoder_start_token_id=0,
    )


def made(config: transformers.SwitchTransformersConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return stirred(CLASS(config))


def inputs(vocab_size: int) -> dict[str, torch.Tensor]:
    """Rows of which one is padded on both sides of the model."""
    generator = torch.Generator().manual_seed(0)
    source_BS, target_BT = (torch.randint(2, vocab_size, (2, n), generator=generator) for n in (SOURCE, TARGET))
    source_mask, target_mask = torch.ones_like(source_BS), torch.ones_like(target_BT)
    source_mask[1, 6:], target_mask[1, 5:] = 0, 0
    return {
        "input_ids": source_BS,
        "attention_mask": source_mask,
        "decoder_input_ids": target_BT,
        "decoder_attention_mask": target_mask,
    }


@pytest.mark.parametrize("capacity", [2, 64])
def test_logits_gradients_and_bytes_are_the_references(capacity: int) -> None:
    dropped = []

    @settings(max_examples=3, deadline=None, phases=[Phase.generate])
    @given(config=described((capacity,)))
    def check(config: transformers.SwitchTransformersConfig) -> None:
        theirs = made(config)
        ours, given_ = imported(theirs), inputs(config.vocab_size)
        real_BT = given_["decoder_attention_mask"].bool()
        targets_BT = given_["decoder_input_ids"].roll(-1, 1).masked_fill(~real_BT, -100)
        source = {
            "encoder_tokens_BT": given_["input_ids"],
            "encoder_documents_BT": given_["attention_mask"].int(),
            "documents_BT": real_BT.int(),
        }
        expected = theirs(**given_).logits
        assert_close(expected[real_BT], ours(given_["decoder_input_ids"], **source)["logits"][real_BT])
        sums = ours(given_["decoder_input_ids"], targets_BT=targets_BT, **source)
        rows = receipts(sums)
        assert any("encoder." in name for name in rows)
        dropped.append(max(value for name, value in rows.items() if name.endswith("drop_rate")))
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets_BT.flatten(), reduction="sum")
        assert abs(loss - sums["loss_sum"]) <= 1e-5 * loss
        loss.backward()
        sums["loss_sum"].backward()
        assert_same_bytes(saved(theirs), ours)
        again = exported(ours, CLASS)
        assert_close(theirs(**given_).logits, again(**given_).logits, within=1e-6)
        assert_same_gradients(saved_gradients(theirs), gradients_of(ours))

    check()
    assert max(dropped) > 0.2 if capacity == 2 else max(dropped) == 0


@pytest.mark.parametrize("beams", [1, 3])
def test_it_continues_as_transformers_does(beams: int) -> None:
    @settings(max_examples=3, deadline=None, phases=[Phase.generate])
    @given(config=described())
    def check(config: transformers.SwitchTransformersConfig) -> None:
        theirs = made(config)
        ours, given_ = imported(theirs), inputs(config.vocab_size)
        source = {name: given_[name] for name in ("input_ids", "attention_mask")}
        expected = theirs.generate(**source, max_new_tokens=12, num_beams=beams, do_sample=False)
        sources, sampling = unpadded(*source.values()), Sampling(max_new_tokens=12, temperature=0.0)
        if beams == 1:
            found = generate(ours, [[0], [0]], sampling, stop_ids=[1], sources=sources)
        else:
            best = beam_generate(ours, [[0], [0]], sampling, BeamConfig(beams=beams), stop_ids=[1], sources=sources)
            found = [texts[0].tokens for texts in best]
        for (first, *new), text in zip(expected.tolist(), found, strict=True):
            assert first == 0
            assert text == trimmed(new, [1])

    check()


def test_the_preset_is_the_published_model() -> None:
    config = preset("switch-base-8", vocab_size=32128)
    theirs = transformers.SwitchTransformersConfig(
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, d_ff=3072, decoder_start_token_id=0
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CLASS(theirs).parameters())
    assert parameter_counts(config).total == parameters
    written = hf_config(config)
    assert {key: written[key] for key in ("encoder_sparse_step", "num_sparse_decoder_layers")} == {
        "encoder_sparse_step": 2,
        "num_sparse_decoder_layers": 6,
    }
    again = config_from_hf(theirs.to_dict())
    assert again.encoder is not None and config.encoder is not None
    assert again.layers[:2] == config.layers[:2]
    assert again.encoder.layers[:2] == config.encoder.layers[:2]


def test_the_preset_made_small_learns_with_balanced_experts_in_both_stacks() -> None:
    def small(values: dict[str, Any]) -> dict[str, Any]:
        experts = {**values["pattern"][0]["ffn"], "d_ff": 48, "n_experts": 4, "capacity": {"tokens": 8}}
        sizes = {"d_model": 32, "n_layers": 2, "mixer": {**values["mixer"], "n_heads": 4}}
        inner = {"encoder": small(values["encoder"])} if "encoder" in values else {}
        pattern = [{**values["pattern"][0], "ffn": experts}]
        return {**values, **sizes, "ffn": {**values["ffn"], "d_ff": 48}, "pattern": pattern, **inner}

    values = {**small(preset_values("switch-base-8")), "vocab_size": 50}
    model = build_model(from_plain(ModelConfig, values, "model")).train()
    row = torch.randint(0, 50, (8, 17), generator=torch.Generator().manual_seed(0))
    told: dict[str, float] = {}

    def loss() -> torch.Tensor:
        out = model(row[:, :-1], targets_BT=row[:, 1:], encoder_tokens_BT=row)
        rebalance(model, loads(out))
        told.update(receipts(out))
        return out["loss_sum"] / out["target_count"]

    losses = learn(model, loss, steps=25, lr=3e-3)
    assert losses[-1] < losses[0] - 1
    assert told["routing/1/dead_experts"] == told["routing/encoder.1/dead_experts"] == 0


def test_layers_that_the_class_cannot_have_are_refused_by_name() -> None:
    config = preset("switch-base-8", vocab_size=32128)
    assert family_of(config).model_type == "switch_transformers"
    experts = config.pattern[0].ffn
    elsewhere = replace(config, pattern=(LayerChange(every=12, first=5, ffn=experts),))
    with pytest.raises(Refusal, match=r"experts in layers 1, k \+ 1, 2k \+ 1 … of the decoder"):
        hf_config(elsewhere)
    wider = replace(config, ffn=replace(config.ffn, d_ff=100))
    with pytest.raises(Refusal, match="layers of the decoder without experts dense"):
        hf_config(wider)
