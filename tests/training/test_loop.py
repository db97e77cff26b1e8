"""Runs from their first batch to finished weights, and what becomes of them when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conf.refusal import Refusal
from data.loader import open_loader
from data.rows.packing import TokenDocument, pack_stream
from data.rows.shards import ShardSettings, write_manifest, write_shard
from model.build import build_model
from model.interop import load_pretrained
from model.kernels.select import KERNELS
from pipelines.training.job import run_rank
from pipelines.training.metrics import read_metrics
from tests.conftest import METRICS_KEYS

Make = Callable[..., dict[str, Any]]


def test_a_run_learns_and_says_what_it_did(job: Make, capsys: pytest.CaptureFixture[str]) -> None:
    this = job(steps=60, lr=1e-2)
    figures = run_rank(this)
    rows = read_metrics(Path(this["out_dir"]) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["tokens"] for row in rows] == [256 * step for step in range(1, 61)]
    assert [row["rows"] for row in rows] == [8 * step for step in range(1, 61)]
    assert all(set(row) == METRICS_KEYS for row in rows)
    assert all(0 <= row["data_seconds"] <= row["step_seconds"] and row["targets"] <= 256 for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(256), abs=0.1)
    assert figures["final_loss"] < rows[0]["loss"] - 1
    assert figures["skipped_steps"] == 0
    assert 0 < figures["goodput"] <= 1
    said = capsys.readouterr().out
    assert said.count("MFU is of 1 x measured") == 1 and figures["mfu_formula"].startswith("tokens/s x ")
    assert "measured bf16 matmul" in said
    config, state = load_pretrained(Path(this["out_dir"]) / "model")
    assert config.vocab_size == 256
    assert all(x.dtype == torch.float32 for x in state.values())


def test_a_run_that_has_ended_only_returns_its_figures(job: Make) -> None:
    this = job()
    figures = run_rank(this)
    files = {p: p.stat().st_mtime_ns for p in Path(this["out_dir"]).rglob("*") if p.is_file()}
    assert run_rank(this) == figures
    assert {p: p.stat().st_mtime_ns for p in Path(this["out_dir"]).rglob("*") if p.is_file()} == files
    with pytest.raises(Refusal, match=r"finished\.json: is of another run: its tokenizer"):
        run_rank({**this, "digests": {"tokenizer": "t1"}})


def test_an_unsound_attention_kernel_is_replaced_before_the_first_step_and_the_log_says_so(
    job: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "blockwise", lambda q, k, v, *_: (q + k.mean() + v.mean()) * torch.nan)
    figures = run_rank(job(steps=3))
    assert math.isfinite(figures["final_loss"])
    assert "attention kernel blockwise for plain masks gives NaN" in capsys.readouterr().out


def test_a_run_begins_from_given_weights_and_keeps_the_precision_it_is_told(job: Make, shards: Path) -> None:
    first = job(steps=20, lr=1e-2, saved_precision="bf16")
    run_rank(first)
    folder = Path(first["out_dir"]) / "model"
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    second = {**job(out="second", steps=2, precision="fp32"), "model": None, "init": str(folder)}
    run_rank(second)
    config, state = load_pretrained(folder)
    model = build_model(config)
    model.load_state_dict(state)
    with open_loader({"made": shards}, rows_per_step=8, micro_batch_rows=8) as loader, torch.no_grad():
        out = model(**next(loader).micro_batches[0])
    row = read_metrics(Path(second["out_dir"]) / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx((out["loss_sum"] / out["target_count"]).item(), rel=256 * 2.0**-24)


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_parameters_stay_as_they_were_and_the_rest_learns(job: Make, stage: int) -> None:
    base = job(out="base", steps=2, lr=1e-2)
    run_rank(base)
    folder = Path(base["out_dir"]) / "model"
    tuned = job(out="tuned", steps=2, lr=1e-2, zero={"stage": stage})
    run_rank({**tuned, "model": None, "init": str(folder), "freeze": ["*.mixer.*", "stack.layers.0.*"]})
    before, after = (load_file(Path(run["out_dir"]) / "model/model.safetensors") for run in (base, tuned))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == ("self_attn" in name or ".layers.0." in name), name


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_leaves_pytorch_as_it_found_it(job: Make, stage: int) -> None:
    linear = torch.nn.functional.linear
    run_rank(job(steps=1, zero={"stage": stage}))
    assert torch.nn.functional.linear is linear
    with pytest.raises(Refusal):  # or as it was when it failed
        run_rank(job(out="failed", steps=2, zero={"stage": stage}, lr=1e30, on_non_finite="stop"))
    assert torch.nn.functional.linear is linear


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lora_trains_adapters_alone_and_writes_them_merged_and_apart(job: Make, stage: int) -> None:
    base = job(out="base", steps=10, lr=1e-2)
    run_rank(base)
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
    settings = {
        "zero": {"stage": stage},
        "checkpoint": {"every_steps": 3, "every_seconds": None, "keep_finished": True},
    }
    tuned = {
        **job(out="tuned", steps=6, lr=1e-2, **settings),
        "model": None,
        "init": str(Path(base["out_dir"]) / "model"),
        "lora": lora,
    }
    figures = run_rank(tuned)
    out = Path(tuned["out_dir"])
    saved = load_file(out / "checkpoints/step-00000003/rank-00000.safetensors")
    assert all(".lora_" in key or key.startswith("rng/") for key in saved)
    before = load_file(Path(base["out_dir"]) / "model/model.safetensors")
    after = load_file(out / "model/model.safetensors")
    adapters = load_file(out / "adapter/adapter_model.safetensors")
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapters:
            expected = weight + 2.0 * adapters[f"{key}B.weight"] @ adapters[f"{key}A.weight"]
            assert torch.allclose(after[name], expected, atol=1e-6), name
            assert not torch.equal(after[name], weight), name
        else:
            assert torch.equal(after[name], weight), name
    assert figures["final_loss"] < read_metrics(Path(base["out_dir"]) / "metrics.jsonl")[-1]["loss"] + 0.1
    # From its own step 3 it ends at the very same place, its dropout too.
    again = {**tuned, "out_dir": str(out.with_name("again"))}
    shutil.copytree(out / "checkpoints/step-00000003", out.with_name("again") / "checkpoints/step-00000003")
    assert run_rank(again)["resumed_at_step"] == 3
    assert (out.with_name("again") / "model/model.safetensors").read_bytes() == (
        out / "model/model.safetensors"
    ).read_bytes()


def test_muon_learns_and_resumes_bit_for_bit(job: Make, tmp_path: Path) -> None:
    muon = {"kind": "muon", "lr": 3e-3, "matrix_lr": 1e-2}
    whole = job(out="whole", optim=muon, checkpoint={"every_steps": 3, "every_seconds": None, "keep_finished": True})
    run_rank(whole)
    half = job(out="half", optim=muon)
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    os.rename(tmp_path / "whole/checkpoints/step-00000003", tmp_path / "half/checkpoints/step-00000003")
    assert run_rank(half)["resumed_at_step"] == 3
    wholes, halves = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "half"))
    assert [row["loss"] for row in halves] == [row["loss"] for row in wholes][3:]
    assert wholes[-1]["loss"] < wholes[0]["loss"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_that_is_not_finite_is_never_applied(job: Make, stage: int) -> None:
    exploding = {"optim": {"kind": "adamw", "lr": 1e30, "weight_decay": 0.0}, "zero": {"stage": stage}}
    stopping = job(out="stopping", **exploding)
    with pytest.raises(Refusal, match=r"step 2: .*\(batch digest [0-9a-f]{16}\), and an update must be finite"):
        run_rank(stopping)
    skipping = job(out="skipping", on_non_finite="skip", **exploding)
    figures = run_rank(skipping)
    assert figures["skipped_steps"] == 5
    assert "5 of 6 updates were not finite and left out" in figures["warnings"]
    weights = load_file(Path(skipping["out_dir"]) / "model/model.safetensors")
    assert all(x.isfinite().all() for x in weights.values())


def test_a_batch_without_targets_is_an_error(job: Make, tmp_path: Path) -> None:
    document = TokenDocument(id="0", source="made", position=0, tokens=np.arange(8, 200).repeat(4))
    rows = pack_stream([document], seq_len=32, bos_id=2, eos_id=3, pad_id=0, dtype=np.uint16)
    masked = dataclasses.replace(rows, is_target_RW=np.zeros(rows.tokens_RW.shape, dtype=np.bool_))
    folder = tmp_path / "masked"
    record = write_shard(masked, [document], folder, name="train-0", rows_per_block=8, vocab_size=256, counts=Counter())
    settings = ShardSettings(seq_len=32, rows_per_block=8)
    write_manifest(folder, [record], settings=settings, vocab_size=256, masked=True)
    with pytest.raises(Refusal, match=r"at row 0: it has no target .*: every token in it is masked"):
        run_rank({**job(), "shards": {"made": str(folder)}})


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_learns_what_an_eager_one_does(job: Make, tmp_path: Path) -> None:
    clock = {"every_steps": 3, "every_seconds": None, "keep_finished": True}
    for out, mode in (("eager", "off"), ("whole", "on")):
        run_rank(job(out=out, compile=mode, checkpoint=clock, precision="fp32"))
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000003", tmp_path / "half/checkpoints/step-00000003")
    run_rank(job(out="half", compile="on", checkpoint=clock, precision="fp32"))
    losses = {
        out: [row["loss"] for row in read_metrics(tmp_path / out / "metrics.jsonl")]
        for out in ("eager", "whole", "half")
    }
    assert losses["half"] == losses["whole"][3:]
    assert losses["whole"] == pytest.approx(losses["eager"], rel=256 * 2.0**-24)


def test_compiling_what_cannot_be_compiled_is_refused_and_auto_says_why_not(
    job: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refusal, match="compile = 'on': not possible here, ZeRO stage 3"):
        run_rank(job(compile="on", zero={"stage": 3}))
    run_rank(job(out="short", compile="auto", steps=1))
    assert "compile: off, the run is too short to earn back the time it takes" in capsys.readouterr().out
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    run_rank(job(out="bare", compile="auto", steps=1))
    said = capsys.readouterr().out
    assert "compile: off, the run is too short to earn back the time it takes; there is no C++ compiler" in said
    assert "longer\n" not in said  # nothing was lost by it
    monkeypatch.setattr("pipelines.training.compile.CPU_WORTH_FLOPS", 0.0)
    run_rank(job(out="long", compile="auto", steps=1))
    assert "compile: off, there is no C++ compiler (g++ or clang++), so steps take 5 to 10 % longer" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_with_the_same_losses_and_weights(job: Make) -> None:
    clock = {"every_steps": 10, "every_seconds": None}
    whole, killed = (job(out=out, steps=150, checkpoint=clock, threads=1) for out in ("whole", "killed"))
    reference = start(whole)
    out = Path(killed["out_dir"])
    # Killed outright in some step, then asked to leave in a later one, then left alone.
    first = start(killed)
    wait_for_step(out, 37)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(killed)
    wait_for_step(out, 60)
    second.send_signal(signal.SIGTERM)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 143, said
    stopped_after = int(said.split("stopped as asked after step ")[1].split()[0])
    assert (out / f"checkpoints/step-{stopped_after:08d}/state.json").exists()
    assert start(killed).wait(timeout=300) == 0
    assert reference.wait(timeout=300) == 0
    rows = {name: read_metrics(Path(this["out_dir"]) / "metrics.jsonl") for name, this in (("w", whole), ("k", killed))}
    for key in ("step", "loss", "grad_norm", "batch_digest"):
        assert [row[key] for row in rows["k"]] == [row[key] for row in rows["w"]], key
    weights = [(Path(this["out_dir"]) / "model/model.safetensors").read_bytes() for this in (whole, killed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_torchrun_trains_the_same_run_on_two_ranks(job: Make) -> None:
    alone, together = (job(out=out, precision="fp32", zero={"stage": 2}) for out in ("alone", "together"))
    run_rank(alone)
    path = write(together)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "pipelines.training", str(path)], capture_output=True, text=True, timeout=300, env=clean()
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (read_metrics(Path(this["out_dir"]) / "metrics.jsonl") for this in (together, alone))
    assert [row["batch_digest"] for row in ours] == [row["batch_digest"] for row in theirs]
    # A sum of n fp32 terms in any order is off by at most n eps.
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=256 * 2.0**-24)


@pytest.mark.slow
def test_a_users_mistake_is_one_paragraph_and_exit_code_2(job: Make) -> None:
    done = start(job(global_batch_tokens=8 * 32 + 1))
    _, said = done.communicate(timeout=100)
    assert done.returncode == 2
    assert said.startswith("global_batch_tokens = 257: a global batch is a whole number of rows")
    assert "Traceback" not in said


def clean() -> dict[str, str]:
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    return {**{k: v for k, v in os.environ.items() if k not in ours}, "OMP_NUM_THREADS": "1"}


def write(job: dict[str, Any]) -> Path:
    out = Path(job["out_dir"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(job))
    return out / "run.json"


def start(job: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.training", str(write(job))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean())


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        rows = read_metrics(out / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {out} in time")
