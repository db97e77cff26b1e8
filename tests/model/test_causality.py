"""No causal preset's logits depend on what comes later, and no document's on its neighbours."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.build import build_model
from model.config import ModelConfig
from model.ffns.experts.config import CapacityConfig, MoeConfig, RouterConfig
from model.ffns.experts.routing import choose
from model.frontends.mel import MelFrontendConfig
from model.heads.language import LanguageHeadConfig
from tests.model.configurations import PRESETS, preset_values
from tests.model.small_presets import tiny


def causal_presets() -> list[str]:
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    values = {name: preset_values(name) for name in names}
    return [
        name
        for name in names
        if values[name].get("causal", True) and values[name].get("head", {}).get("kind", "language") == "language"
    ]


def of_encoder(config: ModelConfig, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if config.encoder is None:
        return {}
    if isinstance(config.encoder.frontend, MelFrontendConfig):
        return {"encoder_mels_BAW": torch.randn(rows, config.encoder.frontend.bands, 112, generator=generator)}
    return {"encoder_tokens_BT": torch.randint(0, 97, (rows, 20), generator=generator)}


@pytest.mark.parametrize("name", causal_presets())
def test_later_tokens_never_change_earlier_logits(name: str) -> None:
    config = tiny(name)
    assert isinstance(config.head, LanguageHeadConfig)
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    tokens_BT, other_BT = (torch.randint(0, 97, (4, 48), generator=generator) for _ in range(2))
    heard = of_encoder(config, 4)
    with torch.no_grad():
        expected = model(tokens_BT, **heard)["logits"]
        for first in (1, 17, 40):
            changed_BT = torch.cat((tokens_BT[:, :first], other_BT[:, first:]), dim=1)
            found = model(changed_BT, **heard)["logits"]
            assert (found - expected)[:, :first].abs().max() <= 1e-5 * expected.abs().max()
            assert (found - expected)[:, first:].abs().max() > 1e-3 * expected.abs().max()


def gshard(factor: float = 1.0, **others: Any) -> ModelConfig:
    config = tiny("gshard-tiny")
    (change,) = config.pattern
    assert isinstance(change.ffn, MoeConfig)
    ffn = replace(change.ffn, capacity=CapacityConfig(factor=factor))
    return replace(config, pattern=(replace(change, ffn=ffn),), **others)


@pytest.mark.parametrize("causal", [True, False])
def test_a_document_is_routed_as_if_it_were_alone(causal: bool) -> None:
    """Packed or in a row of its own, with padding or without, whatever the other rows."""
    model = build_model(gshard(causal=causal)).eval()
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(0, 97, (1, tokens), generator=generator) for tokens in (23, 9, 14)]
    packed_BT = torch.cat((*documents, torch.zeros(1, 6, dtype=torch.int64)), dim=1)
    numbers_BT = torch.tensor([[1] * 23 + [2] * 9 + [3] * 14 + [0] * 6], dtype=torch.int32)
    found = model(packed_BT, documents_BT=numbers_BT)["logits"]
    dropped, place = 0, 0
    for tokens_BT in documents:
        end = place + tokens_BT.shape[1]
        alone = model(tokens_BT)["logits"]
        assert (found[:, place:end] - alone).abs().max() <= 1e-5 * alone.abs().max()
        dropped += int((build_model(gshard(99.0, causal=causal)).eval()(tokens_BT)["logits"] != alone).any())
        place = end
    assert dropped == 3


def test_a_prompt_beside_a_longer_one_is_read_as_if_it_were_alone() -> None:
    model, generator = build_model(gshard()).eval(), torch.Generator().manual_seed(4)
    tokens_BT = torch.randint(0, 97, (2, 40), generator=generator)
    tokens_BT[0, 15:] = 0
    with torch.no_grad():
        found = model(tokens_BT, cache=model.new_cache(2, 48), lengths=[15, 40])["logits"][0, :15]
        alone = model(tokens_BT[:1, :15], cache=model.new_cache(1, 48))["logits"][0]
    assert (found - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_generated_tokens_are_never_turned_away() -> None:
    model, roomy = build_model(gshard(0.01)).eval(), build_model(gshard(99.0)).eval()
    with torch.no_grad():
        caches = [one.new_cache(1, 8) for one in (model, roomy)]
        for token in (3, 3, 3, 3):
            tokens_BT = torch.tensor([[token]])
            found, expected = (
                one(tokens_BT, cache=cache)["logits"] for one, cache in zip((model, roomy), caches, strict=True)
            )
            assert torch.equal(found, expected)


def plain_queue(experts: list[list[int]], documents: list[int], factor: float, causal: bool) -> list[list[bool]]:
    """Who is taken, told token by token."""
    taken = [[False] * len(row) for row in experts]
    for number in set(documents) - {0}:
        members = [t for t, document in enumerate(documents) if document == number]
        ranks = range(len(experts[0]))
        queue = [(t, j) for t in members for j in ranks] if causal else [(t, j) for j in ranks for t in members]
        room = dict.fromkeys(range(4), -(-len(members) * factor * len(ranks) // 4))
        for t, j in queue:
            taken[t][j] = room[experts[t][j]] > 0
            room[experts[t][j]] -= 1
    return taken


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    padding=st.integers(0, 4),
    top_k=st.integers(1, 4),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.5]),
    causal=st.booleans(),
)
def test_a_queue_is_a_documents_own(
    seed: int, lengths: list[int], padding: int, top_k: int, factor: float, causal: bool
) -> None:
    documents = [n + 1 for n, length in enumerate(lengths) for _ in range(length)] + [0] * padding
    config = MoeConfig(
        n_experts=4, top_k=top_k, router=RouterConfig(renormalize=top_k > 1), capacity=CapacityConfig(factor=factor)
    )
    logits_BTE = torch.randn(2, len(documents), 4, generator=torch.Generator().manual_seed(seed))
    documents_BT = torch.tensor([documents, documents])
    choices = choose(logits_BTE, config, documents_BT=documents_BT, causal=causal)
    for experts_TJ, kept_TJ in zip(choices.experts_BTJ, choices.kept_BTJ, strict=True):
        assert kept_TJ.tolist() == plain_queue(experts_TJ.tolist(), documents, factor, causal)
