"""Claims about the export: transformers gives the same tokens, logits and continuations, and a fault is noticed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.refusal import Refusal
from data.tokenizers.sentencepiece import Tokenizer
from pipelines.inference.weights import load_model
from pipelines.stages import export
from tests.data.foreign import save
from tests.stages.grouping import by_kind


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory, in_process):
    """(metrics, folder) of the fine-tuned model's export."""
    out_dir = tmp_path_factory.mktemp("export")
    return export.run(export.ExportSettings(), by_kind(small_run), out_dir, in_process(out_dir)), out_dir / "model"


def test_transformers_computes_the_same_with_the_exported_folder(exported):
    metrics, _ = exported
    assert metrics["exported"] == "finetune"
    assert metrics["max_logit_error"] <= metrics["tolerance"] < 1e-3
    assert metrics["argmax_agreement"] > 0.999
    assert metrics["greedy_continuations"] == 4
    assert metrics["compared_tokens"] > 1000


def test_the_folder_holds_what_other_tools_look_for(exported):
    _, folder = exported
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"} <= names
    assert {"tokenizer_config.json", "chat_template.jinja", "README.md"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 3)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [3, 7]


def test_the_export_is_also_a_model_and_a_tokenizer_of_ours(exported, small_run):
    _, folder = exported
    tokens_BT = torch.tensor([Tokenizer.load(folder).encode("def main():\n    pass\n")])
    assert tokens_BT.tolist() == [Tokenizer.load(small_run["tokenizer"].path).encode("def main():\n    pass\n")]
    ours = load_model(small_run["finetune"].path / "model")(tokens_BT)["logits"]
    assert torch.equal(load_model(folder)(tokens_BT)["logits"], ours)


def test_bf16_weights_are_compared_as_rounded(small_run, tmp_path, in_process):
    settings = export.ExportSettings(precision="bf16", weights="pretrain", sample_documents=1, generated_tokens=4)
    metrics = export.run(settings, by_kind(small_run), tmp_path, in_process(tmp_path))
    assert metrics["max_logit_error"] <= metrics["tolerance"]
    assert load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_chat_template_that_writes_the_date_is_compared_on_one_day(tmp_path):
    from transformers import AutoTokenizer

    from pipelines.stages.conformance import check_tokens

    texts = [Path(argparse.__file__).read_text()[:40_000]]
    folder = save("qwen", texts, tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text("{{ '<|im_start|>' + strftime_now('%d %b %Y') + '<|im_end|>' }}" + template.read_text())
    ours = Tokenizer.load(folder)
    assert check_tokens(ours, AutoTokenizer.from_pretrained(folder), texts)["compared_conversations"] == 2
    template.write_text(template.read_text().replace("%b", "%m"))
    with pytest.raises(Refusal, match=r"chat template's tokens part"):
        check_tokens(ours, AutoTokenizer.from_pretrained(folder), texts)


def test_a_corpus_that_spells_control_pieces_is_text_in_the_check(small_run, exported):
    from transformers import AutoTokenizer

    from pipelines.stages.conformance import check_tokens

    ours = Tokenizer.load(small_run["tokenizer"].path)
    theirs = AutoTokenizer.from_pretrained(exported[1], local_files_only=True)
    texts = [" = Robert <unk> = \n <unk> </s><|end|> \n" * 20, ">knu< >s< <s>"]
    assert check_tokens(ours, theirs, texts)["compared_conversations"] == 2
    theirs.chat_template = ours.chat_template  # as it is here, where messages are protected otherwise
    with pytest.raises(Refusal, match="chat template's tokens part"):
        check_tokens(ours, theirs, texts)


def test_a_foreign_tokenizer_is_compared_on_text_that_spells_its_control_pieces(tmp_path):
    from transformers import AutoTokenizer

    from pipelines.stages.conformance import check_tokens

    folder = save("llama2", [Path(argparse.__file__).read_text()[:40_000]], tmp_path)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("a <unk> b " * 9, "<<s>s> " * 9, ">s< >knu<" * 9):
        assert check_tokens(ours, theirs, [text])["compared_conversations"] == 2


@pytest.mark.parametrize("fault", ["epsilon", "rope", "weight"])
def test_a_faulty_export_is_refused(small_run, exported, tmp_path, fault):
    folder = tmp_path / "model"
    settings = export.ExportSettings(sample_documents=1)
    export.write_model(settings, small_run["finetune"], small_run["tokenizer"], folder)
    config = json.loads((folder / "config.json").read_text())
    if fault == "epsilon":
        config["rms_norm_eps"] = 1e-6
    elif fault == "rope":
        config["rope_theta"] = 20000.0
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 20000.0}
    else:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].flip(0)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="does not compute what was trained"):
        export.compare(settings, small_run["finetune"], small_run["tokenizer"], [small_run["corpus"]], folder)


def test_a_faulty_tokenizer_is_refused(small_run, exported, tmp_path):
    settings = export.ExportSettings(sample_documents=1)
    export.write_model(settings, small_run["finetune"], small_run["tokenizer"], tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][100:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(Refusal, match="tokenizer differs"):
        export.compare(settings, small_run["finetune"], small_run["tokenizer"], [small_run["corpus"]], tmp_path)


def test_asking_for_weights_that_the_experiment_lacks_says_so(small_run, tmp_path, in_process):
    inputs = {name: artifact for name, artifact in small_run.items() if name != "finetune"}
    with pytest.raises(Refusal, match="no such step"):
        export.run(export.ExportSettings(weights="finetune"), by_kind(inputs), tmp_path, in_process(tmp_path))
