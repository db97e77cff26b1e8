"""Conversations, prompts and depths that a later step would refuse are refused by `plan` and before anything runs."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.refusal import Refusal
from data.rows.instructions import InstructionSettings, build_instructions, count_train_conversations
from data.rows.packing import TokenDocument, pack_conversations
from pipelines.engine import waiting
from pipelines.engine.step import Step
from pipelines.stages import rehearsal
from pipelines.stages.instructions import ConversationRows, no_row
from tests.conftest import LOCAL, answer, complaint, tiny
from tests.data.foreign import save
from tests.test_start import with_weights


def conversations(path: Path, count: int, *, text: str = "word") -> Path:
    lines = [json.dumps({"prompt": f"{text} {number}", "completion": f"answer {number}"}) for number in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_ten_conversations_for_a_larger_batch_are_refused_before_pretraining_and_the_remedy_works(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path, verb: str
) -> None:
    chats = conversations(tmp_path / "chats.jsonl", 10)
    words = [word for word in tiny(corpus_dir, tmp_path / "store", LOCAL) if not word.startswith("finetune")]
    words += ["finetune=chat", f"finetune.data.paths=[{chats}]"]
    said = complaint(capsys, verb, *words)
    assert (
        "finetune.train.global_batch_tokens = 8192: the 9 conversations to train on fill at most as many rows of 64"
        in said
    )
    assert not list(tmp_path.glob("store/*/*"))
    answer(capsys, "plan", *words, advised(said))
    said = complaint(capsys, verb, *words, fours := "finetune.train.micro_batch_rows=4")
    answer(capsys, "plan", *words, fours, advised(said))


def advised(said: str) -> str:
    """The smaller batch that a refusal names."""
    [override] = re.findall(r"[Ss]et (finetune\.train\.global_batch_tokens=\d+) or less", said)
    return str(override)


def test_conversations_that_fill_no_batch_once_they_are_packed_are_refused_before_pretraining_and_the_remedy_works(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    chats = conversations(tmp_path / "chats.jsonl", 60)
    words = [word for word in tiny(corpus_dir, tmp_path / "store", LOCAL) if not word.startswith("finetune")]
    words += ["finetune=chat", f"finetune.data.paths=[{chats}]", "finetune.train.global_batch_tokens=3072"]
    answer(capsys, "plan", *words)  # 57 conversations, which might fill the 48 rows of a batch
    first = complaint(capsys, "run", *words)
    assert "finetune.train.global_batch_tokens = 3072: the conversations fill only" in first
    assert {path.parts[-3] for path in tmp_path.glob("store/*/*/manifest.json")} >= {"tokenizer", "instructions"}
    assert not list(tmp_path.glob("store/pretrain*/*"))
    assert complaint(capsys, "plan", *words) == first  # told from what is there now
    answer(capsys, "plan", *words, advised(first))
    # Not even a row.
    short = ("shards.seq_len=8", "finetune.train.global_batch_tokens=8", "evaluate.stride_tokens=8")
    until = ("--until", "instructions")
    said = complaint(capsys, "run", *words, *short, *until)
    assert (
        "finetune.too_long = 'drop': fine-tuning needs a row with an answer, and each of the 58 conversations" in said
    )
    longer = re.search(r"longer rows: (shards\.seq_len=(\d+))", said)
    assert longer is not None
    sizes = [f"{step}.global_batch_tokens={longer[2]}" for step in ("pretrain", "finetune.train")]
    answer(capsys, "run", *words, *short, longer[1], *sizes, *until)


def test_conversations_too_long_for_any_row_are_to_be_cut_only_where_that_leaves_an_answer() -> None:
    for answers, cut_would_do in ((5, True), (12, False)):
        tokens = np.arange(20)
        document = TokenDocument(id="a", source="a", position=1, tokens=tokens, is_target=tokens >= answers)
        remedy = no_row([document], ConversationRows(seq_len=8)).remedy
        assert ("finetune.too_long=truncate" in remedy) == cut_would_do and "shards.seq_len=20" in remedy
        cut = pack_conversations([document], seq_len=8, pad_id=0, dtype=np.int64, counts=Counter())
        assert (len(cut) > 0) == cut_would_do


def test_conversations_that_are_limited_below_a_batch_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    words = tiny(corpus_dir, tmp_path, LOCAL, "finetune.data.max_conversations=7")
    said = complaint(capsys, "plan", *words)
    assert "the 7 conversations to train on" in said and "raise finetune.data.max_conversations" in said
    answer(capsys, "plan", *words, "finetune.data.max_conversations=8")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 40])
def test_conversations_counted_early_are_those_that_are_trained_on(tmp_path: Path, count: int) -> None:
    for seed in range(4):
        paths = (str(conversations(tmp_path / f"{seed}.jsonl", count, text=f"seed {seed}")),)
        for most in (None, 4):
            settings = InstructionSettings(kind="files", paths=paths, held_out_fraction=0.3, max_conversations=most)
            try:
                built = build_instructions(settings, [], tmp_path / "out")["train_conversations"]
            except Refusal as error:
                with pytest.raises(Refusal, match=re.escape(str(error))):
                    count_train_conversations(settings, 1000)
            else:
                assert count_train_conversations(settings, 1000) == built
                assert count_train_conversations(settings, 3) == min(built, 3)


def test_only_the_beginning_of_many_conversations_is_read(tmp_path: Path) -> None:
    chats = conversations(tmp_path / "chats.jsonl", 200)
    with chats.open("a") as file:
        file.write("no JSON\n" * 1000)  # past the limit of malformed lines
    settings = InstructionSettings(kind="files", paths=(str(chats),))
    assert count_train_conversations(settings, 32) == 32
    with pytest.raises(Refusal, match="malformed"):
        count_train_conversations(settings, 1000)


def test_a_torn_archive_of_conversations_is_one_sentence(tmp_path: Path) -> None:
    packed = gzip.compress(conversations(tmp_path / "chats.jsonl", 400).read_bytes())
    torn = tmp_path / "torn.jsonl.gz"
    for content in (packed[: len(packed) // 2], packed[:50] + b"\x00" * 40 + packed[90:], b"no gzip"):
        torn.write_bytes(content)
        with pytest.raises(Refusal, match=r"torn\.jsonl\.gz: cannot be read"):
            count_train_conversations(InstructionSettings(kind="files", paths=(str(torn),)), 1000)


@pytest.mark.parametrize("name", ["x.json", "x.csv", "folder"])
def test_files_that_hold_no_conversations_are_answered_with_what_does(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    if name == "folder":
        (path / "x.json").parent.mkdir()
        path = path / "x.json"
    path.write_text("[]")
    words = [word for word in tiny(corpus_dir, tmp_path / "store", LOCAL) if not word.startswith("finetune")]
    said = complaint(capsys, "plan", *words, "finetune=chat", f"finetune.data.paths=[{tmp_path / name}]")
    assert "Readable are .jsonl (also .gz or .zst), a conversation a line" in said
    assert "parquet" not in said and ".txt" not in said


def test_prompts_that_no_tokenizer_makes_short_enough_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    words = tiny(corpus_dir, tmp_path / "store", LOCAL)
    longest = 16 * 63  # of a model made for 128 tokens at the most
    for key in ("prompts", "questions"):
        for verb in ("plan", "run"):
            said = complaint(capsys, verb, *words, f"evaluate.samples.{key}=['{'word ' * longest}']")
            assert f"evaluate.samples.{key}[0]: has" in said and "Shorten the prompt" in said
    assert not list(tmp_path.glob("store/*/*"))
    answer(capsys, "plan", *words, f"evaluate.samples.prompts=['{'a' * longest}']")


def test_a_model_of_2000_layers_is_planned_and_a_deeper_one_refused_in_seconds(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(waiting, "tell", told.append)
    monkeypatch.setattr(waiting, "LOG_AFTER_SECONDS", 0.05)
    words = [word for word in tiny(corpus_dir, tmp_path, LOCAL) if not word.startswith("model")]
    began = time.monotonic()
    said = complaint(capsys, "plan", *words, "model=tiny", "model.n_layers=10000")
    assert "model.n_layers = 10000: no model is that large. At most 2,000" in said
    assert time.monotonic() - began < 10
    answer(capsys, "plan", *words, "model=tiny", "model.n_layers=200")
    assert any("a model of 200 layers is built" in line for line in told)


def test_what_a_step_tries_before_it_runs_is_told_where_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.engine.resolve import check

    told: list[str] = []
    monkeypatch.setattr(waiting, "tell", told.append)
    monkeypatch.setattr(waiting, "LOG_AFTER_SECONDS", 0.02)
    slow = Step(
        name="export", kind="export", run=lambda *_: {}, version=1, settings=None, check=lambda: time.sleep(0.1)
    )
    check(slow, {})
    assert told and told[0].startswith("export: what it would refuse later is tried now")


def folder_of(kind: str, folder: Path, texts: list[str], **changed: Any) -> Path:
    """Weights and a tokenizer as transformers saves them; the model has a row for each piece unless told otherwise."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    save(kind, texts, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if more := changed.pop("added", None):
        tokenizer.add_special_tokens({"pad_token": more})
        tokenizer.save_pretrained(folder)
        changed.setdefault("vocab_size", len(tokenizer) - 1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, **changed}
    LlamaForCausalLM(LlamaConfig(**sizes, **rows)).save_pretrained(folder)
    return folder


def test_a_piece_without_a_row_is_taken_out_as_the_message_says(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    texts = [path.read_text() for path in sorted(corpus_dir.glob("*.py"))[:4]]
    folder = folder_of("gpt2", tmp_path / "weights", texts, added="[PAD]")
    words = with_weights(corpus_dir, folder, f"store={tmp_path / 'store'}", LOCAL)
    said = complaint(capsys, "plan", *words)
    assert "Where '[PAD]' was never used, take that out of added_tokens" in said
    larger = shutil.copytree(folder, tmp_path / "larger")
    file = Path(said.partition("added_tokens in ")[2].partition(",")[0])
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[PAD]"]
    file.write_text(json.dumps(content))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (named := folder / name).is_file():
            config = {key: value for key, value in json.loads(named.read_text()).items() if "[PAD]" not in str(value)}
            named.write_text(json.dumps(config))
    answer(capsys, "plan", *words)

    model = LlamaForCausalLM.from_pretrained(larger)
    pieces = re.search(r"model\.resize_token_embeddings\((\d+)\)", said)
    assert pieces is not None
    model.resize_token_embeddings(int(pieces[1]))
    model.save_pretrained(larger)
    answer(capsys, "plan", *with_weights(corpus_dir, larger, f"store={tmp_path / 'store'}", LOCAL))


def test_a_rehearsal_that_passed_is_remembered_until_a_byte_of_what_it_read_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus_dir: Path
) -> None:
    from model.interop import read_config

    cache = tmp_path / "cache"
    texts = [path.read_text() for path in sorted(corpus_dir.glob("*.py"))[:4]]
    folder = folder_of("gpt2", tmp_path / "weights", texts)
    config, tried = read_config(folder), []
    whole = rehearsal._rehearse
    monkeypatch.setattr(rehearsal, "_rehearse", lambda *given: (tried.append(given), whole(*given)))
    for _ in range(2):
        rehearsal.rehearse(config, folder, cache)
    assert len(tried) == 1
    moved = shutil.copytree(folder, tmp_path / "moved")
    rehearsal.rehearse(config, moved, cache)
    assert len(tried) == 1
    (moved / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    rehearsal.rehearse(config, moved, cache)
    assert len(tried) == 2
    rehearsal.rehearse(config, folder, Path("/proc/nowhere"))  # a cache that cannot be written
    assert len(tried) == 3


def test_a_class_that_transformers_cannot_build_is_refused_and_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.interop import hf_config
    from pipelines.settings.compose import compose

    config = compose(["experiment=text", "model=tiny"]).resolved_model()
    described = hf_config(config)
    cache = tmp_path / "cache"
    monkeypatch.setattr(rehearsal, "hf_config", lambda _: {**described, "hidden_act": "no such activation"})
    for _ in range(2):
        with pytest.raises(Refusal, match=r"transformers .* cannot build the model .*no such activation"):
            rehearsal.rehearse(config, None, cache)
    monkeypatch.setattr(rehearsal, "hf_config", lambda _: described)
    rehearsal.rehearse(config, None, cache)


def test_prompts_are_counted_by_the_tokenizer_that_weights_bring(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    texts = [path.read_text() for path in sorted(corpus_dir.glob("*.py"))[:4]]
    folder = folder_of("gpt2", tmp_path / "weights", texts)
    words = with_weights(corpus_dir, folder, f"store={tmp_path / 'store'}", LOCAL)
    said = complaint(capsys, "plan", *words, f"evaluate.samples.prompts=['ok','{'文' * 60}']")
    assert "evaluate.samples.prompts[1]: has 181 tokens and the model was made for 128" in said
