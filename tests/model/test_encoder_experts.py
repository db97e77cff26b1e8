"""Experts in an encoder: their losses and counts reach the decoder's result, whichever way the rows are computed."""

from dataclasses import replace

import pytest
import torch

from conf.refusal import Refusal
from model.build import build_model
from model.config import LayerChange
from model.ffns.experts.config import BalanceConfig, CapacityConfig, MoeConfig, RouterConfig
from model.ffns.experts.layer import rebalance
from model.ffns.experts.receipts import loads, receipts
from model.frontends.patches import PatchFrontendConfig
from model.heads.classifiers import ClassifierHeadConfig
from model.heads.embedding import EmbeddingHeadConfig
from model.positions.learned import LearnedPositionConfig
from tests.model.configurations import BERT, LLAMA, VASWANI
from tests.model.learning import (
    assert_micro_batches_change_nothing,
    assert_recomputation_changes_nothing,
    sums_and_gradients,
)

EXPERTS = MoeConfig(
    n_experts=4,
    d_ff=24,
    activation="relu",
    gated=False,
    router=RouterConfig(jitter=0.1, second_by_chance=True),
    balance=BalanceConfig(loss=0.3, z_loss=0.05, bias_rate=0.01),
    capacity=CapacityConfig(factor=1.0),
)
"""Everything that could depend on how rows are computed, at once."""

assert VASWANI.encoder is not None
BOTH = replace(
    VASWANI,
    pattern=(LayerChange(every=2, first=1, ffn=EXPERTS),),
    encoder=replace(VASWANI.encoder, n_layers=2, pattern=(LayerChange(every=2, first=1, ffn=EXPERTS),)),
)
NAMES = ["expert_kept.1", "expert_kept.encoder.1", "expert_load.1", "expert_load.encoder.1"]


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_BT, source_BS = (torch.randint(0, 97, (4, tokens), generator=generator) for tokens in (9, 14))
    targets_BT, source_documents_BS = tokens_BT.roll(-1, 1), torch.ones_like(source_BS).int()
    targets_BT[0, :5], targets_BT[2] = -100, -100
    source_documents_BS[1, 8:] = 0
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": targets_BT,
        "encoder_tokens_BT": source_BS,
        "encoder_documents_BT": source_documents_BS,
    }


def test_recomputation_changes_and_doubles_nothing() -> None:
    assert_recomputation_changes_nothing(BOTH, batch())


def test_losses_counts_and_gradients_do_not_depend_on_micro_batches() -> None:
    assert_micro_batches_change_nothing(BOTH, batch())


def test_counts_tell_the_layers_of_the_encoder_apart() -> None:
    model = build_model(BOTH).train()
    out = model(**batch())
    assert sorted(name for name in out if name.startswith("expert")) == NAMES
    assert "auxiliary_B" not in out
    assert int(out["routed_tokens"]) == 4 * 9
    assert int(out["routed_tokens.encoder"]) == 4 * 14 - 6
    rows = receipts(out)
    assert rows["routing/1/effective_k"] == int(out["expert_kept.1"].sum()) / 36
    assert rows["routing/encoder.1/effective_k"] == int(out["expert_kept.encoder.1"].sum()) / 50
    assert rows["routing/encoder.1/drop_rate"] > 0
    assert loads(out).keys() == {"1", "encoder.1"}
    rebalance(model, loads(out))
    assert model.encoder is not None
    moved = [stack.layers[1].ffn.selection_bias for stack in (model.stack, model.encoder.stack)]
    assert all(bias_E.abs().max() > 0 for bias_E in moved)
    assert not torch.equal(*moved)


def test_an_encoder_row_loses_as_much_as_its_decoder_row_has_targets() -> None:
    model, inputs = build_model(BOTH).train(), batch()
    assert model.encoder is not None
    told = model.encoder(tokens_BT=inputs["encoder_tokens_BT"], documents_BT=inputs["encoder_documents_BT"])
    assert told["auxiliary_B"].shape == (4,)
    targets_B = (inputs["targets_BT"] != -100).sum(1)
    expected = float((told["auxiliary_B"].detach() * targets_B).sum())
    silent = replace(EXPERTS, balance=replace(EXPERTS.balance, loss=0.0, z_loss=0.0))
    only_encoder = replace(BOTH, pattern=(replace(BOTH.pattern[0], ffn=silent),))
    assert float(build_model(only_encoder).train()(**inputs)["aux_loss_sum"]) == pytest.approx(expected, rel=1e-6)
    # In the gradient of the encoder's router, and not in the value of the loss.
    quiet = replace(
        BOTH, encoder=replace(BOTH.encoder, pattern=(LayerChange(every=2, first=1, ffn=silent),)), pattern=()
    )
    loud = replace(BOTH, pattern=())
    (one, gradients), (other, others) = (sums_and_gradients(config, inputs) for config in (loud, quiet))
    assert one["loss_sum"] == other["loss_sum"]
    router = "encoder.stack.layers.1.ffn.router.weight"
    assert (gradients[router] - others[router]).abs().max() > 1e-3
    assert torch.equal(gradients["stack.layers.0.ffn.up.weight"], others["stack.layers.0.ffn.up.weight"])


def test_a_classifier_with_experts_learns_from_their_losses_too() -> None:
    quiet = replace(EXPERTS, router=RouterConfig(), balance=BalanceConfig(loss=0.3), capacity=None)
    config = replace(BERT, ffn=quiet, head=ClassifierHeadConfig(classes=3))
    model = build_model(config).train()
    tokens_BT, classes_B = batch()["tokens_BT"], torch.tensor([0, 2, -100, 1])
    out = model(tokens_BT, classes_B=classes_B)
    rows = [model(tokens_BT[row : row + 1], classes_B=classes_B[row : row + 1]) for row in (0, 1, 3)]
    alone = sum(float(row["aux_loss_sum"]) for row in rows)
    assert float(out["aux_loss_sum"]) == pytest.approx(alone, rel=1e-5)
    assert alone > 3 * 2 * 0.3 * 0.99  # three rows with a target, two layers, a balance of about 1


def test_experts_are_refused_where_their_losses_or_noise_have_no_meaning() -> None:
    images = PatchFrontendConfig(image_size=8, patch_size=4)
    with pytest.raises(Refusal, match=r"ffn\.router\.jitter"):
        replace(BERT, frontend=images, position=LearnedPositionConfig(), ffn=EXPERTS)
    tower = replace(
        LLAMA, ffn=replace(EXPERTS, router=RouterConfig()), head=EmbeddingHeadConfig(width=8, pool="largest")
    )
    with pytest.raises(Refusal, match=r"kind = '?moe'?"):
        replace(LLAMA, head=EmbeddingHeadConfig(width=8, pool="largest", contrast=True), tower=tower)


@pytest.mark.slow
def test_a_layer_whose_router_draws_noise_compiles_and_draws_the_same() -> None:
    model = build_model(replace(LLAMA, ffn=replace(EXPERTS, gated=False))).train()
    tokens_BT = batch()["tokens_BT"]
    expected = model(tokens_BT, targets_BT=tokens_BT)["loss_sum"].detach()
    for block in model.stack.layers:
        block.compile(dynamic=False)
    found = model(tokens_BT, targets_BT=tokens_BT)["loss_sum"]
    found.backward()
    found = found.detach()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
