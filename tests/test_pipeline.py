"""The whole pipeline through the command line: made once, cached after, killed anywhere, the same in the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.engine.events import StepReport
from pipelines.engine.step import Artifact
from pipelines.settings.compose import compose
from pipelines.stages.instructions import make
from pipelines.stages.train import shortened
from pipelines.verbs.plan import estimate
from tests.conftest import LOCAL, METRICS_KEYS, ROOT, TINY, answer, athanor, complaint, crowded, tiny

pytestmark = pytest.mark.slow

STEPS = ["corpus", "tokenizer", "shards", "pretrain", "instructions", "finetune", "evaluate", "export", "report"]


@pytest.fixture(scope="module")
def finished(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One undisturbed run through Ray, from a folder with a `model.py` and the like: its store, what it printed, its
    manifests."""
    store = tmp_path_factory.mktemp("finished")
    result = athanor("run", *tiny(corpus_dir, store), cwd=crowded(tmp_path_factory.mktemp("crowded")))
    return {"store": store, "stdout": result.stdout, "manifests": manifests(store)}


def manifests(store: Path) -> dict[str, dict[str, Any]]:
    return {path.parts[-3]: json.loads(path.read_text()) for path in store.glob("*/*/manifest.json")}


def contents(store: Path) -> dict[str, str]:
    """Content digest of each step that only depends on what was asked for; a report tells seconds."""
    return {name: m["content_digest"] for name, m in manifests(store).items() if name != "report"}


def metrics(store: Path, step: str = "pretrain") -> list[dict[str, Any]]:
    [path] = store.glob(f"{step}/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_makes_every_step_and_ends_with_a_table_and_what_to_type_next(finished: dict[str, Any]) -> None:
    assert sorted(finished["manifests"]) == sorted(STEPS)
    for step in STEPS:
        assert re.search(rf"^{step}\s+made\s", finished["stdout"], re.MULTILINE), finished["stdout"]
    assert "athanor generate" in finished["stdout"]


@pytest.mark.parametrize("step", ["pretrain", "finetune"])
def test_each_step_of_training_leaves_a_row_with_all_its_figures(finished: dict[str, Any], step: str) -> None:
    rows = metrics(finished["store"], step)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(set(row) == METRICS_KEYS for row in rows)
    assert all(row["grad_norm"] > 0 and row["lr"] >= 0 and 0 < row["mfu"] <= 1 and row["skipped"] == 0 for row in rows)


def test_the_same_command_again_runs_nothing(finished: dict[str, Any], corpus_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished["store"].rglob("manifest.json")}
    again = athanor("run", *tiny(corpus_dir, finished["store"]))
    assert " made " not in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in finished["store"].rglob("manifest.json")}


def test_status_is_machine_readable_and_carries_bits_per_byte(
    capsys: pytest.CaptureFixture[str], finished: dict[str, Any], corpus_dir: Path
) -> None:
    steps = json.loads(answer(capsys, "status", *tiny(corpus_dir, finished["store"]), "--json").out)["steps"]
    assert [set(step) for step in steps] == [{"name", "digest", "state", "path", "metrics", "seconds"}] * len(STEPS)
    by_name = {step["name"]: step for step in steps}
    assert all(step["state"] == "cached" for step in steps)
    assert 0 < by_name["evaluate"]["metrics"]["bits_per_byte"] < 8


def test_why_names_the_field_that_makes_a_step_run_again(
    capsys: pytest.CaptureFixture[str], finished: dict[str, Any], corpus_dir: Path
) -> None:
    said = answer(capsys, "why", "pretrain", *tiny(corpus_dir, finished["store"]), "optim.lr=0.0123").out
    assert "optim.lr" in said and "0.0123" in said
    said = answer(capsys, "why", "evaluate", *tiny(corpus_dir, finished["store"]), "tokenizer.vocab_size=640").out
    assert "vocab_size" in said


def test_plan_runs_nothing_and_tells_what_it_would_cost(
    capsys: pytest.CaptureFixture[str], finished: dict[str, Any], corpus_dir: Path
) -> None:
    words = tiny(corpus_dir, finished["store"], "optim=adamw", "zero=2")
    planned = json.loads(answer(capsys, "plan", *words, "--json").out)
    states = {step["name"]: step["state"] for step in planned["steps"]}
    assert states["shards"] == "cached" and states["pretrain"] == states["report"] == "to make"
    assert planned["costs"]["steps"] == 20 and planned["costs"]["memory_per_rank"]["total"] > 0


def test_what_plan_says_before_a_run_is_what_the_run_then_takes(finished: dict[str, Any], corpus_dir: Path) -> None:
    words = tiny(corpus_dir, finished["store"], "finetune.train.total_tokens=1e9")
    guessed = estimate(compose(words), [])
    files = {name: manifest["files"] for name, manifest in finished["manifests"].items()}
    made = {
        name: StepReport(
            name=name,
            kind={"shards": "rows", "instructions": "conversations", "pretrain": "model"}.get(name, name),
            digest="",
            state="cached",
            metrics=manifest["metrics"],
            bytes=sum(file["bytes"] for file in files[name].values()),
        )
        for name, manifest in finished["manifests"].items()
    }
    counted = estimate(compose(words), list(made.values()))
    trained, rows = made["pretrain"].metrics, made["instructions"].metrics
    for costs in (guessed, counted):
        assert costs["steps"] == trained["steps"] and costs["tokens"] == trained["tokens"]
        assert costs["parameters"]["total"] == trained["parameters"]
        weights = files["pretrain"]["model/model.safetensors"]["bytes"]
        assert costs["disk"]["weights"] == costs["disk"]["export"] == pytest.approx(weights, rel=0.1)
        checkpoint = sum(f["bytes"] for path, f in files["pretrain"].items() if path.startswith("checkpoints/"))
        assert costs["disk"]["checkpoints"] == pytest.approx(3 * checkpoint, rel=0.1) or not checkpoint
    assert guessed["data"]["tokens"] == pytest.approx(made["shards"].metrics["tokens"], rel=0.5)
    assert counted["data"]["tokens"] == made["shards"].metrics["tokens"]
    assert guessed["data"]["shards"] == pytest.approx(made["shards"].metrics["shards"], abs=1)
    # Rows of 64 in blocks of 16: the tars' own blocks weigh as much as the rows, which larger ones leave behind.
    assert counted["disk"]["shards"] == sum(f["bytes"] for f in files["shards"].values())
    assert counted["disk"]["shards"] / 4 < guessed["disk"]["shards"] < counted["disk"]["shards"]
    # Through the conversations so many times, not `total_tokens`.
    in_rows = rows["rows"] * 64 * counted["finetune"]["epochs"]
    assert counted["finetune"]["steps"] == in_rows // 512 and counted["finetune"]["basis"] == "counted"
    assert counted["finetune"]["steps"] <= guessed["finetune"]["steps"] and "at most" in guessed["finetune"]["basis"]
    assert [line.partition(":")[0] for line in counted["warnings"]] == ["finetune"] * (in_rows // 512 < 20)


def test_the_steps_of_tuning_on_a_file_are_guessed_within_a_half(
    finished: dict[str, Any], corpus_dir: Path, tmp_path: Path
) -> None:
    """200 conversations: a few thousand tokens, and not the billion of `finetune.train.total_tokens`."""
    asked = "What is {} and one? Please answer in a whole sentence."
    lines = [{"prompt": asked.format(n), "completion": f"It is {n + 1}, as everybody can count."} for n in range(200)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [w for w in tiny(corpus_dir, finished["store"]) if "finetune" not in w]
    settings = compose(
        [*words, "finetune=chat", f"finetune.data.paths=[{chats}]", "finetune.train.global_batch_tokens=512"]
    )
    guessed = estimate(settings, [])["finetune"]
    [vocabulary] = finished["store"].glob("tokenizer/*")
    words_of = finished["manifests"]["tokenizer"]
    tokenizer = Artifact(step="tokenizer", digest=words_of["digest"], url=str(vocabulary), manifest=words_of)
    assert settings.finetune is not None
    rows = make(settings.finetune.rows(64), [], tokenizer, tmp_path / "made")
    truth = estimate(
        settings, [StepReport(name="instructions", kind="conversations", digest="i", state="cached", metrics=rows)]
    )["finetune"]
    tuned = settings.finetuning()
    assert tuned is not None and tuned.tuning is not None
    made = Artifact(step="instructions", digest="i", url=str(tmp_path / "made"), manifest={"metrics": rows})
    assert truth["tokens"] == shortened(tuned.train, tuned.tuning, made).total_tokens
    assert guessed["steps"] == pytest.approx(truth["steps"], rel=0.5), (guessed, truth)


def test_one_changed_setting_remakes_only_what_follows(
    capsys: pytest.CaptureFixture[str], finished: dict[str, Any], corpus_dir: Path
) -> None:
    words = tiny(corpus_dir, finished["store"], "evaluate.max_bytes=9000")
    planned = json.loads(answer(capsys, "plan", *words, "--json").out)
    missing = {step["name"] for step in planned["steps"] if step["state"] == "to make"}
    assert missing == {"evaluate", "report"}


def test_a_batch_is_traced_to_the_text_of_its_files(
    capsys: pytest.CaptureFixture[str], finished: dict[str, Any], corpus_dir: Path
) -> None:
    rows = json.loads(answer(capsys, "trace", *tiny(corpus_dir, finished["store"]), "--step", "3", "--json").out)
    assert len(rows) == 16
    for piece in (piece for row in rows for piece in row["pieces"]):
        first, last = piece["characters"]
        text = (corpus_dir.parent / piece["file"]).read_text()[piece["position"] :]
        assert text[first:last] == piece["text"]


def test_a_trained_model_continues_a_prompt_the_same_for_the_same_seed(
    capsys: pytest.CaptureFixture[str], finished: dict[str, Any], corpus_dir: Path
) -> None:
    words = tiny(corpus_dir, finished["store"])
    ask = ("generate", *words, "--prompt", "def x = 1", "--max-tokens", "12", "--seed", "3")
    one, two = answer(capsys, *ask).out, answer(capsys, *ask).out
    assert one == two and one.startswith("def x = 1")
    smaller = answer(capsys, *ask, "--quantize", "int4")
    assert smaller.out.startswith("def x = 1") and "int4: " in smaller.err
    chats = [answer(capsys, *ask, "--from", step, "--chat").err for step in ("pretrain", "finetune")]
    assert ["not fine-tuned" in said for said in chats] == [True, False]


def test_a_tag_names_a_model_wherever_one_is_wanted(
    capsys: pytest.CaptureFixture[str], finished: dict[str, Any], corpus_dir: Path, tmp_path: Path
) -> None:
    words, there = tiny(corpus_dir, finished["store"]), f"store={finished['store']}"
    assert "tag:best is" in answer(capsys, "tag", "best", "pretrain", *words).out
    answer(capsys, "tag", "out", "export", *words)
    listed = answer(capsys, "tag", there).out
    assert re.search(r"^best +pretrain ", listed, re.MULTILINE) and re.search(r"^out +export ", listed, re.MULTILINE)
    ask = ("--prompt", "def x = 1", "--max-tokens", "12", "--seed", "3")
    by_step = answer(capsys, "generate", *words, *ask, "--from", "pretrain").out
    assert answer(capsys, "generate", there, *ask, "--from", "tag:best").out == by_step
    answer(capsys, "generate", there, *ask, "--from", "tag:out")
    planned = [word for word in words if word != "model=tiny"]
    states = json.loads(answer(capsys, "plan", *planned, "pretrain.init_from=tag:best", "--json").out)["steps"]
    assert [step["state"] for step in states if step["name"] == "start"] == ["to make"]
    answer(capsys, "tag", "pieces", "tokenizer", *words)
    assert "which holds no model" in complaint(capsys, "generate", there, *ask, "--from", "tag:pieces")
    assert "best" not in answer(capsys, "tag", "--delete", "best", there).out
    said = complaint(capsys, "generate", there, *ask, "--from", "tag:best")
    assert "tag:best: no such tag" in said and "there are out, pieces" in said
    assert "Write athanor tag NAME STEP experiment=" in complaint(capsys, "tag", "best", there)


def test_the_export_is_loaded_by_transformers_and_agrees_with_the_artifact(finished: dict[str, Any]) -> None:
    import transformers

    [manifest] = finished["store"].glob("export/*/manifest.json")
    folder = next(path.parent for path in manifest.parent.rglob("config.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(model.generate(**tokenizer("import ", return_tensors="pt"), max_new_tokens=4)[0])
    assert "import" in text


def test_torchrun_without_ray_publishes_the_same_weights(
    finished: dict[str, Any], corpus_dir: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = "import sys; sys.modules['ray'] = None; from pipelines.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "train", *tiny(corpus_dir, tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert [m["loss"] for m in metrics(tmp_path)] == [m["loss"] for m in metrics(finished["store"])]
    assert contents(tmp_path)["pretrain"] == contents(finished["store"])["pretrain"]


def test_two_ranks_under_torchrun_see_the_same_batches_and_nearly_the_same_losses(
    finished: dict[str, Any], corpus_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipelines"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["train", *tiny(corpus_dir, tmp_path)]
    copy_shards(finished["store"], tmp_path)
    folder = crowded(tmp_path_factory.mktemp("crowded"))
    (folder / "pipelines.py").unlink()  # which Python would run for -m pipelines
    subprocess.run([*command, *words], check=True, cwd=folder, env=environment, capture_output=True, timeout=300)
    one, two = metrics(finished["store"]), metrics(tmp_path)
    assert [m["batch_digest"] for m in one] == [m["batch_digest"] for m in two]
    # Products are rounded to bf16 (2^-8); rows are grouped differently, and twenty updates feed the difference back.
    assert max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, two, strict=True)) < 2e-2


ADAMW = ("optim=adamw", "pretrain.precision=fp32", "--until", "pretrain")


@pytest.fixture(scope="module")
def one_rank(finished: dict[str, Any], corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a pretraining with AdamW in fp32 by one process, over the shards that are there."""
    store = tmp_path_factory.mktemp("one-rank")
    copy_shards(finished["store"], store)
    athanor("run", *tiny(corpus_dir, store, LOCAL, "compute.cpus_per_rank=1"), *ADAMW)
    return store


def copy_shards(source: Path, target: Path) -> None:
    for step in ("corpus", "tokenizer", "shards"):
        shutil.copytree(source / step, target / step)


def test_two_ranks_under_ray_share_the_state_out_and_train_the_same(
    one_rank: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    copy_shards(one_rank, tmp_path)
    athanor("run", *tiny(corpus_dir, tmp_path, "compute.ranks=2", "compute.cpus_per_rank=1", "zero=3"), *ADAMW)
    [told] = tmp_path.glob("pretrain/*/ds_config.json")
    config = json.loads(told.read_text())
    rows_a_rank = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert (config["zero_optimization"]["stage"], config["train_batch_size"]) == (3, 2 * rows_a_rank)
    one, two = metrics(one_rank), metrics(tmp_path)
    assert len(one) == 20 and [m["batch_digest"] for m in one] == [m["batch_digest"] for m in two]
    # A sum of 1,024 fp32 terms in any order is off by at most 1,024 eps; so are the gradients that twenty updates use.
    assert max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, two, strict=True)) < 1024 * 2.0**-24


def test_several_sources_are_mixed_in_the_proportion_asked_for(
    capsys: pytest.CaptureFixture[str], corpus_dir: Path, tmp_path: Path
) -> None:
    overrides = (
        *tiny(corpus_dir, tmp_path, LOCAL),
        *(f"sources.{name}.{key}" for name, kind in (("mail", "email"), ("tasks", "asyncio")) for key in
          ("kind=files", f"paths=['{corpus_dir}/{kind}-*.py']", "reader.max_document_characters=2000")),
        "mixture.phases=[{from_tokens: 0, weights: {mail: 3, tasks: 1}}]",
        "pretrain.total_tokens=4096",
    )  # fmt: skip
    athanor("run", *overrides, "--until", "pretrain")
    traced = [answer(capsys, "trace", *overrides, "--step", step, "--json").out for step in ("1", "4")]
    rows = [row for one in traced for row in json.loads(one)]
    assert [row["source"] for row in rows].count("mail") == 24
    assert len(rows) == 32
    assert all(Path(piece["file"]).name.startswith(("email", "asyncio")) for row in rows for piece in row["pieces"])


def test_killed_drivers_in_every_stage_leave_the_same_artifacts(
    finished: dict[str, Any], corpus_dir: Path, tmp_path: Path
) -> None:
    """SIGKILL of the driver at a random moment of each step, of a training once it has taken steps."""
    chance = random.Random(20261122)
    overrides, killed = tiny(corpus_dir, tmp_path, LOCAL), set()
    for step in STEPS[:-1]:  # a report is made too soon to be caught
        trains = step in ("pretrain", "finetune")
        command = [sys.executable, "-m", "pipelines", "run", *overrides, "--until", step]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(f".work/{step}-*/*{'/out/metrics.jsonl' if trains else ''}")):
            assert time.monotonic() < deadline and process.poll() is None, step
            time.sleep(0.02)
        time.sleep(chance.random() * (0.3 if trains else 1.0))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            killed.add(step)
    assert len(killed) >= 5 and {"pretrain", "finetune"} <= killed
    athanor("run", *overrides)
    assert contents(tmp_path) == contents(finished["store"])


def processes(mark: str, name: str) -> list[int]:
    """Ids of the processes that carry a mark in their environment and have `name` in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ours = mark.encode() in (folder / "environ").read_bytes()
            if is_ours and name.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    "victim",
    [
        "ray::RayTrainWorker",
        pytest.param("raylet/raylet", marks=pytest.mark.prove),
        pytest.param("gcs/gcs_server", marks=pytest.mark.prove),
    ],
)
def test_a_killed_rank_or_ray_itself_leaves_the_same_artifacts(
    finished: dict[str, Any], corpus_dir: Path, tmp_path: Path, victim: str
) -> None:
    copy_shards(finished["store"], tmp_path)
    mark = f"{tmp_path.name}-{victim}"
    command = [sys.executable, "-m", "pipelines", "run", *tiny(corpus_dir, tmp_path), "--until", "pretrain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATHANOR_TEST_MARK": mark}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(path.read_text() for path in tmp_path.glob(".work/pretrain-*/*/out/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    victims = processes(mark, victim)
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=200 if victim == "ray::RayTrainWorker" else 20)[1]
    if victim == "ray::RayTrainWorker":
        assert process.returncode == 0 and "Starting all ranks again" in said, said
    else:
        assert process.returncode == 75 and "Traceback" not in said, said
        assert re.search(r"Ray itself went away \(.*Run the same command again to continue\.$", said), said
    deadline = time.monotonic() + 20
    while processes(mark, ""):
        assert time.monotonic() < deadline, "something of it stays behind"
        time.sleep(0.1)
    athanor("run", *tiny(corpus_dir, tmp_path), "--until", "pretrain")
    assert contents(tmp_path)["pretrain"] == contents(finished["store"])["pretrain"]
    assert [m["loss"] for m in metrics(tmp_path)] == [m["loss"] for m in metrics(finished["store"])]


def test_a_corrupted_shard_is_refused_and_nothing_is_lost(
    capsys: pytest.CaptureFixture[str], finished: dict[str, Any], corpus_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished["store"], tmp_path, dirs_exist_ok=True)
    tar = min(tmp_path.glob("shards/*/*.tar"))
    whole = tar.read_bytes()
    tar.write_bytes(whole[:3000] + bytes([whole[3000] ^ 255]) + whole[3001:])
    command = ("run", *tiny(corpus_dir, tmp_path, LOCAL, "pretrain.total_tokens=2048"), "--until", "pretrain")
    assert f"{tar}, block 0: is corrupted: its sha256" in complaint(capsys, *command)
    tar.write_bytes(whole)
    assert re.search(r"^pretrain\s+made", answer(capsys, *command).out, re.MULTILINE)


RUN_ON_A_SMALL_DISK = """
mount -t tmpfs -o size=1m none "$1"
"${@:2}" "store=$1" > "$1.first" 2>&1; echo "exit code $?" >> "$1.first"
mount -o remount,size=100m "$1"
"${@:2}" "store=$1" > "$1.second" 2>&1
"""


def test_a_full_disk_is_said_and_the_same_command_continues(corpus_dir: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    if subprocess.run([*in_namespace, "mount -t tmpfs none /mnt"], capture_output=True).returncode != 0:
        pytest.skip("no mount namespaces here")
    command = [sys.executable, "-m", "pipelines", "run", *TINY, f"corpus.paths=[{corpus_dir}]", LOCAL]
    script = [*in_namespace, RUN_ON_A_SMALL_DISK, "bash", str(disk), *command, "--until", "pretrain"]
    again = subprocess.run(script, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    first, second = (tmp_path / "disk.first").read_text(), (tmp_path / "disk.second").read_text()
    assert re.search("The disk is full|No space left on device", first), first
    assert "exit code 2" in first and "Traceback" not in first, first
    assert again.returncode == 0 and re.search(r"^corpus\s+cached", second, re.MULTILINE), second


@pytest.mark.parametrize(
    ("number", "backend"),
    [
        (signal.SIGINT, "ray"),
        pytest.param(signal.SIGTERM, "ray", marks=pytest.mark.prove),
        (signal.SIGINT, "local"),
    ],
)
def test_ctrl_c_saves_leaves_a_clean_state_and_says_how_to_continue(
    finished: dict[str, Any], corpus_dir: Path, tmp_path: Path, number: signal.Signals, backend: str
) -> None:
    copy_shards(finished["store"], tmp_path)
    more = ["pretrain.total_tokens=1e6", "pretrain.checkpoint.every_steps=null", f"compute.backend={backend}"]
    command = [sys.executable, "-m", "pipelines", "run", *tiny(corpus_dir, tmp_path, *more), "--until", "pretrain"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".work/pretrain-*/*/out/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "the same command again continues" in said and "Traceback" not in said
    (out,) = tmp_path.glob(".work/pretrain-*/*/out")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (out / "checkpoints" / f"step-{steps[-1]:08d}").is_dir(), "not a step is lost"
    assert not [p for p in tmp_path.glob(".leases/*.json") if json.loads(p.read_text()).get("owner")]


def test_certify_resume_prints_a_verdict_that_holds(finished: dict[str, Any], corpus_dir: Path, tmp_path: Path) -> None:
    copy_shards(finished["store"], tmp_path)
    said = athanor("certify", "resume", *tiny(corpus_dir, tmp_path, LOCAL)).stdout
    assert said.count("holds ") == 2, said
    assert "bit for bit" in said
