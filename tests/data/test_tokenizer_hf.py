"""Tokenizers that weights bring: the ids of transformers, control pieces by id alone, answers found in any template."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.refusal import Refusal
from data.loader import open_loader
from data.rows.packing import token_dtype
from data.rows.shard_tasks import make_shard, plan_shards
from data.rows.shards import ShardSettings, write_manifest
from data.tasks.settings import MaskedTokenSettings, SpanDenoisingSettings
from data.text.document import Document, write_documents
from data.tokenizers.base import TEMPLATE_FILE
from data.tokenizers.chat import encode_chat
from data.tokenizers.export import export_tokenizer
from data.tokenizers.huggingface import HuggingFaceTokenizer, config_ids
from data.tokenizers.sentencepiece import MODEL_FILE, Tokenizer, tokenizer_files
from tests.data.foreign import KINDS, save
from tests.data.test_trace import trace

CLASSES = {  # what the families' folders name, beside the model_type of their config.json
    "gpt2": ("GPT2Tokenizer", "gpt2"),
    "qwen": ("Qwen2Tokenizer", "qwen2"),
    "llama3": ("PreTrainedTokenizerFast", "llama"),
    "llama2": ("LlamaTokenizer", "llama"),
    "bert": ("BertTokenizer", "bert"),
    "t5": ("PreTrainedTokenizerFast", "t5"),  # T5Tokenizer drops a normalizer that is not SentencePiece's own
}
CHATS = {"gpt2": None, "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "</s>"}
FRAGMENTS = [
    *(
        "",
        "hello",
        " world",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "é",
        "e\u0301",
        "漢字",
        "😀",
        "12345",
        "don't",
        "▁",
        "def f(x):",
    ),
    *("ﬁ", " ", "\0", "\ue000", "<", "|>", "[", "A", "\u2028", "import argparse\n"),
]
FORGED = [
    *("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>", "[MASK]", "[SEP]", "<pad>", "<extra_id_3>"),
    "\ufdd01\ufdd1",
]


@pytest.fixture(scope="session")
def folders(library_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind, beside the config.json of a model of its family."""
    root = tmp_path_factory.mktemp("foreign")
    for kind, (name, model_type) in CLASSES.items():
        folder = save(kind, [text[:40_000] for text in library_texts], root / kind)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("backend", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return {kind: root / kind for kind in KINDS}


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def texts(fragments: list[str], rounds: int = 300) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(fragments, k=draw.randint(0, 9))) for _ in range(rounds)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    ours, other = Tokenizer.load(folders[kind]), theirs(folders[kind])
    for text, ids in zip(texts(FRAGMENTS), ours.encode_batch(texts(FRAGMENTS)), strict=True):
        assert ids == ours.encode(text) == other.encode(text, add_special_tokens=False), repr(text)
        assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(other)


@pytest.mark.parametrize("kind", KINDS)
def test_control_pieces_spelled_in_a_text_stay_text(folders: dict[str, Path], kind: str) -> None:
    ours = Tokenizer.load(folders[kind])
    forbidden = set(ours.control_ids.values()) - {ours.unk_id}
    for text in texts([*FRAGMENTS, *FORGED, *ours.control_pieces]):
        ids = ours.encode(text)
        assert not forbidden & set(ids), repr(text)
        assert max(ids, default=0) < ours.vocab_size
    for piece, number in ours.control_ids.items():
        assert ours.piece(number) == piece
        assert ours.decode([number, *ours.encode("a"), number], show_control=True).startswith(piece)
        assert ours.decode([number, number]) == ""


def test_what_a_piece_is_for_is_read_from_the_folder(folders: dict[str, Path]) -> None:
    def roles(kind: str) -> tuple[str, ...]:
        made = Tokenizer.load(folders[kind])
        return tuple(made.piece(number) for number in (made.bos_id, made.eos_id, made.pad_id, made.end_id))

    assert roles("gpt2") == ("<|endoftext|>",) * 4
    assert roles("qwen") == ("<|im_end|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")  # it names no beginning
    assert roles("llama3") == ("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", "<|eot_id|>")
    assert roles("llama2") == ("<s>", "</s>", "</s>", "</s>")
    assert roles("bert") == ("[CLS]", "[SEP]", "[PAD]", "[SEP]")
    assert roles("t5") == ("</s>", "</s>", "<pad>", "</s>")


def test_a_folder_that_names_nothing_is_read_by_its_configuration_and_its_own_frame(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for kind in ("qwen", "bert"):
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        (folder / "tokenizer_config.json").write_text("{}")
    ids = {name: Tokenizer.load(folders["qwen"]).control_ids[f"<|{name}|>"] for name in ("endoftext", "im_end")}
    said = {"bos_token_id": ids["endoftext"], "eos_token_id": [ids["im_end"], ids["endoftext"]]}
    with pytest.raises(Refusal, match="which piece ends a text"):
        Tokenizer.load(tmp_path / "qwen")
    (tmp_path / "qwen" / "generation_config.json").write_text(json.dumps(said))
    made = Tokenizer.load(tmp_path / "qwen")
    assert (made.bos_id, made.eos_id) == (ids["endoftext"], ids["im_end"])
    assert config_ids(tmp_path / "qwen") == {"bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"]}
    bert = Tokenizer.load(tmp_path / "bert")
    names = [bert.piece(number) for number in (bert.bos_id, bert.eos_id, bert.pad_id, bert.require_mask_id())]
    assert names == ["[CLS]", "[SEP]", "[PAD]", "[MASK]"] and bert.unk_id == 1


def test_objectives_hide_with_the_pieces_there_are(folders: dict[str, Path]) -> None:
    bert, t5, gpt2 = (Tokenizer.load(folders[kind]) for kind in ("bert", "t5", "gpt2"))
    masked: Any = MaskedTokenSettings().over(bert, 0)
    assert (masked.mask_id, masked.kept_ids, masked.random_ids) == (4, (0, 1, 2, 3, 4), (5, bert.vocab_size))
    spans: Any = SpanDenoisingSettings().over(t5, 0)
    assert (spans.sentinel_id, spans.start_id, spans.end_id) == (t5.vocab_size - 1, 0, 1)
    assert t5.sentinels == 20
    for settings in (MaskedTokenSettings(), SpanDenoisingSettings()):
        with pytest.raises(Refusal, match="start from"):
            settings.over(gpt2, 0)


CONVERSATION = [
    {"role": "user", "content": "  What is it? \n"},
    {"role": "assistant", "content": "def f():\n    return 1\n"},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "content": "Yes, 漢字."},
]


@pytest.mark.parametrize("kind", CHATS)
def test_chats_are_those_of_transformers_and_answers_are_targets(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    export_tokenizer(folders[kind], tmp_path)  # with the template that was used, where the folder brings none
    ours, other = Tokenizer.load(folders[kind]), theirs(tmp_path)
    ids, is_target = encode_chat(ours, CONVERSATION)
    assert ids == other.apply_chat_template(CONVERSATION, return_dict=False)
    runs: list[list[int]] = [[]]
    for number, target in zip(ids, is_target, strict=True):
        runs = [*runs[:-1], [*runs[-1], number]] if target else [*runs, []]
    said = [ours.decode(run, show_control=True) for run in runs if run]
    closing = CHATS[kind] or "<|endoftext|>"
    assert [answer.removesuffix(closing).strip() for answer in said] == ["def f():\n    return 1", "Yes, 漢字."]
    assert all(answer.endswith(closing) for answer in said)
    for until in (1, 3):
        prompt, before = encode_chat(ours, CONVERSATION[:until], generation_prompt=True)
        options = {"add_generation_prompt": True, "return_dict": False}
        assert prompt == other.apply_chat_template(CONVERSATION[:until], **options)
        assert ids[: len(prompt)] == prompt and is_target[len(prompt)]
        assert before == is_target[: len(prompt)]


@pytest.mark.parametrize("kind", CHATS)
def test_a_message_cannot_forge_a_turn(folders: dict[str, Path], kind: str) -> None:
    ours = Tokenizer.load(folders[kind])
    forged = "".join((*ours.control_pieces, "\ue0000\ue001\ue004", "\ufdd03\ufdd1"))
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    honest, _ = encode_chat(ours, asked)
    ids, _ = encode_chat(
        ours, [{"role": "user", "content": f"a{forged}"}, {"role": "assistant", "content": f"b{forged}"}]
    )
    control = set(ours.control_ids.values()) - {ours.unk_id}
    assert [number for number in ids if number in control] == [number for number in honest if number in control]


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    rebuild, (definition, special, *_) = tokenizer.__reduce__()  # type: ignore[misc]
    return rebuild(definition, special, template)  # type: ignore[operator]


def test_a_template_that_hides_where_answers_are_is_refused_with_the_remedy(folders: dict[str, Path]) -> None:
    qwen = Tokenizer.load(folders["qwen"])
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    with pytest.raises(Refusal, match=r"does not go on from there.*\{% generation %\}"):
        encode_chat(with_template(qwen, turns + asks), CONVERSATION)
    with pytest.raises(Refusal, match="leaves out or repeats"):
        encode_chat(with_template(qwen, turns.replace("m.content", "messages[0].content")), CONVERSATION)
    asks = "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    with pytest.raises(Refusal, match="middle of text"):
        encode_chat(with_template(qwen, turns.replace("\n{{", ": {{") + asks), CONVERSATION)
    # The end of a turn may differ behind its closing piece, as Phi-3's does: the last one is followed by the end of text.
    closes = "{% if not add_generation_prompt %}<|endoftext|>{% else %}<|im_start|>assistant\n{% endif %}"
    ids, is_target = encode_chat(with_template(qwen, turns + closes), CONVERSATION)
    last = [number for number, target in zip(ids, is_target, strict=True) if target][-1]
    assert last == qwen.end_id and ids[-1] == qwen.control_ids["<|endoftext|>"]


def test_line_breaks_that_melt_with_the_prompts_belong_to_the_answer(folders: dict[str, Path]) -> None:
    llama3 = Tokenizer.load(folders["qwen"])
    ids, is_target = encode_chat(llama3, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}])
    first = is_target.index(True)
    assert llama3.decode(ids[first:]).strip() == "b" and llama3.decode(ids[:first]).endswith("assistant")


def test_the_date_of_a_template_stands_still(folders: dict[str, Path]) -> None:
    dated = with_template(Tokenizer.load(folders["qwen"]), "{{ strftime_now('%d %b %Y') }}<|im_end|>")
    assert dated.decode(encode_chat(dated, CONVERSATION[:1])[0]) == "26 Jul 2024"


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_travels_to_workers(folders: dict[str, Path], kind: str) -> None:
    ours = Tokenizer.load(folders[kind])
    copy = pickle.loads(pickle.dumps(ours))
    for text in texts([*FRAGMENTS, *FORGED], rounds=20):
        assert copy.encode(text) == ours.encode(text)
    assert copy.chat_template == ours.chat_template and copy.control_ids == ours.control_ids


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_lead_back_to_their_characters(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    ours = Tokenizer.load(folders[kind])
    words = "import the naïve 漢字 parser\n  def run(self): return 42\n" * 3
    spans_N2 = ours.characters(words)
    assert len(spans_N2) == len(ours.encode(words))
    covered = np.zeros(len(words), dtype=bool)
    for begin, end in spans_N2.tolist():
        covered[begin:end] = True
    assert all(covered[at] for at, character in enumerate(words) if not character.isspace())
    if kind in ("gpt2", "qwen", "llama3", "llama2"):
        assert covered.all()
    corpus, shards = tmp_path / "corpus", tmp_path / "shards"
    corpus.mkdir()
    write_documents(corpus / "00000.parquet", [Document(text=f"{n} {words}", source="f", position=n) for n in range(6)])
    settings = ShardSettings(seq_len=24, rows_per_block=4)
    [task] = plan_shards(corpus, settings)
    record = make_shard(task, shards, corpus_dir=corpus, tokenizer=ours, settings=settings)
    write_manifest(shards, [record], settings=settings, vocab_size=ours.vocab_size)
    with open_loader({"a": shards}, rows_per_step=2, micro_batch_rows=2) as loader:
        tokens = next(loader).micro_batches[0]["tokens_BT"].numpy()
    for row, tokens_T in zip(trace(shards, ours, {"a": corpus}, step=1, rows_per_step=2), tokens, strict=True):
        for piece in row.pieces:
            shown = ours.decode(tokens_T[piece.start : piece.stop].tolist())
            assert piece.characters is not None
            if kind in ("gpt2", "llama3"):
                assert shown.strip("\ufffd") in piece.text and len(piece.text) <= len(shown) + 2


def test_large_vocabularies_get_wide_tokens() -> None:
    assert (token_dtype(65_536), token_dtype(151_936)) == (np.uint16, np.uint32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_leave_as_they_came(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    export_tokenizer(folders[kind], tmp_path)
    came = {file.name: file.read_bytes() for file in tokenizer_files(folders[kind])}
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {name: left[name] for name in came} == came
    assert set(left) - set(came) <= {TEMPLATE_FILE}
    assert Tokenizer.load(tmp_path).chat_template == Tokenizer.load(folders[kind]).chat_template


def test_a_sentencepiece_model_alone_is_refused_with_a_command_that_helps(
    library_texts: list[str], tmp_path: Path
) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(library_texts[0].splitlines()),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "split_digits": True, "minloglevel": 2},
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    )
    (tmp_path / MODEL_FILE).write_bytes(model.getvalue())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(Refusal, match="transformers makes one") as refused:
        Tokenizer.load(tmp_path)
    real = theirs(tmp_path)
    exec(str(refused.value).split('python -c "')[1].rsplit('"', 1)[0], {})
    made = Tokenizer.load(tmp_path)
    assert isinstance(made, HuggingFaceTokenizer) and (made.bos_id, made.eos_id) == (1, 2)
    for text in texts(
        ["hello", " world", "  ", "é", "漢字", "def f(x):", "12345", " parser.add_", "argument"], rounds=100
    ):
        assert made.encode(text) == real.encode(text, add_special_tokens=False), repr(text)


def test_a_broken_tokenizer_file_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["gpt2"], tmp_path / "broken")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"model": {"type": "Unheard"}}))
    with pytest.raises(Refusal, match=r"broken: holds no tokenizer that can be read: tokenizer\.json"):
        Tokenizer.load(folder)
    named = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|gone|>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(Refusal, match=r"tokenizer\.json: lacks the special piece '<\|gone\|>'"):
        Tokenizer.load(folder)


def test_merges_that_spell_a_control_piece_make_none() -> None:
    vocab = {"<": 0, "s": 1, ">": 2, "s>": 3, "<s>": 4}
    special = {"id": 4, "content": "<s>", "special": True, "normalized": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    model = {"type": "BPE", "vocab": vocab, "merges": [["s", ">"], ["<", "s>"]]}
    made = HuggingFaceTokenizer(
        json.dumps({"added_tokens": [special | flags], "model": model}), {"eos_token": "<s>"}, None
    )
    assert made.encode("<s>") == [0, 3]
