"""`objective=NAME` through the command line: encoders and encoder-decoders, from text to what transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.graph import build
from pipelines.settings.compose import compose
from tests.conftest import LOCAL, ROOT, answer, athanor, complaint, tiny
from tests.test_start import digests

SMALL = ("d_model=64", "n_layers=2", "max_seq_len=128", "mixer.n_heads=4", "ffn.d_ff=128")
BERT = ("objective=masked_token", "model=bert-base", *(f"model.{word}" for word in SMALL))
ROBERTA = ("objective=masked_token", "model=roberta-base", *(f"model.{word}" for word in SMALL))
T5 = (
    "objective=span_denoising",
    "model=t5-small",
    *(f"model.{side}{word}" for side in ("", "encoder.") for word in (*SMALL, "mixer.head_dim=null")),
)
BART = (
    "objective=text_infilling",
    "model=bart-base",
    *(f"model.{side}{word}" for side in ("", "encoder.") for word in SMALL),
)
ARCHITECTURES = {
    BERT: "BertForMaskedLM",
    ROBERTA: "RobertaForMaskedLM",
    T5: "T5ForConditionalGeneration",
    BART: "BartForConditionalGeneration",
}
NAMES = ["BERT", "RoBERTa", "T5", "BART"]


def words(corpus_dir: Path, store: Path, *more: str) -> list[str]:
    pretraining = [word for word in tiny(corpus_dir, store) if not word.startswith("finetune")]
    enough_for_intervals = ("corpus.held_out.fraction=0.35", "evaluate.max_bytes=100000")
    return [*pretraining, *enough_for_intervals, "optim=adamw", "optim.lr=3e-3", *more]


@pytest.mark.parametrize("family", list(ARCHITECTURES), ids=NAMES)
def test_the_tokenizer_gets_the_pieces_its_objective_needs(corpus_dir: Path, family: tuple[str, ...]) -> None:
    settings = compose(words(corpus_dir, Path("runs"), *family))
    pieces = settings.resolved_tokenizer().more_control_pieces
    assert ("<mask>" in pieces) == (family is not T5)
    assert (len(pieces), pieces[-1:]) == (100, ("<extra_id_0>",)) if family is T5 else (1, ("<mask>",))
    steps = build(settings)
    assert steps["tokenizer"].settings == settings.resolved_tokenizer()
    assert steps["pretrain"].settings.objective == settings.objective


def test_an_objective_moves_the_pretraining_and_what_it_hides_with_the_tokenizer(corpus_dir: Path) -> None:
    def moved(*more: str) -> set[str]:
        one, other = (digests(*words(corpus_dir, Path("runs"), *family)) for family in (BERT, (*BERT, *more)))
        return {name for name in one if one[name] != other[name]}

    follow = {"pretrain", "evaluate", "export", "report"}
    assert moved("objective.rate=0.3") == moved("objective.dynamic=false") == follow
    assert moved("tokenizer.mask_piece=true") == set()
    assert moved("tokenizer.sentinel_pieces=4") == follow | {"tokenizer", "shards"}


def test_what_does_not_suit_is_refused_with_the_remedy(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    def said(*more: str) -> str:
        return complaint(capsys, "run", *words(corpus_dir, tmp_path / "store", LOCAL, *more))

    assert "Set objective=next_token, or choose a model that is an encoder" in said("objective=masked_token")
    assert "Set objective=masked_token, or choose a model that is a causal" in said(*BERT, "objective=next_token")
    assert "such as model=t5-small" in said(*BERT, "objective=text_infilling")
    assert "Set finetune=none" in said(*BERT, "finetune=library")
    assert "tokenizer.sentinel_pieces=3" in said(*T5, "tokenizer.sentinel_pieces=2")
    assert "Set tokenizer.vocab_size=512" in said(*T5, "tokenizer.vocab_size=384", "tokenizer.sentinel_pieces=50")
    assert "objective.rate = 1.5: a share between 0 and 1" in said(*BERT, "objective.rate=1.5")
    assert "objective.KEY or objective=NAME" in said("pretrain.objective.kind=masked_token")
    assert "Did you mean objective=masked_token" in said("objective=masked")
    assert not (tmp_path / "store").exists()


def test_a_plan_tells_what_denoising_costs(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    for family in (BERT, T5):
        planned = json.loads(answer(capsys, "plan", *words(corpus_dir, tmp_path, *family), "--json").out)
        assert planned["costs"]["flops_per_token"] > 0


def metrics(store: Path) -> list[dict[str, Any]]:
    [path] = store.glob("pretrain/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def shards(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the corpus that all families read, and tokenizer and shards for those that hide with `<mask>`."""
    store = tmp_path_factory.mktemp("shards")
    athanor("run", *words(corpus_dir, store, LOCAL, *BERT), "--until", "shards")
    return store


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in (BERT, T5) else pytest.mark.prove) for family in ARCHITECTURES],
    ids=NAMES,
)
def test_a_tiny_model_goes_from_text_to_a_folder_that_transformers_loads(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, shards: Path, tmp_path: Path, family: tuple[str, ...]
) -> None:
    import transformers

    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    overrides = words(corpus_dir, tmp_path, LOCAL, *family, "pretrain.total_tokens=61440", "zero=1")
    said = athanor("run", *overrides)
    losses = [record["loss"] for record in metrics(tmp_path)]
    assert sum(losses[-5:]) / 5 < sum(losses[:3]) / 3 - 0.5
    [scores] = [json.loads(path.read_text()) for path in tmp_path.glob("evaluate/*/results.json")]
    assert scores["hidden_token_loss"]["low"] < scores["hidden_token_loss"]["value"] < losses[0]
    assert 0 < scores["hidden_token_accuracy"]["value"] < 1
    assert "hidden tokens" in said.stdout and "athanor generate" not in said.stdout
    [folder] = tmp_path.glob("export/*/model")
    report = json.loads((folder.parent / "conformance.json").read_text())
    assert report["max_logit_error"] <= report["tolerance"]
    assert ("greedy_continuations" in report) == (family in (T5, BART))
    model = getattr(transformers, ARCHITECTURES[family]).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    hides = "<extra_id_0>" if family is T5 else tokenizer.mask_token
    ids = tokenizer(f"import {hides}\n", return_tensors="pt")
    assert tokenizer.convert_tokens_to_ids(hides) in ids["input_ids"][0].tolist()
    if family in (T5, BART):
        assert model.config.decoder_start_token_id == (0 if family is T5 else 3)
        assert model.generate(**ids, max_new_tokens=4).shape[0] == 1
    else:
        assert model(**ids).logits.shape[-1] == 512
    [html] = [path.read_text() for path in tmp_path.glob("report/*/report.html")]
    assert "loss of a hidden token" in html
    assert "continues no prompt" in complaint(capsys, "generate", *overrides, "--prompt", "import")


@pytest.mark.slow
def test_hidden_tokens_are_the_same_on_two_ranks(corpus_dir: Path, shards: Path, tmp_path: Path) -> None:
    one, two = (shutil.copytree(shards, tmp_path / name) for name in ("one", "two"))
    athanor("run", *words(corpus_dir, one, LOCAL, *BERT), "--until", "pretrain")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipelines"]
    subprocess.run(
        [*launch, "train", *words(corpus_dir, two, LOCAL, *BERT)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
    )
    alone, shared = metrics(one), metrics(two)
    assert [row["batch_digest"] for row in alone] == [row["batch_digest"] for row in shared]
    assert max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(alone, shared, strict=True)) < 2e-2


@pytest.mark.slow
def test_hidden_spans_are_the_same_after_a_kill_and_on_two_ranks(
    corpus_dir: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    said = athanor("certify", "resume", *words(corpus_dir, tmp_path, LOCAL, *T5)).stdout
    assert said.count("holds ") == 2, said
