"""Tokenizers that weights bring: what does not concern training does not end it, and what they lose is told."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from pipelines.stages.tokenizer import TakenTokenizer, take
from tests.data.foreign import save

TEXTS = [Path(argparse.__file__).read_text()[:40_000]]


@pytest.mark.parametrize(
    "template", ["{{ 1 // 0 }}", "{{ raise_exception('no') }}", "{% for m in messages %}", "{{ 'x' * 10**10 }}"]
)
def test_a_chat_template_that_fails_does_not_end_what_never_uses_it(tmp_path, in_process, template):
    folder, out_dir = save("gpt2", TEXTS, tmp_path / "weights"), tmp_path / "out"
    (folder / "chat_template.jinja").write_text(template)
    ctx = in_process(out_dir)
    assert take(TakenTokenizer(folder=str(folder)), {}, out_dir, ctx)["vocab_size"] > 256
    assert "only conversations need it, and here it does not work: The chat template" in ctx.said[0]
    assert str(out_dir / "chat_template.jinja") in ctx.said[0]
    assert Tokenizer.load(out_dir).end_id == Tokenizer.load(out_dir).eos_id
