"""Claims about held-out scores: windows, intervals, baselines, selection, and the stage as a whole."""

from __future__ import annotations

import json
import lzma
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.refusal import Refusal
from data.text.document import Document, write_documents
from data.tokenizers.sentencepiece import Tokenizer
from pipelines.evaluation import held_out
from pipelines.evaluation.baselines import gzip_bytes, token_counts, unigram_nats, xz_bytes
from pipelines.evaluation.intervals import interval, resample_sums, share_interval, wilson
from pipelines.evaluation.scoring import sliding_windows
from pipelines.inference.generator import GenerateSettings
from pipelines.inference.weights import load_model
from pipelines.stages import evaluate
from tests.stages.conftest import artifact
from tests.stages.grouping import scored


@given(tokens=st.integers(1, 200), context=st.integers(1, 40), data=st.data())
def test_every_token_after_the_first_is_scored_once_with_the_promised_context(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for window in sliding_windows(tokens, context_tokens=context, stride_tokens=stride):
        assert 1 <= window.tokens <= context
        for position in range(window.scored_from, window.end):
            scored.append(position + 1)
            assert position - window.start + 1 >= min(position + 1, context - stride + 1)
    assert scored == list(range(1, tokens))


def test_rolling_windows_are_those_of_the_harness():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in (1, 4, 5, 11, 12, 13, 40):
        text = list(range(100, 100 + count))
        theirs = [
            targets
            for _, targets in map(
                make_disjoint_window,
                get_rolling_token_windows(token_list=text, prefix_token=1, max_seq_len=4, context_len=1),
            )
        ]
        ids = [1, *text]
        ours = [
            ids[window.scored_from + 1 : window.end + 1]
            for window in sliding_windows(len(ids), context_tokens=4, stride_tokens=4)
        ]
        assert ours == theirs


def test_a_prompt_too_long_loses_its_beginning():
    [window] = sliding_windows(30, context_tokens=8, stride_tokens=8, first=25)
    assert (window.start, window.scored_from, window.end) == (21, 25, 29)


def test_xz_size_is_that_of_the_command_with_its_full_window():
    for text in (b"", b"a", b"def f():\n    return 1\n" * 400, bytes(range(256)) * 40):
        assert xz_bytes(text) == len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9))


def test_gzip_size_is_close_to_the_commands():
    text = "".join(f"line {i * i} of a text\n" for i in range(2000)).encode()
    command = subprocess.run(["gzip", "-9", "-c"], input=text, capture_output=True, check=True).stdout
    assert abs(gzip_bytes(text) - len(command)) <= 0.01 * len(command)


def test_unigram_nats_are_the_entropy_of_the_counts():
    documents = [[0, 1, 1, 2], [1, 1]]
    own = token_counts(documents, 4)
    total = sum(unigram_nats(own, documents, added=0))
    p = np.array([1, 4, 1]) / 6
    assert total == pytest.approx(-6 * (p * np.log(p)).sum())
    assert unigram_nats(own, [[3]], added=1) == pytest.approx([math.log(10 / 1)])
    assert sum(unigram_nats(own, documents, added=1)) > total


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sizes = rng.lognormal(3, 0.7, 120)
        bits = sizes * rng.normal(2.0, 0.3, 120)
        draws = resample_sums(np.column_stack([bits, sizes]), resamples=200, seed=trial)
        found = interval(bits.sum() / sizes.sum(), draws[:, 0] / draws[:, 1], count=120, of="documents")
        covered += found.low <= 2.0 <= found.high
    # 95 % of 200, give or take three standard deviations of a binomial and the bootstrap's known optimism
    assert 200 * 0.95 - 3 * math.sqrt(200 * 0.95 * 0.05) - 6 <= covered <= 200


def test_bootstrap_is_a_function_of_its_seed():
    column = np.array([0.0, 1.0, 1.0, 0.0, 1.0])[:, None]
    once = resample_sums(column, resamples=50, seed=1)
    assert (resample_sums(column, resamples=50, seed=1) == once).all()
    assert (resample_sums(column, resamples=50, seed=2) != once).any()


def test_no_interval_is_told_below_five_documents_and_none_without_a_width():
    draws = np.linspace(1.0, 2.0, 100)
    for count in (1, 4):
        found = interval(1.5, draws, count=count, of="documents")
        assert (found.value, found.low, found.high) == (1.5, None, None)
        assert found.missing == f"{count} document{'s' * (count > 1)}, and an interval takes at least 5"
        assert wilson(0, count, of="examples").low is None
    assert interval(1.5, draws, count=5, of="documents").missing == ""
    alike = interval(1.5, np.full(100, 1.5), count=60, of="documents")
    assert (alike.low, alike.high, alike.missing) == (None, None, "every draw of documents gives the same")


def test_a_share_of_none_or_all_has_wilsons_interval():
    # Wilson's score interval at 95 % by hand: 0 of 60 → [0, z²/(n + z²)]; 30 of 60 from statsmodels' proportion_confint
    none, half, all_ = (wilson(right, 60, of="examples") for right in (0, 30, 60))
    assert (none.value, none.low, none.high) == (0.0, 0.0, pytest.approx(3.8414588 / 63.8414588))
    assert (half.low, half.high) == (pytest.approx(0.3773502), pytest.approx(0.6226498))
    assert (all_.low, all_.high) == (pytest.approx(60 / 63.8414588), 1.0)
    # of tokens in documents: the bootstrap over documents, and Wilson's with a document as a trial where that has no width
    clustered = share_interval(0, 5000, np.zeros(100), count=10, of="documents")
    assert (clustered.low, clustered.high) == (0.0, wilson(0, 10, of="documents").high)


@pytest.fixture(scope="module")
def evaluated(small_run, tmp_path_factory, in_process):
    """The stage run once with everything on: (metrics, out_dir)."""
    out_dir = tmp_path_factory.mktemp("evaluate")
    return evaluate.run(SETTINGS, scored(small_run), out_dir, in_process(out_dir)), out_dir


SETTINGS = evaluate.EvaluateSettings(
    max_documents=6,
    bootstrap_resamples=100,
    tasks=("next_line", "close_bracket", "held_out_rolling"),
    task_examples=12,
    bytes_per_shard=40_000,
    samples=evaluate.SampleSettings(
        prompts=("def ",), questions=("What is a list?",), generation=GenerateSettings(max_new_tokens=8)
    ),
)


def test_bits_per_byte_equals_a_plain_sum_over_windows_of_one_document_at_a_time(small_run, evaluated):
    import torch

    metrics, _ = evaluated
    tokenizer = Tokenizer.load(small_run["tokenizer"].path)
    model = load_model(small_run["pretrain"].path / "model")
    bits = text_bytes = tokens = 0.0
    for document in held_out.choose(small_run["corpus"].path, SETTINGS).documents:
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id])
        text_bytes += len(document.text.encode())
        tokens += len(ids) - 1
        done = 0
        while done < len(ids) - 1:
            end = min(max(done + 64, 128), len(ids) - 1)
            start = max(0, end - 128)
            logp_TV = model(ids[None, start:end])["logits"][0].double().log_softmax(-1)
            logp_T = logp_TV.gather(1, ids[start + 1 : end + 1, None])[:, 0]
            bits -= float(logp_T[done - start :].sum()) / math.log(2)
            done = end
    # fp32 logits summed in another order: relative error far below 1e-5, and NLLs do not cancel
    assert metrics["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(2 ** (bits / tokens), rel=1e-4)
    assert metrics["scored_tokens"] == tokens
    assert metrics["scored_bytes"] == text_bytes


def test_the_result_has_every_scorer_with_an_interval_around_it(small_run, evaluated):
    metrics, out_dir = evaluated
    results = json.loads((out_dir / "results.json").read_text())
    assert set(results["scores"]) == {"base", "finetuned", "unigram", "self_unigram", "gzip", "xz"}
    for score in results["scores"].values():
        found = score["bits_per_byte"]
        assert found["low"] < found["value"] < found["high"]
    assert results["scores"]["self_unigram"]["bits_per_byte"]["value"] < metrics["unigram_bits_per_byte"]
    texts = [d.text.encode() for d in held_out.choose(small_run["corpus"].path, SETTINGS).documents]
    for name, compressed_bytes in (("gzip", gzip_bytes), ("xz", xz_bytes)):
        expected = 8 * sum(map(compressed_bytes, texts)) / sum(map(len, texts))
        assert metrics[f"{name}_bits_per_byte"] == pytest.approx(expected)
    assert {"finetuned_bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "next_line_acc"} <= set(metrics)
    assert {"finetuned_close_bracket_exact_match", "held_out_rolling_bits_per_byte"} <= set(metrics)
    assert "| base |" in (out_dir / "results.md").read_text()


def test_the_documents_file_adds_up_to_the_result(evaluated):
    metrics, out_dir = evaluated
    table = pq.read_table(out_dir / "documents.parquet").to_pydict()
    assert sum(table["base_bits"]) / sum(table["bytes"]) == pytest.approx(metrics["bits_per_byte"])
    assert sum(table["gzip_bits"]) / sum(table["bytes"]) == pytest.approx(metrics["gzip_bits_per_byte"])
    assert sum(table["tokens"]) == metrics["scored_tokens"]


def test_the_harness_rolling_task_agrees_with_the_stages_own_score(small_run, evaluated, tmp_path, in_process):
    metrics, _ = evaluated
    alike = replace(SETTINGS, stride_tokens=128, tasks=(), samples=evaluate.SampleSettings())
    own = evaluate.run(alike, scored(small_run), tmp_path, in_process(tmp_path))
    columns = pq.read_table(tmp_path / "documents.parquet").to_pydict()
    # The harness leaves </s> out: at most its nats, about 15 bits a document here, can lie between the two.
    between = 20 * len(columns["id"]) / sum(columns["bytes"])
    assert metrics["held_out_rolling_bits_per_byte"] == pytest.approx(own["bits_per_byte"], abs=between)


def test_scores_do_not_depend_on_how_the_work_was_cut(small_run, evaluated, tmp_path, in_process):
    cut = replace(SETTINGS, bytes_per_shard=7_000, tokens_per_batch=600, tasks=(), samples=evaluate.SampleSettings())
    metrics = evaluate.run(cut, scored(small_run), tmp_path, in_process(tmp_path))
    assert metrics["bits_per_byte"] == pytest.approx(evaluated[0]["bits_per_byte"], rel=1e-6)


def test_running_it_again_gives_the_same_bytes(small_run, evaluated, tmp_path, in_process):
    _, out_dir = evaluated
    evaluate.run(SETTINGS, scored(small_run), tmp_path, in_process(tmp_path))
    files = sorted(path.relative_to(out_dir) for path in out_dir.rglob("*") if path.is_file())
    assert len(files) > 8
    for file in files:
        assert (tmp_path / file).read_bytes() == (out_dir / file).read_bytes(), file


def test_a_cap_takes_the_documents_with_the_lowest_hashes(small_run):
    corpus = small_run["corpus"].path
    everything = held_out.choose(corpus, evaluate.EvaluateSettings()).documents
    some = held_out.choose(corpus, evaluate.EvaluateSettings(max_bytes=100_000))
    assert [d.id for d in everything] == sorted(d.id for d in everything)
    assert some.documents == everything[: len(some.documents)]
    assert 1 <= len(some.documents) < some.available == len(everything)
    assert sum(len(d.text.encode()) for d in some.documents) <= 100_000
    assert len(held_out.choose(corpus, evaluate.EvaluateSettings(max_bytes=1)).documents) == 1
    assert len(held_out.choose(corpus, evaluate.EvaluateSettings(max_documents=3)).documents) == 3


def test_windows_beyond_the_model_are_refused(small_run, tmp_path, in_process):
    for setting, message in (({"context_tokens": 4096}, "Choose at most"), ({"stride_tokens": 500}, "would skip some")):
        with pytest.raises(Refusal, match=message):
            evaluate.run(evaluate.EvaluateSettings(**setting), scored(small_run), tmp_path, in_process(tmp_path))


def test_a_corpus_without_held_out_documents_is_an_error_that_says_what_to_raise(tmp_path):
    write_documents(tmp_path / "heldout" / "00000.parquet", [])
    with pytest.raises(Refusal, match=r"held_out\.fraction"):
        held_out.choose(tmp_path, evaluate.EvaluateSettings())


def test_importing_the_stages_does_not_import_what_is_slow():
    code = (
        "import sys; from pipelines.stages import evaluate, export, report; from pipelines.inference import generator; "
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'pyarrow', 'ray', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@pytest.fixture(scope="module")
def with_conversations(small_run, tmp_path_factory, in_process):
    """The small run with forty conversations of a user's, half of them held out; some with two answers, one long."""
    from data.rows.instructions import InstructionSettings
    from pipelines.stages import instructions
    from pipelines.stages.instructions import ConversationRows

    folder = tmp_path_factory.mktemp("chats")
    lines = []
    for number in range(40):
        said = [
            f"What is {number} and one?",
            f"It is {number + 1}." * (1 + 40 * (number % 8 == 0)),
            "Sure?",
            f"{number + 1}, yes.",
        ]
        turns = said if number % 2 else said[:2]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    data = InstructionSettings(kind="files", paths=(str(folder / "chats.jsonl"),), held_out_fraction=0.5)
    out_dir = folder / "instructions"
    out_dir.mkdir()
    metrics = instructions.run(
        ConversationRows(data=data, seq_len=128), scored(small_run), out_dir, in_process(out_dir)
    )
    return {**small_run, "instructions": artifact("instructions", out_dir, metrics)}


def test_held_out_conversations_are_scored_by_the_loss_of_the_answers(with_conversations, tmp_path, in_process):
    import torch

    from data.rows.instructions import load_conversations
    from data.tokenizers.chat import encode_chat

    settings = evaluate.EvaluateSettings(bootstrap_resamples=100, tokens_per_batch=600)
    without_corpus = {name: with_conversations[name] for name in ("tokenizer", "pretrain", "finetune", "instructions")}
    context = in_process(tmp_path)
    metrics = evaluate.run(settings, scored(without_corpus), tmp_path, context)
    tokenizer = Tokenizer.load(with_conversations["tokenizer"].path)
    held_out_chats = load_conversations(with_conversations["instructions"].path / "heldout.jsonl")
    assert metrics["scored_conversations"] == len(held_out_chats) >= 5
    rows = pq.read_table(tmp_path / "conversations.parquet").to_pydict()
    for name, step, prefix in (("base", "pretrain", ""), ("finetuned", "finetune", "finetuned_")):
        model = load_model(with_conversations[step].path / "model")
        nats, tokens = {}, {}
        for chat in held_out_chats:
            ids, is_target = encode_chat(tokenizer, chat.messages)
            total, done = 0.0, 0
            while done < len(ids) - 1:  # windows of the model's 128 tokens, every 64
                end = min(max(done + 64, 128), len(ids) - 1)
                start = max(0, end - 128)
                logp_TV = model(torch.tensor(ids[start:end])[None])["logits"][0].double().log_softmax(-1)
                for place in range(done, end):
                    total -= float(logp_TV[place - start, ids[place + 1]]) if is_target[place + 1] else 0.0
                done = end
            nats[chat.id], tokens[chat.id] = total, sum(is_target)
        expected = sum(nats.values()) / sum(tokens.values())
        assert metrics[f"{prefix}conversation_loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics[f"{prefix}conversation_loss_low"] < expected < metrics[f"{prefix}conversation_loss_high"]
        assert rows[f"{name}_nats"] == pytest.approx([nats[identity] for identity in rows["id"]], rel=1e-5)
        assert rows["tokens"] == [tokens[identity] for identity in rows["id"]]
    assert max(tokens.values()) > 128  # the long one is scored whole, whatever its training would have dropped
    assert "bits_per_byte" not in metrics
    assert f"{len(held_out_chats)} of {len(held_out_chats)} held-out conversations" in context.said[-1]
    assert "| finetuned | " in (tmp_path / "results.md").read_text()


def test_a_conversation_that_the_template_refuses_is_counted_and_the_others_are_scored(
    with_conversations, tmp_path, in_process
):
    import shutil

    from data.rows.instructions import load_conversations

    chats = load_conversations(with_conversations["instructions"].path / "heldout.jsonl")
    words = chats[0].messages[0]["content"]
    folder = shutil.copytree(with_conversations["tokenizer"].path, tmp_path / "tokenizer")
    template = folder / "chat_template.jinja"
    refusing = "{% if messages[0].content == '" + words + "' %}{{ raise_exception('not this') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    made = {name: with_conversations[name] for name in ("pretrain", "finetune", "instructions")}
    made["tokenizer"] = artifact("tokenizer", folder, {})
    out_dir = tmp_path / "evaluate"
    out_dir.mkdir()
    context = in_process(out_dir)
    metrics = evaluate.run(evaluate.EvaluateSettings(bootstrap_resamples=20), scored(made), out_dir, context)
    assert metrics["scored_conversations"] == len(chats) - 1
    assert "not scored: 1 of the held-out conversations, refused by the chat template; the first: " in context.said[0]
    assert "chats.jsonl at " in context.said[0] and "not this" in context.said[0]
    assert "(not scored: 1 that the chat template refuses)" in (out_dir / "results.md").read_text()


def test_one_held_out_document_has_no_interval_and_that_is_said(small_run, tmp_path, in_process):
    context = in_process(tmp_path)
    metrics = evaluate.run(evaluate.EvaluateSettings(max_documents=1), scored(small_run), tmp_path, context)
    assert metrics["bits_per_byte"] > 0 and not [name for name in metrics if name.endswith(("_low", "_high"))]
    assert "no intervals: 1 document, and an interval takes at least 5" in context.said[-1]
    table = (tmp_path / "results.md").read_text()
    assert "No intervals: 1 document" in table and "[" not in table


def test_held_out_documents_beyond_a_cap_are_told():
    document = Document(text="x", source="a.txt", position=0)
    parts = [
        held_out.HeldOut(documents=[document], available=1),
        held_out.HeldOut(documents=[document], available=1235),
    ]
    assert "left out 1,234: held-out documents beyond evaluate.max_documents" in held_out.unscored(parts)
    assert held_out.unscored(parts[:1]) == ""
