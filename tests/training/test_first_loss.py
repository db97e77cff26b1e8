"""Training begins with a folder of weights from outside: the first loss is what transformers computes with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conf.refusal import Refusal
from conf.typed import from_plain, to_plain
from data.loader import Loader, order_over
from data.rows.shard_set import ShardSet
from data.tasks.denoising import AnyObjective, MaskedToken
from model.interop import checkpoint_files
from pipelines.engine.step import Inputs
from pipelines.stages.start import Start, run
from pipelines.stages.train import TrainingSettings, job
from pipelines.training.job import run_rank
from pipelines.training.metrics import read_metrics
from pipelines.training.settings import TrainSettings
from tests.stages.conftest import InProcess, artifact, save_model
from tests.training.conftest import ROWS_PER_STEP, SEQ_LEN, VOCAB_SIZE, make_job

transformers.utils.logging.disable_progress_bar()

GPT2 = transformers.GPT2Config(
    vocab_size=VOCAB_SIZE,
    n_embd=24,
    n_layer=2,
    n_head=2,
    n_positions=SEQ_LEN,
    resid_pdrop=0,
    embd_pdrop=0,
    attn_pdrop=0,
)
LLAMA = transformers.LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=24,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=SEQ_LEN,
)


def saved(config: Any, folder: Path, **more: Any) -> Any:
    """A tiny model of transformers, with weights large enough to have opinions, and its folder."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(folder, **more)
    return model


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_loss_is_that_of_transformers_under_every_zero_stage(
    shards: Path, tmp_path: Path, stage: int
) -> None:
    config = GPT2 if stage % 2 else LLAMA
    theirs = saved(config, tmp_path / "weights", max_shard_size="20kB" if stage > 1 else "1GB")
    begun = Start.open("pretrain.init_from", str(tmp_path / "weights"))
    figures = run(begun.settings, {}, tmp_path / "start", InProcess(tmp_path / "start"))
    assert figures["parameters"] == sum(weight.numel() for weight in theirs.parameters())
    train = make_job(shards, tmp_path / "out", steps=1, precision="fp32", zero={"stage": stage})["train"]
    settings = TrainingSettings(
        label="pretrain", model=begun.model(begun.config, SEQ_LEN), train=from_plain(TrainSettings, train, "train")
    )
    inputs = {"shards": artifact("shards", shards, {}), "start": artifact("start", tmp_path / "start", figures)}
    groups = {"rows": {"corpus": inputs["shards"]}, "begin": {"start": inputs["start"]}}
    run_rank(job(settings, Inputs(groups), tmp_path / "out"))
    [first] = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(expected_loss(theirs, shards), rel=1e-5)


def test_an_encoder_begins_with_the_loss_of_transformers_on_its_hidden_tokens(shards: Path, tmp_path: Path) -> None:
    bert = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=SEQ_LEN,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    torch.manual_seed(1)
    theirs = transformers.BertForMaskedLM(bert).eval()
    theirs.save_pretrained(tmp_path / "weights")
    begun = Start.open("pretrain.init_from", str(tmp_path / "weights"))
    objective = MaskedToken(mask_id=1, random_ids=(8, VOCAB_SIZE), kept_ids=(0, 2, 3), rate=0.3, seed=5)
    job = make_job(shards, tmp_path / "out", steps=1, precision="fp32")
    asked = {
        "shards": {"corpus": str(shards)},
        "init": str(begun.folder),
        "model": to_plain(begun.model(begun.config, SEQ_LEN)),
    }
    run_rank({**job, **asked, "objective": to_plain(objective)})
    [first] = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(expected_loss(theirs, shards, objective), rel=1e-5)


@torch.no_grad()
def expected_loss(theirs: Any, shards: Path, objective: AnyObjective | None = None) -> float:
    """Mean loss of the first batch, each document by itself."""
    sets = {"corpus": ShardSet.open(shards)}
    rows = {"rows_per_step": ROWS_PER_STEP, "micro_batch_rows": ROWS_PER_STEP}
    with Loader(sets, order=order_over(sets), objective=objective, **rows) as loader:
        [batch] = next(loader).micro_batches
    total, count = 0.0, 0
    for row in range(ROWS_PER_STEP):
        for document in batch["documents_BT"][row].unique():
            here = batch["documents_BT"][row] == document
            targets = batch["targets_BT"][row][here]
            logits = theirs(batch["tokens_BT"][row][here][None]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            count += int((targets != -100).sum())
    return total / count


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(LLAMA, tmp_path / "weights")
    file = tmp_path / "weights" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(5, 24)
    save_file(tensors, file)
    begun = Start.open("pretrain.init_from", str(tmp_path / "weights"))
    with pytest.raises(Refusal) as refused:
        run(begun.settings, {}, tmp_path / "start", InProcess(tmp_path / "start"))
    said = str(refused.value)
    assert "1 missing: model.norm.weight" in said and "1 not expected: model.extra" in said
    assert "model.layers.0.mlp.up_proj.weight (found [5, 24], expected [56, 24])" in said


def test_the_artifact_holds_the_folders_own_bytes_and_nothing_else(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "weights", max_shard_size="20kB")
    begun = Start.open("pretrain.init_from", str(tmp_path / "weights"))
    run(begun.settings, {}, tmp_path / "start", InProcess(tmp_path / "start"))
    taken = {path.name: path.read_bytes() for path in (tmp_path / "start" / "model").iterdir()}
    assert len(taken) > 3
    assert taken == {path.name: path.read_bytes() for path in checkpoint_files(tmp_path / "weights")}


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "weights", max_shard_size="20kB")
    index = tmp_path / "weights" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places["weight_map"], "../elsewhere.safetensors")}))
    with pytest.raises(Refusal, match="weight_map of names of files beside it"):
        Start.open("pretrain.init_from", str(tmp_path / "weights"))


def test_a_missing_shard_is_named_before_anything_runs(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "weights", max_shard_size="20kB")
    lost = min((tmp_path / "weights").glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(Refusal, match=f"{lost.name}: it does not exist"):
        Start.open("pretrain.init_from", str(tmp_path / "weights"))


def test_rotary_positions_go_further_and_learned_ones_end(tmp_path: Path) -> None:
    for config, name in ((LLAMA, "llama"), (GPT2, "gpt2")):
        saved(config, tmp_path / name)
    rotary, learned = (Start.open("pretrain.init_from", str(tmp_path / name)) for name in ("llama", "gpt2"))
    assert rotary.model(rotary.config, 2 * SEQ_LEN).max_seq_len == 2 * SEQ_LEN
    assert learned.model(learned.config, SEQ_LEN // 2).max_seq_len == SEQ_LEN
    with pytest.raises(Refusal, match=f"Use shards.seq_len={SEQ_LEN}"):
        learned.model(learned.config, 2 * SEQ_LEN)


def test_a_model_chosen_by_hand_agrees_or_is_refused_with_both_values(tmp_path: Path) -> None:
    save_model(tmp_path / "tiny", seed=0, vocab_size=VOCAB_SIZE)
    begun = Start.open("pretrain.init_from", str(tmp_path / "tiny"))
    preset = ["d_model", "n_layers", "mixer.n_heads", "mixer.n_kv_heads", "ffn.d_ff", "norm.eps", "init.std", "dropout"]
    begun.check_model(begun.config, preset)
    begun.check_model(replace(begun.config, vocab_size=None, dropout=0.1), ["vocab_size", *preset])
    wider = replace(begun.config, d_model=48)
    begun.check_model(wider, ["n_layers"])  # what nobody chose is the folder's
    with pytest.raises(Refusal, match=r"model.d_model = 48: pretrain.init_from=.* has 64"):
        begun.check_model(wider, ["n_layers", "d_model"])
