"""Claims about generation: seeds, streaming, stop texts, chat."""

from __future__ import annotations

import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.refusal import Refusal
from data.tokenizers.chat import encode_chat
from data.tokenizers.sentencepiece import Tokenizer
from model.adapt.quantize import QuantizedLinear
from pipelines.__main__ import main
from pipelines.inference.generator import GenerateSettings, TextGenerator, TextStream


@pytest.fixture(scope="module")
def generator(small_run):
    return TextGenerator.open(small_run["pretrain"].path / "model", small_run["tokenizer"].path)


@pytest.fixture(scope="module")
def tokenizer(small_run):
    return Tokenizer.load(small_run["tokenizer"].path)


def test_the_same_seed_writes_the_same_text_and_another_seed_another(generator):
    settings = GenerateSettings(max_new_tokens=24, temperature=1.0, seed=1)
    once = generator.generate("def ", settings)
    again = generator.generate("def ", settings)
    other = generator.generate("def ", GenerateSettings(max_new_tokens=24, temperature=1.0, seed=2))
    assert once.text == again.text
    assert once.text != other.text
    assert once.tokens == 24
    assert once.finish == "length"
    assert once.tokens_per_second > 0


def test_what_is_streamed_is_the_text(generator):
    pieces: list[str] = []
    settings = GenerateSettings(max_new_tokens=40, temperature=1.0, seed=3)
    done = generator.generate("import ", settings, on_text=pieces.append)
    assert "".join(pieces) == done.text
    assert len(pieces) > 10


def test_a_stop_text_ends_the_completion_and_is_not_part_of_it(generator):
    free = generator.generate("def ", GenerateSettings(max_new_tokens=40, temperature=0)).text
    stop = free[len(free) // 2 :][:3]
    pieces: list[str] = []
    settings = GenerateSettings(max_new_tokens=40, temperature=0, stop=(stop,))
    done = generator.generate("def ", settings, on_text=pieces.append)
    assert done.text == free[: free.index(stop)]
    assert "".join(pieces) == done.text
    assert done.finish == "stop"
    assert done.tokens < 40


@given(text=st.text(max_size=60), stops=st.lists(st.text(min_size=1, max_size=4), max_size=3), data=st.data())
def test_a_stream_is_the_text_up_to_the_first_stop_however_it_arrives(tokenizer, text, stops, data):
    if text and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + 3])
    pieces: list[str] = []
    stream = TextStream(tokenizer, stops, pieces.append)
    for token in tokenizer.encode(text):
        if stream.stopped:
            break
        stream.feed(token)
    stream.close()
    ends = [text.index(stop) for stop in stops if stop in text]
    assert "".join(pieces) == stream.text
    if not stream.stopped:
        assert not ends
        assert stream.text == text
    else:
        # Of two stops, the one that is complete first wins; what was shown by then stays.
        assert stream.text in {text[:end] for end in ends}


def test_a_character_of_several_tokens_is_shown_whole(tokenizer):
    text = "naïve 漢字 🙂 end"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # bytes, because the little vocabulary knows none of these
    pieces: list[str] = []
    stream = TextStream(tokenizer, (), pieces.append)
    for token in ids:
        stream.feed(token)
    stream.close()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_chat_prompt_is_the_chat_templates(generator, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is <|end|>?"}]
    expected, _ = encode_chat(tokenizer, messages, generation_prompt=True)
    assert generator.prompt_ids("What is <|end|>?", chat=True, system="Be brief.") == expected
    assert generator.prompt_ids("x")[0] == tokenizer.bos_id


def test_a_prompt_that_leaves_no_room_is_refused(generator):
    with pytest.raises(Refusal, match="Shorten the prompt"):
        generator.generate("word " * 400, GenerateSettings())


def test_a_completion_stays_inside_the_models_context(generator):
    done = generator.generate("a", GenerateSettings(max_new_tokens=10_000, temperature=1.0))
    assert done.tokens + len(generator.prompt_ids("a")) <= generator.model.config.max_seq_len


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"stop": ("",)}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(Refusal, match=next(iter(wrong))):
        GenerateSettings(**wrong)


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory):
    """A folder with weights and tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    for part in (small_run["pretrain"].path / "model", small_run["tokenizer"].path):
        shutil.copytree(part, folder, dirs_exist_ok=True)
    return folder


def leaves_with(words: list[str]) -> int | str | None:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code


@pytest.mark.parametrize("kind", ["int8", "int4", "int8_dynamic"])
def test_the_command_writes_with_quantized_weights_and_says_so(exported, capsys, kind):
    ask = ["generate", "--from", str(exported), "--prompt", "def ", "--max-tokens", "8", "--temperature", "0"]
    assert leaves_with([*ask, "--quantize", kind]) == 0
    written, said = capsys.readouterr()
    [line] = [line for line in said.splitlines() if line.startswith(f"[{kind}: ")]
    now, before = (float(number) for number in re.findall(r"([0-9.]+) MB", line))
    assert now < 0.9 * before
    generator = TextGenerator.open(exported)
    generator.quantize(kind)
    done = generator.generate("def ", GenerateSettings(max_new_tokens=8, temperature=0))
    assert written == f"def {done.text}\n"
    assert sum(isinstance(part, QuantizedLinear) for part in generator.model.modules()) == int(line.split()[1])


def test_bytes_of_a_prompt_that_are_not_utf8_are_replaced_and_counted(exported, capsys):
    assert leaves_with(["generate", "--from", str(exported), "--prompt", "d\udcff\udcfe", "--max-tokens", "1"]) == 0
    written, said = capsys.readouterr()
    assert written.startswith("d\ufffd\ufffd")
    assert "[a prompt is not UTF-8 throughout: U+FFFD stands for 2 of its bytes]" in said


def test_a_quantization_that_no_map_fits_is_refused(exported, monkeypatch, capsys):
    monkeypatch.setattr("model.adapt.quantize.GROUP", 7919)
    ask = ["generate", "--from", str(exported), "--prompt", "def ", "--quantize", "int4"]
    assert leaves_with(ask) == 2
    written, said = capsys.readouterr()
    assert "no map of the blocks fits it" in said
    assert not written
