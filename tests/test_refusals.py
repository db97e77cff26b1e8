"""Whatever a later step would refuse is refused by `plan` and before anything runs; folders of weights that cannot be."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.refusal import Refusal
from model.interop import load_imported, load_pretrained, read_config
from tests.conftest import LOCAL, answer, complaint, tiny
from tests.data.foreign import save
from tests.test_start import with_weights

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 96,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
ODD: tuple[Any, ...] = ("64", -1, 0, 1.5, [1], {"a": 1}, True, float("nan"), 10**30)


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    "preset", ["vit-base", "whisper-small", "clip-base", "wav2vec2-base", "wav2vec2-base-pretraining", "dalle-12b"]
)
def test_models_that_read_no_text_are_refused_at_once_whatever_the_objective(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path, preset: str, verb: str
) -> None:
    words = [word for word in tiny(corpus_dir, tmp_path, LOCAL) if not word.startswith(("model", "finetune"))]
    for objective in ("next_token", "masked_token", "span_denoising"):
        said = complaint(capsys, verb, *words, "optim=adamw", f"model={preset}", f"objective={objective}")
        assert "the rows that are trained on here are text. Choose a model of text" in said
    assert not list(tmp_path.iterdir())


def test_the_models_that_are_advised_can_be_trained_on_text(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path
) -> None:
    said = complaint(capsys, "plan", "experiment=text", "model=clip-base")
    choices = said.partition("Choose a model of text: ")[2].strip().removesuffix(".").split(", or ")
    assert len(choices) == 3
    for choice in choices:
        answer(capsys, "plan", "experiment=text", f"corpus.paths=[{corpus_dir}]", *choice.split())


def test_weights_that_there_will_not_be_are_not_exported(capsys: pytest.CaptureFixture[str], corpus_dir: Path) -> None:
    words = ["plan", "experiment=text", f"corpus.paths=[{corpus_dir}]", "export.weights=finetune"]
    assert "Set export.weights=last, or add fine-tuning with finetune=library." in complaint(capsys, *words)
    answer(capsys, *words, "finetune=library")


@pytest.mark.slow
def test_a_tokenizer_that_transformers_reads_otherwise_is_refused_before_training_and_the_remedy_works(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    """A Qwen2 folder: transformers 5 builds Qwen2's own pre-tokenizer, whatever tokenizer.json says."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path / "qwen"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=720, num_key_value_heads=4, max_position_embeddings=128, **sizes)
    ).save_pretrained(folder)
    save("qwen", [path.read_text() for path in sorted(corpus_dir.glob("*.py"))], folder)
    words = with_weights(corpus_dir, folder, f"store={tmp_path / 'store'}", LOCAL)
    for verb in ("plan", "run"):
        said = complaint(capsys, verb, *words)
        assert "the exported tokenizer differs" in said and "Qwen2Tokenizer reads it otherwise" in said
    assert not list((tmp_path / "store").glob("[a-z]*"))
    command = shlex.split(said.partition("reads: run ")[2].partition(" in the folder")[0])
    subprocess.run([sys.executable, *command[1:]], cwd=folder, check=True, capture_output=True)
    answer(capsys, "plan", *words)


@pytest.mark.parametrize("key", [key for key in LLAMA if key != "model_type"])
def test_odd_values_of_a_config_json_are_one_sentence(tmp_path: Path, key: str) -> None:
    for value in (*ODD, None):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, key: value}))
        with contextlib.suppress(Refusal):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": "64"}))
    with pytest.raises(Refusal, match=r"config\.json: it has hidden_size='64', and it has to be a whole number"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[]", "\ufeff{}"]
)
def test_a_config_json_that_is_no_configuration_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Refusal, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("num_hidden_layers", "n_layers"),
        ("hidden_size", "d_model"),
        ("vocab_size", "vocab_size"),
        ("intermediate_size", "d_ff"),
    ],
)
def test_sizes_that_cannot_be_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, ours: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, key: 10**13}))
    began = time.monotonic()
    with pytest.raises(Refusal, match=rf"{ours} = {10**13}: no model is that large\. At most"):
        read_config(tmp_path)
    path = f"model.ffn.{ours}" if ours == "d_ff" else f"model.{ours}"
    assert "no model is that large" in complaint(capsys, "plan", "experiment=text", f"{path}={10**13}")
    assert time.monotonic() - began < 5


def test_a_head_that_a_headless_encoder_lacks_begins_anew_and_what_is_left_is_named(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

    from pipelines.stages.start import take

    made = (
        BertModel(BertConfig(**SMALL)),
        RobertaModel(RobertaConfig(**SMALL, pad_token_id=1)),
        LlamaModel(LlamaConfig(**SMALL)),
    )
    for model in made:
        folder, out = tmp_path / type(model).__name__, tmp_path / f"{type(model).__name__}-taken"
        model.save_pretrained(folder)
        with pytest.raises(Refusal, match="missing"):
            load_pretrained(folder)
        told = take(str(folder), out)
        assert told["new_head"] and all("head" in name or "cls." in name for name in told["new_head"])
        assert {name for name in told["left"] if "pooler" in name} == {
            name for name in model.state_dict() if "pooler" in name
        }
        _, state = load_pretrained(out)
        again = load_imported(folder, head_seed=0)
        assert all(torch.equal(tensor, again.state[name]) for name, tensor in state.items())
        assert "pad_token_id" in json.loads((out / "config.json").read_text())


def test_a_model_that_lacks_more_than_its_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=r"bert\.encoder\.layer\.0\.output\.dense\.weight"):
        load_imported(tmp_path, head_seed=0)
