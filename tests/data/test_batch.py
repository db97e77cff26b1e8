"""A batch is what the model's forward takes, by name, dtype and shape."""

from __future__ import annotations

import inspect
from collections import Counter

import numpy as np
import pytest
import torch

from data.batch import BATCH_SPEC, Batch, collate
from data.rows.packing import PackedRows, TokenDocument, pack_conversations, pack_stream
from data.tasks.objectives import IGNORED, NextToken
from model.architecture import Transformer
from model.build import build_model
from model.config import ModelConfig
from model.mixers.attention import AttentionConfig


def packed(seq_len: int = 12) -> PackedRows:
    rng = np.random.default_rng(0)
    documents = [
        TokenDocument(id=str(i), source="file", position=i, tokens=rng.integers(8, 64, size=size))
        for i, size in enumerate([5, 20, 1, 30])
    ]
    return pack_stream(documents, seq_len=seq_len, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)


def batch_of(rows: PackedRows) -> Batch:
    return collate(NextToken()(rows, np.arange(len(rows))))


def test_batches_have_the_declared_names_dtypes_and_shapes() -> None:
    batch = batch_of(packed())
    assert list(batch) == list(BATCH_SPEC)
    for name, spec in BATCH_SPEC.items():
        assert batch[name].dtype == spec.dtype
        assert batch[name].shape == (len(packed()), 12)
        assert name.endswith(f"_{spec.axes}")
        assert batch[name].is_contiguous()


def test_every_key_is_a_keyword_of_forward() -> None:
    assert set(BATCH_SPEC) <= set(inspect.signature(Transformer.forward).parameters)


def test_targets_are_the_next_tokens_but_for_starts_and_padding() -> None:
    rows = packed()
    batch = batch_of(rows)
    following = torch.from_numpy(rows.tokens_RW[:, 1:].astype(np.int64))
    kept = batch["targets_BT"] != IGNORED
    assert torch.equal(batch["targets_BT"][kept], following[kept])
    assert torch.equal(~kept, (following == 2) | (following == 0))


def test_positions_restart_with_each_document_and_count_up_within() -> None:
    batch = batch_of(packed())
    starts = torch.ones_like(batch["documents_BT"], dtype=torch.bool)
    starts[:, 1:] = batch["documents_BT"][:, 1:] != batch["documents_BT"][:, :-1]
    assert torch.equal(batch["positions_BT"] == 0, starts)
    steps = batch["positions_BT"][:, 1:] - batch["positions_BT"][:, :-1]
    assert (steps[~starts[:, 1:]] == 1).all()


def test_a_loss_mask_leaves_only_its_targets() -> None:
    conversations = [
        TokenDocument(id="a", source="chat", position=0, tokens=[2, 10, 11, 12, 3], is_target=[False] * 3 + [True] * 2),
        TokenDocument(id="b", source="chat", position=1, tokens=[2, 20, 21, 3], is_target=[True] * 4),
    ]
    rows = pack_conversations(conversations, seq_len=12, pad_id=0, dtype=np.uint16, counts=Counter())
    batch = batch_of(rows)
    i = IGNORED
    assert batch["targets_BT"].tolist() == [[i, i, 12, 3, i, 20, 21, 3, i, i, i, i]]
    assert batch["documents_BT"].tolist() == [[1] * 5 + [2] * 4 + [0] * 3]


def test_a_packed_row_costs_the_model_what_its_documents_cost_alone() -> None:
    config = ModelConfig(vocab_size=64, d_model=32, n_layers=2, max_seq_len=32, mixer=AttentionConfig(n_heads=2))
    model = build_model(config, seed=0)
    rows = packed(seq_len=32)
    together = model(**batch_of(rows))
    loss_sum, target_count = 0.0, 0
    for row in range(len(rows)):
        for _, _, start, length in rows.pieces_P4[rows.row_pieces[row] : rows.row_pieces[row + 1]].tolist():
            tokens_BT = torch.from_numpy(rows.tokens_RW[row : row + 1, start : start + length].astype(np.int64))
            if length > 1:
                alone = model(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:])
                loss_sum += alone["loss_sum"].item()
                target_count += length - 1
    assert together["target_count"].item() == target_count == 5 + 20 + 1 + 30 + 4
    # About sixty fp32 losses of about 4 summed in another order: a relative 1e-6 is eight units in the last place.
    assert together["loss_sum"].item() == pytest.approx(loss_sum, rel=1e-6)
