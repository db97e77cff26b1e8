"""Encoders see both ways, decoders see their encoder, padding and packing change nothing, decoding equals forward."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conf.refusal import Refusal
from conf.typed import from_plain
from model.build import build_model
from model.config import ModelConfig
from model.costs import forward_flops, kv_cache_bytes, parameter_counts
from model.decoding.generate import Sampling, generate
from model.frontends.text import TokenFrontendConfig
from model.heads.base import HeadConfig
from model.heads.classifiers import ClassifierHeadConfig, SpanHeadConfig, TokenClassifierHeadConfig
from model.heads.language import LanguageHeadConfig, NoHeadConfig
from model.init import parameter_roles
from model.positions.relative import RelativePositionConfig
from tests.model.configurations import BERT, GPT2, LLAMA, VASWANI, WIDER_ENCODER, preset_values
from tests.model.learning import learn

SEQ2SEQ = pytest.mark.parametrize("config", [VASWANI, WIDER_ENCODER], ids=["vaswani", "wider_encoder"])
KERNELS = pytest.mark.parametrize("kernel", ["dense", "auto"])


def tokens_of(rows: int, tokens: int, seed: int = 0, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def assert_close(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    assert (theirs - ours).abs().max() <= 2e-5 * theirs.abs().max()


def test_every_output_of_an_encoder_depends_on_every_token_but_padding() -> None:
    model = build_model(BERT)
    row = tokens_of(1, 10)
    changed = row.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 97
    assert all((model(row)["logits"][0] - model(changed)["logits"][0]).abs().amax(-1) > 1e-3)
    real = torch.ones(1, 10, dtype=torch.int32)
    real[0, 8:] = 0
    before, after = (model(x, documents_BT=real)["logits"][:, :8] for x in (row, changed))
    assert torch.equal(before, after)


@KERNELS
def test_a_padded_row_of_an_encoder_computes_what_it_computes_alone(kernel: str) -> None:
    model = build_model(BERT, kernel=kernel)
    row, types = tokens_of(1, 12), torch.tensor([[0] * 5 + [1] * 4 + [0] * 3])
    documents = torch.tensor([[1] * 9 + [0] * 3], dtype=torch.int32)
    padded = model(row, documents_BT=documents, token_types_BT=types)["logits"][:, :9]
    assert_close(model(row[:, :9], token_types_BT=types[:, :9])["logits"], padded)
    assert (padded - model(row, documents_BT=documents)["logits"][:, :9]).abs().max() > 1e-3


@KERNELS
@SEQ2SEQ
def test_padding_and_packing_change_no_logit_of_a_decoder_with_an_encoder(config: ModelConfig, kernel: str) -> None:
    model = build_model(config, kernel=kernel)
    sources, targets = [tokens_of(1, n, n) for n in (7, 4)], [tokens_of(1, n, n) for n in (3, 6)]
    alone = [model(t, encoder_tokens_BT=s)["logits"] for s, t in zip(sources, targets, strict=True)]
    packed = model(
        torch.cat([*targets, torch.zeros(1, 2, dtype=torch.int64)], dim=1),
        documents_BT=torch.tensor([[1] * 3 + [2] * 6 + [0] * 2], dtype=torch.int32),
        encoder_tokens_BT=torch.cat([*sources, torch.zeros(1, 3, dtype=torch.int64)], dim=1),
        encoder_documents_BT=torch.tensor([[1] * 7 + [2] * 4 + [0] * 3], dtype=torch.int32),
    )["logits"]
    assert_close(alone[0], packed[:, :3])
    assert_close(alone[1], packed[:, 3:9])
    padded = torch.cat([sources[1], tokens_of(1, 3)], dim=1)
    mask = torch.tensor([[1] * 4 + [0] * 3], dtype=torch.int32)
    assert_close(alone[1], model(targets[1], encoder_tokens_BT=padded, encoder_documents_BT=mask)["logits"])
    assert (alone[1] - model(targets[1], encoder_tokens_BT=padded)["logits"]).abs().max() > 1e-3


@SEQ2SEQ
def test_cached_decoding_reads_the_encoder_once_and_follows_its_rows(config: ModelConfig) -> None:
    model = build_model(config).eval()
    sources, targets = tokens_of(3, 7, 1), tokens_of(3, 6, 2)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]], dtype=torch.int32)
    whole = model(targets, encoder_tokens_BT=sources, encoder_documents_BT=mask)["logits"]
    cache = model.new_cache(3, 6)
    first = model(targets[:, :3], cache=cache, encoder_tokens_BT=sources, encoder_documents_BT=mask)["logits"]
    assert_close(whole[:, :3], first)
    rows = [2, 0, 0]
    cache.reorder(rows)
    for at in range(3, 6):
        assert_close(whole[rows, at : at + 1], model(targets[rows, at : at + 1], cache=cache)["logits"])


@SEQ2SEQ
def test_costs_of_a_decoder_with_an_encoder_are_those_counted(config: ModelConfig) -> None:
    for changed in (config, replace(config, tie_embeddings=False)):
        model, counts = build_model(changed), parameter_counts(changed)
        assert counts.total == sum(parameter.numel() for parameter in model.parameters())
        assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()
    model = build_model(config, kernel="dense")
    with FlopCounterMode(display=False) as counted:
        model(tokens_of(2, 5), encoder_tokens_BT=tokens_of(2, 9))
    assert counted.get_total_flops() == forward_flops(config, rows=2, seq_len=5, encoder_len=9, masked=False)
    cache = model.new_cache(2, 64)
    model(tokens_of(2, 5), cache=cache, encoder_tokens_BT=tokens_of(2, 9))
    held = [t for state in cache.states for part in vars(state).values() for t in vars(part).values()]
    expected = kv_cache_bytes(config, rows=2, tokens=64, encoder_tokens=9, dtype_bytes=4)
    assert sum(tensor.nbytes for tensor in held) == expected


def test_packed_rows_of_t5_hold_nothing_of_the_square_of_their_length() -> None:
    def largest(tokens: int) -> int:
        documents = torch.ones(1, tokens, dtype=torch.int32)
        documents[:, tokens // 3 :], documents[:, -9:] = 2, 0
        row, packed = tokens_of(1, tokens), {"documents_BT": documents, "encoder_documents_BT": documents}
        with torch.profiler.profile(profile_memory=True) as profile:
            model(row, encoder_tokens_BT=row, targets_BT=row, **packed)["loss_sum"].backward()
        return max(int(event.self_cpu_memory_usage) for event in profile.events())

    assert VASWANI.encoder is not None
    encoder = replace(VASWANI.encoder, position=RelativePositionConfig())
    model = build_model(replace(VASWANI, position=RelativePositionConfig(), encoder=encoder, n_layers=1))
    assert 0 < largest(2048) <= 2.1 * largest(1024)


HEADS = (
    BERT.head,
    NoHeadConfig(),
    ClassifierHeadConfig(classes=3),
    ClassifierHeadConfig(classes=3, hidden=None),
    TokenClassifierHeadConfig(classes=5),
    SpanHeadConfig(),
)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_costs_of_every_head_are_those_counted(head: HeadConfig) -> None:
    config = replace(BERT, head=head, position=RelativePositionConfig())
    model = build_model(config, kernel="dense")
    assert parameter_counts(config).total == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counted:
        model(tokens_of(2, 7))
    assert counted.get_total_flops() == forward_flops(config, rows=2, seq_len=7, masked=False)
    halves = forward_flops(config, rows=2, seq_len=8, mean_document_tokens=4)
    assert forward_flops(config, rows=2, seq_len=8) - halves == 2 * 2 * 4 * 32 * (64 - 32)  # rows, layers, 4 D, pairs


@SEQ2SEQ
def test_a_decoder_with_an_encoder_learns_to_copy_and_starts_the_same_everywhere(config: ModelConfig) -> None:
    model, again = build_model(config, seed=3), build_model(config, seed=3, dtype=torch.bfloat16)
    assert all(torch.equal(w.bfloat16(), again.state_dict()[name]) for name, w in model.state_dict().items())
    assert model.get_parameter("encoder.stack.layers.0.mixer.q.weight").std() > 0.1  # the encoder's own InitConfig
    source = tokens_of(4, 8)

    def loss() -> torch.Tensor:
        return model(source[:, :-1], encoder_tokens_BT=source, targets_BT=source[:, 1:])["loss_sum"] / 28

    losses = learn(model, loss, steps=40, lr=3e-3)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(GPT2, encoder=LLAMA), "kind = '?language'?"),
        (lambda: ClassifierHeadConfig(classes=0), "classes = 0"),
        (lambda: LanguageHeadConfig(label_smoothing=1.0), "label_smoothing = 1.0"),
        (lambda: TokenFrontendConfig(token_types=-1), "token_types = -1"),
        (lambda: RelativePositionConfig(buckets=6), "buckets=6"),
        (lambda: replace(VASWANI, causal=False), "causal = false: with an encoder"),
        (lambda: replace(VASWANI, layout="parallel"), "layout = '?parallel'?"),
        (lambda: replace(VASWANI, d_model=64), "d_model 32 and vocab_size None"),
        (lambda: build_model(BERT).new_cache(1, 8), "causal = false"),
        (lambda: build_model(VASWANI)(tokens_of(1, 3)), "Give its input too"),
        (lambda: build_model(GPT2)(tokens_of(1, 3), encoder_tokens_BT=tokens_of(1, 3)), "has no encoder"),
        (lambda: build_model(GPT2)(tokens_of(1, 3), token_types_BT=tokens_of(1, 3)), "token_types is 0"),
        (lambda: build_model(replace(BERT, position=replace(BERT.position, offset=-1))), "offset = -1"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()


def small(values: dict[str, Any]) -> dict[str, Any]:
    """A preset at a size that trains in a second."""
    mixer = {**values["mixer"], "n_heads": 4, "head_dim": None}
    sizes = {"d_model": 32, "n_layers": 2, "max_seq_len": 32, "mixer": mixer, "ffn": {**values["ffn"], "d_ff": 64}}
    return {**values, **sizes, **({"encoder": small(values["encoder"])} if "encoder" in values else {})}


PRESETS = ("transformer-base", "bert-base", "roberta-base", "distilbert", "t5-small", "t5-v1.1-small", "bart-base")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_made_small_builds_trains_and_predicts(name: str) -> None:
    config = from_plain(ModelConfig, {**small(preset_values(name)), "vocab_size": 50}, "model")
    model = build_model(config)
    row = tokens_of(8, 12)
    if config.encoder is None:  # every third token is hidden, and to be found again
        hidden = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.arange(0, 12, 3), True)
        batch = {"tokens_BT": row.masked_fill(hidden, 0), "targets_BT": row.masked_fill(~hidden, -100)}
    else:
        batch = {"tokens_BT": row[:, :-1], "targets_BT": row[:, 1:], "encoder_tokens_BT": row}

    def loss() -> torch.Tensor:
        sums = model(**batch)
        return sums["loss_sum"] / sums["target_count"]

    losses = learn(model, loss, steps=40, lr=3e-3)
    assert losses[0] < 1.3 * math.log(50) + 1
    assert losses[-1] < losses[0] - 1
    if config.encoder is not None:
        texts = generate(model, [[0]], Sampling(max_new_tokens=5, temperature=0), sources=[row[0].tolist()])
        assert len(texts[0]) == 5


def test_a_model_without_a_head_gives_its_features() -> None:
    features = build_model(replace(BERT, head=NoHeadConfig()))(tokens_of(2, 5))["features"]
    assert features.shape == (2, 5, 32)
