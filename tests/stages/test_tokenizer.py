"""Tokenizers that weights bring: what does not concern training does not end it, and what they lose is told."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.rows.shard_tasks import CHANGED
from data.rows.shards import ShardSettings
from data.text.document import read_documents
from data.tokenizers.chat import SHORTEST, encode_chat
from data.tokenizers.sentencepiece import Tokenizer
from pipelines.evaluation.measure import Work, baselines
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.summary import collect_columns, lost_line
from pipelines.stages import shards
from pipelines.stages.tokenizer import TakenTokenizer, take
from tests.data.foreign import save
from tests.stages.conftest import artifact
from tests.stages.grouping import by_kind

TEXTS = [Path(argparse.__file__).read_text()[:40_000]]


@pytest.mark.parametrize(
    "template", ["{{ 1 // 0 }}", "{{ raise_exception('no') }}", "{% for m in messages %}", "{{ 'x' * 10**10 }}"]
)
def test_a_chat_template_that_fails_does_not_end_what_never_uses_it(tmp_path, in_process, template):
    folder, out_dir = save("gpt2", TEXTS, tmp_path / "weights"), tmp_path / "out"
    (folder / "chat_template.jinja").write_text(template)
    ctx = in_process(out_dir)
    assert take(TakenTokenizer(folder=str(folder)), {}, out_dir, ctx)["vocab_size"] > 256
    assert "only conversations need it, and here it does not work: " in ctx.said[0]
    assert str(out_dir / "chat_template.jinja") in ctx.said[0]
    assert Tokenizer.load(out_dir).end_id == Tokenizer.load(out_dir).eos_id


def test_what_a_tokenizer_loses_is_said_where_it_is_taken(tmp_path, in_process):
    for kind, lost in (("bert", ["capital letters", "line breaks"]), ("gpt2", [])):
        folder, out_dir = save(kind, TEXTS, tmp_path / kind), tmp_path / f"{kind}-out"
        ctx = in_process(out_dir)
        metrics = take(TakenTokenizer(folder=str(folder)), {}, out_dir, ctx)
        assert (metrics["kinds_of_text_lost"] > 0) == bool(lost)
        assert all(name in ctx.said[0] for name in lost)


def test_a_control_piece_that_is_the_only_spelling_of_a_character_stays_text(tmp_path):
    folder = save("gpt2", TEXTS, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("Stop! Now!")) == "Stop! Now!"
    assert tokenizer.pad_id == tokenizer.encode("!")[0] and "!" not in tokenizer.control_pieces
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "!", "bos_token": "!"}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_id == tokenizer.bos_id == tokenizer.encode("!")[0]
    assert encode_chat(tokenizer, SHORTEST)[0][0] == tokenizer.bos_id


def test_documents_that_do_not_come_back_are_counted_in_rows_and_charged_in_scores(small_run, tmp_path, in_process):
    folder = save("bert", TEXTS, tmp_path / "weights")
    inputs = {**small_run, "tokenizer": artifact("tokenizer", folder, {})}
    ctx = in_process(tmp_path / "rows")
    metrics = shards.run(ShardSettings(seq_len=128), by_kind(inputs), tmp_path / "rows", ctx)
    assert metrics["counts"][CHANGED] == small_run["corpus"].metrics["train_documents"]
    assert "the tokenizer loses text" in ctx.said[0]

    documents = sorted(read_documents(small_run["corpus"].path / "heldout"), key=lambda document: document.id)
    work = Work(
        kind="baselines",
        settings=EvaluateSettings(),
        tokenizer=inputs["tokenizer"],
        corpora=(small_run["corpus"],),
        ids=tuple(document.id for document in documents),
    )
    measured = baselines(work, tmp_path)
    columns = collect_columns(documents, [], [], {"baselines": measured})
    charged = np.array(measured["lost_bits"])
    assert (charged > 0).all()
    assert np.allclose(columns["self_unigram_bits"] - charged, np.array(measured["nats"]["self_unigram"]) / np.log(2))
    assert np.array_equal(columns["gzip_bits"], 8 * np.array(measured["compressed_bytes"]["gzip"]))
    line = lost_line(columns)
    assert line is not None and f"{len(documents)} of {len(documents)} documents do not come back" in line

    own = baselines(replace(work, tokenizer=small_run["tokenizer"]), tmp_path)
    assert not any(own["lost_bits"]) and lost_line(collect_columns(documents, [], [], {"baselines": own})) is None
