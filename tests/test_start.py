"""`init_from=DIR` through the command line: what moves, what is refused, and whole runs from a folder of weights."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from conf.refusal import Refusal
from data.tokenizers.sentencepiece import tokenizer_files
from data.tokenizers.training import TokenizerSettings, train_tokenizer
from pipelines.engine.backends.local_backend import LocalBackend
from pipelines.engine.files import FileHashes
from pipelines.engine.resolve import resolve
from pipelines.engine.runner import run
from pipelines.engine.step import Step
from pipelines.engine.store.lineage import origin
from pipelines.engine.store.open import open_store
from pipelines.graph import build
from pipelines.settings.compose import compose
from pipelines.stages.start import take
from tests.conftest import LOCAL, answer, athanor, complaint, tiny
from tests.data.foreign import save
from tests.stages.conftest import save_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of 512 pieces, as a Hugging Face folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_model(folder, seed=3, vocab_size=512)
    return folder


def digests(*overrides: str) -> dict[str, str]:
    hashes = FileHashes(Path(tempfile.mkdtemp()) / "hashes.json")
    return {node.name: node.digest for node in resolve(list(build(compose(overrides)).values()), hashes).nodes}


def with_weights(corpus_dir: Path, folder: Path, *more: str) -> list[str]:
    words = tiny(corpus_dir, Path("runs"), f"pretrain.init_from={folder}", *more)
    return [word for word in words if word != "model=tiny"]


def test_one_byte_of_the_weights_moves_what_begins_with_them_and_what_follows(
    corpus_dir: Path, weights: Path, tmp_path: Path
) -> None:
    before = digests(*with_weights(corpus_dir, weights))
    moved = shutil.copytree(weights, tmp_path / "elsewhere")
    assert digests(*with_weights(corpus_dir, moved)) == before
    file = moved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = digests(*with_weights(corpus_dir, moved))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"start", "pretrain", "finetune", "evaluate", "export", "report"}


def test_without_a_folder_nothing_of_it_is_in_the_graph(corpus_dir: Path, tmp_path: Path) -> None:
    assert "start" not in digests(*tiny(corpus_dir, tmp_path))


def test_fine_tuning_of_a_folder_pretrains_nothing(corpus_dir: Path, weights: Path, tmp_path: Path) -> None:
    words = [word for word in tiny(corpus_dir, tmp_path, f"finetune.init_from={weights}") if word != "model=tiny"]
    steps = build(compose(words))
    assert "pretrain" not in steps
    assert steps["finetune"].sources["pretrain"] is steps["evaluate"].sources["pretrain"] is steps["start"]


def test_mistakes_are_told_with_the_value_and_the_remedy(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, weights: Path, tmp_path: Path
) -> None:
    def said(folder: Path, *more: str) -> str:
        return complaint(capsys, "run", *with_weights(corpus_dir, folder, f"store={tmp_path / 'store'}", LOCAL, *more))

    assert "no such folder" in said(tmp_path / "none")
    empty, pickled = tmp_path / "empty", tmp_path / "pickled"
    for folder in (empty, pickled):
        folder.mkdir()
    assert f"{empty / 'config.json'}: it does not exist" in said(empty)
    shutil.copy(weights / "config.json", pickled / "config.json")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    assert "only pytorch_model.bin" in said(pickled)
    assert "model.d_model = 96: pretrain.init_from" in said(weights, "model.d_model=96")
    assert "has 64" in said(weights, "model=demo")
    assert "Set tokenizer.vocab_size=512" in said(weights, "tokenizer.vocab_size=640")
    assert "Set one of the two" in said(weights, f"finetune.init_from={weights}")
    pictures = tmp_path / "pictures"
    shutil.copytree(weights, pictures)
    vit = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_labels": 3}
    (pictures / "config.json").write_text(json.dumps(vit))
    assert "reads no text" in said(pictures)
    assert not (tmp_path / "store").exists()


def test_a_folder_with_another_tokenizer_than_its_model_is_refused(
    capsys: pytest.CaptureFixture[str], weights: Path, small_tokenizer: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(weights, tmp_path / "both")
    for file in small_tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    said = complaint(capsys, "plan", *with_weights(corpus_dir, folder))
    assert "its tokenizer has 640 pieces and its model vocab_size 512" in said


@pytest.fixture(scope="module")
def small_tokenizer(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 640 pieces."""
    from data.tokenizers.training import TokenizerSettings, train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [path.read_text() for path in corpus_dir.glob("json-*.py")]
    train_tokenizer(texts, TokenizerSettings(vocab_size=640), folder)
    return folder


def foreign_folder(kind: str, corpus_dir: Path, folder: Path, rows: int = 720) -> Path:
    """A tiny random model of transformers' own class and a tokenizer of its kind, as they are saved."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        ends = {"bos_token_id": None, "eos_token_id": None}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=64, n_layer=2, n_head=4, n_positions=128, **ends))
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, max_position_embeddings=128, **sizes))
    model.save_pretrained(folder)
    return save(kind, [path.read_text() for path in sorted(corpus_dir.glob("*.py"))], folder)


def test_a_folders_own_tokenizer_is_taken_and_its_bytes_decide(corpus_dir: Path, tmp_path: Path) -> None:
    folder = foreign_folder("gpt2", corpus_dir, tmp_path / "gpt2")
    steps = build(compose(with_weights(corpus_dir, folder)))  # tokenizer.vocab_size=512 of the settings plays no part
    assert {path.name for path in steps["tokenizer"].files["tokenizer"]} == {"tokenizer.json", "tokenizer_config.json"}
    before = digests(*with_weights(corpus_dir, folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert digests(*with_weights(corpus_dir, moved)) == before
    file = moved / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    after = digests(*with_weights(corpus_dir, moved))
    assert {name for name in before if before[name] != after[name]} == set(before) - {"corpus", "start"}


def test_a_tokenizer_that_cannot_be_read_is_told_and_not_replaced(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    folder = foreign_folder("gpt2", corpus_dir, tmp_path / "gpt2", rows=640)
    said = complaint(capsys, "plan", *with_weights(corpus_dir, folder))
    assert "its tokenizer has 701 pieces and its model vocab_size 640" in said
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text("")
    said = complaint(capsys, "plan", *with_weights(corpus_dir, folder))
    assert "transformers makes one of the files there are: python -c" in said


@pytest.mark.slow
def test_weights_with_their_own_tokenizer_are_trained_tuned_scored_and_exported(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    gpt2, llama = (foreign_folder(kind, corpus_dir, tmp_path / kind) for kind in ("gpt2", "llama3"))
    words = [word for word in tiny(corpus_dir, tmp_path / "store", LOCAL) if word != "model=tiny"]
    further = [*(word for word in words if not word.startswith("finetune")), f"pretrain.init_from={gpt2}"]
    tuned = [*words, f"finetune.init_from={llama}"]
    for step, command, folder in (("pretrain", further, gpt2), ("finetune", tuned, llama)):
        assert "the tokenizer is that of" in athanor("run", *command).stderr
        [losses] = (tmp_path / "store").glob(f"{step}/*/metrics.jsonl")
        first, *_, last = (json.loads(line)["loss"] for line in losses.read_text().splitlines())
        assert last < first
        proofs = (tmp_path / "store").glob("export/*/conformance.json")
        proof = max(proofs, key=lambda path: path.stat().st_mtime)
        report = json.loads(proof.read_text())
        assert report["compared_conversations"] == 2 and report["compared_tokens"] > 1000
        assert report["max_logit_error"] <= report["tolerance"]
        exported = proof.parent / "model"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (exported / name).read_bytes() == (folder / name).read_bytes()
        was, now = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, exported))
        text = "import json\n\n\tprint('naïve <|endoftext|> 漢字 😀')"
        assert now(text)["input_ids"] == was(text)["input_ids"]
        model = transformers.AutoModelForCausalLM.from_pretrained(exported)
        model.generate(**now(text, return_tensors="pt"), max_new_tokens=3)
        for chat in ([], ["--chat"]):
            answer(capsys, "generate", *command, "--prompt", "import", "--max-tokens", "4", *chat)
    scores = [json.loads(path.read_text())["scores"] for path in (tmp_path / "store").glob("evaluate/*/results.json")]
    assert sorted(("base" in score) + ("finetuned" in score) for score in scores) == [1, 2]
    assert re.search("(json|asyncio|email)-.*py", answer(capsys, "trace", *further, "--step", "1").out)


@pytest.mark.slow
def test_an_exported_model_is_trained_further_and_tuned_without_pretraining(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    first = tiny(corpus_dir, tmp_path / "first", LOCAL, "finetune=none")
    athanor("run", *first, "--until", "export")
    [exported] = (tmp_path / "first").glob("export/*/model")
    words = [word for word in tiny(corpus_dir, tmp_path / "second", LOCAL) if word != "model=tiny"]

    further = athanor("run", *words, f"pretrain.init_from={exported}", "--until", "pretrain")
    assert "the tokenizer is that of" in further.stderr
    begins = {}
    for name in ("first", "second"):
        [path] = (tmp_path / name).glob("pretrain/*/metrics.jsonl")
        begins[name] = json.loads(path.read_text().splitlines()[0])["loss"]
    assert begins["second"] < begins["first"] - 0.5  # it goes on where the first ended
    [taken] = (tmp_path / "second").glob("tokenizer/*/tokenizer.model")
    assert taken.read_bytes() == (exported / "tokenizer.model").read_bytes()

    tuned = athanor("run", *words, f"finetune.init_from={exported}", "--until", "evaluate")
    assert re.search("^finetune +made", tuned.stdout, re.MULTILINE) and "\npretrain" not in tuned.stdout
    [start] = {path.parent for path in (tmp_path / "second").glob("start/*/model")}
    [results] = (tmp_path / "second").glob("evaluate/*/results.json")
    assert {"base", "finetuned"} <= set(json.loads(results.read_text())["scores"])
    assert (start / "manifest.json").exists()

    # Conversations alone are enough: no corpus, so those that are held out are all that is scored.
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f"{n}!"}) + "\n" for n in range(60)))
    alone = [
        *(word for word in words if not word.startswith(("corpus.", "finetune=", "finetune.data"))),
        *("finetune=chat", f"finetune.data.paths=[{chats}]", f"finetune.init_from={exported}"),
    ]
    said = athanor("run", *alone).stdout
    assert re.search("^export +made", said, re.MULTILINE) and re.search(
        "^evaluate +made.* answers ", said, re.MULTILINE
    )
    results = max((tmp_path / "second").glob("evaluate/*/results.json"), key=lambda path: path.stat().st_mtime)
    scored = json.loads(results.read_text())
    assert scored["scores"] == {} and set(scored["conversations"]["scores"]) == {"base", "finetuned"}
    answer(capsys, "generate", *alone, "--chat", "--prompt", "Say 3.", "--max-tokens", "4")


@pytest.mark.slow
def test_tensors_that_do_not_fit_are_listed_through_the_command_line(
    corpus_dir: Path, weights: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = shutil.copytree(weights, tmp_path / "broken")
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "model.norm.weight"}  # noqa: SIM118
    save_file(tensors, folder / "model.safetensors")
    words = with_weights(corpus_dir, folder, f"store={tmp_path / 'store'}", LOCAL)
    refused = athanor("run", *words, "--until", "pretrain", check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "1 missing: model.norm.weight" in refused.stderr


def of_ours(corpus_dir: Path, weights: Path, store: Path) -> dict[str, Path]:
    """Artifacts as a run leaves them: a tokenizer, and a model that was trained with it."""

    def train(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        shutil.copytree(weights, out_dir / "model")
        return {}

    def words(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        texts = (path.read_text() for path in sorted(corpus_dir.iterdir()))
        return train_tokenizer(texts, TokenizerSettings(vocab_size=512), out_dir)

    tokenizer = Step(name="tokenizer", kind="tokenizer", run=words, version=1, settings={})
    pretrain = Step(
        name="pretrain", kind="model", run=train, version=1, settings={}, inputs={"tokenizer": {"tokenizer": tokenizer}}
    )
    reports = run([pretrain], store=open_store(store), backend=LocalBackend(cpus=1, gpus=0, in_process=True))
    return {report.name: Path(str(report.path)) for report in reports}


def test_an_artifact_of_ours_brings_its_tokenizer_by_lineage(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, weights: Path, tmp_path: Path
) -> None:
    made = of_ours(corpus_dir, weights, tmp_path / "store")
    pretrained, tokenizer = made["pretrain"], made["tokenizer"]
    by_hand = shutil.copytree(pretrained / "model", tmp_path / "by-hand")
    for file in tokenizer_files(tokenizer):
        shutil.copy(file, by_hand)
    expected = digests(*with_weights(corpus_dir, by_hand))
    assert expected != digests(*with_weights(corpus_dir, weights))  # where one would be trained
    (tokenizer / "tokenizer.json").write_text("{}")  # no part of the artifact
    assert digests(*with_weights(corpus_dir, pretrained)) == expected
    found = origin(pretrained / "model")
    assert found is not None and found.model == pretrained / "model"
    tokenizer.rename(tokenizer.with_name("moved"))
    said = complaint(capsys, "plan", *with_weights(corpus_dir, pretrained))
    assert f"its tokenizer is {tokenizer}, which is not there" in said
    moved = origin(shutil.copytree(pretrained, tmp_path / "cp" / "of" / "it"))  # without the store around it
    assert moved is not None
    with pytest.raises(Refusal, match="which is not there"):
        moved.tokenizer("pretrain.init_from")
    manifest = pretrained / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"token": 1', '"token": 2'))
    with pytest.raises(Refusal, match="was changed after it was published"):
        origin(pretrained)


def test_weights_of_our_artifact_that_are_not_as_published_are_refused(
    corpus_dir: Path, weights: Path, tmp_path: Path
) -> None:
    pretrained = of_ours(corpus_dir, weights, tmp_path / "store")["pretrain"]
    start = compose(with_weights(corpus_dir, pretrained)).open_start()
    assert start is not None
    assert set(start.checksums) == {"config.json", "model.safetensors"}
    take(str(start.folder), tmp_path / "taken", start.checksums)
    file = pretrained / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Refusal, match=r"model\.safetensors: is not what was published"):
        take(str(start.folder), tmp_path / "again", start.checksums)


def test_weights_that_a_start_step_took_without_a_tokenizer_are_refused(weights: Path, tmp_path: Path) -> None:
    def copied(settings: Any, inputs: Any, out_dir: Path, ctx: Any) -> dict[str, Any]:
        shutil.copytree(weights, out_dir / "model")
        return {}

    start = Step(name="start", kind="start", run=copied, version=1, settings={})
    [report] = run([start], store=open_store(tmp_path / "store"), backend=LocalBackend(cpus=1, gpus=0, in_process=True))
    found = origin(Path(str(report.path)))
    assert found is not None
    with pytest.raises(Refusal, match="what step start took from elsewhere, without a tokenizer"):
        found.tokenizer("pretrain.init_from")


def test_a_folder_with_some_other_programs_manifest_is_as_any_other(tmp_path: Path) -> None:
    for manifest in ('{"name": "a web application"}', "[]", "not JSON"):
        (tmp_path / "manifest.json").write_text(manifest)
        assert origin(tmp_path) is None
