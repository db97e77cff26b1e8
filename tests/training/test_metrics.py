"""What a run reports: exact losses, cut where a run resumes, honest speed, and the same figures at Weights & Biases."""

from __future__ import annotations

import http.server
import json
import math
import os
import platform
import re
import shlex
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.files import machine_cache
from pipelines.training import metrics as metrics_module
from pipelines.training import wandb_mode as wandb_mode_module
from pipelines.training.hardware import GPU_PEAKS, peak_flops, peaks_file
from pipelines.training.metrics import (
    MetricsLog,
    Progress,
    RunName,
    Speed,
    WandbRun,
    duration,
    read_metrics,
    summary,
    tracking_line,
    wandb_run,
)
from pipelines.training.settings import TrackingSettings
from pipelines.training.wandb_mode import wandb_mode


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": math.pi / step,
        "tokens": 100 * step,
        "rows": 2 * step,
        "step_tokens": 100,
        "step_seconds": 2.0,
        "data_seconds": 0.5,
        "tokens_per_second": 50.0,
        "mfu": 0.25,
        "skipped": 0,
        "time": 1000.0 + 2 * step,
        **changes,
    }


def test_losses_come_back_from_the_file_bit_for_bit(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", keep_steps=0)
    for step in range(1, 50):
        log(row(step))
    log.close()
    assert [r["loss"] for r in read_metrics(tmp_path / "m.jsonl")] == [math.pi / step for step in range(1, 50)]


def test_resuming_cuts_later_rows_and_leaves_a_zombie_writing_into_the_void(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    zombie = MetricsLog(path, keep_steps=0)
    for step in range(1, 8):
        zombie(row(step))
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # torn by a kill
    resumed = MetricsLog(path, keep_steps=5)
    zombie(row(8, loss=-1.0))
    resumed(row(6, loss=0.5))
    assert [(r["step"], r["loss"]) for r in read_metrics(path)][4:] == [(5, math.pi / 5), (6, 0.5)]


def test_the_summary_counts_what_was_lost_as_lost(tmp_path: Path) -> None:
    rows = [row(step) for step in range(1, 5)] + [
        row(5, time=1030.0, skipped=1, loss=float("nan")),
        row(6, time=1032.0),
    ]
    figures = summary(rows, resumed_at_step=4)
    assert figures["steps"] == 6
    assert figures["tokens"] == 600
    assert figures["final_loss"] == math.pi / 6
    assert figures["loss"] == pytest.approx(sum(math.pi / s for s in (1, 2, 3, 4, 6)) / 5)  # the skipped step aside
    assert figures["skipped_steps"] == 1
    assert figures["tokens_per_second"] == 50.0
    assert figures["data_wait_share"] == 0.25
    assert figures["goodput"] == pytest.approx(6 * 2.0 / 32.0)  # 32 s from the first attempt's start to the end


def test_mfu_is_its_formula() -> None:
    assert Speed(flops_per_token=3e6, peak_flops=1.5e9).mfu(100.0) == pytest.approx(100 * 3e6 / 1.5e9)
    assert Speed(flops_per_token=None, peak_flops=1.0).mfu(100.0) is None


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is kept between runs; returns the file of peaks."""
    monkeypatch.setenv("ATHANOR_CACHE", str(tmp_path / "cache" / "athanor"))
    return peaks_file()


def test_peaks_are_kept_in_this_machines_one_cache(cache: Path) -> None:
    assert cache.parent == machine_cache() == Path(os.environ["ATHANOR_CACHE"])


def test_the_peak_of_a_cpu_is_measured_and_says_so(cache: Path) -> None:
    peak, source = peak_flops(torch.device("cpu"), "fp32", torch.get_num_threads())
    assert peak > 1e8  # any machine of this century
    assert "measured fp32 matmul" in source
    assert f"{peak / 1e9:,.0f} GFLOP/s" in source
    assert re.search(rf"\(median [\d,]+, load [\d.]+, \d{{4}}-\d\d-\d\d, kept in {cache}\)", source)


def test_every_run_of_a_machine_has_the_peak_that_was_measured_first(cache: Path) -> None:
    cpu = torch.device("cpu")
    first = peak_flops(cpu, "fp32", 1)
    assert peak_flops(cpu, "fp32", 1) == first
    kept = json.loads(cache.read_text())
    [conditions] = kept
    for condition in (platform.node(), "1 threads", "fp32", "1024", torch.__version__):
        assert condition in conditions
    assert kept[conditions]["best"] == first[0] >= kept[conditions]["median"]
    peak_flops(cpu, "bf16", 1)  # another condition, another measurement, and both stay
    assert len(json.loads(cache.read_text())) == 2


def test_a_peak_measured_beside_other_work_is_measured_again_once_that_is_over(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("os.getloadavg", lambda: (500.0, 0.0, 0.0))
    peak_flops(cpu, "fp32", 1)
    [conditions] = kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({conditions: {**kept[conditions], "best": 1.0}}))
    assert peak_flops(cpu, "fp32", 1)[0] == 1.0  # as busy as before
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    quiet = peak_flops(cpu, "fp32", 1)[0]
    assert quiet > 1e8
    assert peak_flops(cpu, "fp32", 1)[0] == quiet


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"x": 1}'])
def test_a_damaged_file_of_peaks_is_measured_anew(cache: Path, damage: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(damage)
    peak, _ = peak_flops(torch.device("cpu"), "fp32", 1)
    assert peak in [entry["best"] for entry in json.loads(cache.read_text()).values() if isinstance(entry, dict)]


def test_a_peak_that_cannot_be_kept_says_that_another_may_differ(cache: Path) -> None:
    cache.parent.parent.write_text("a file where the folder should be")
    peak, source = peak_flops(torch.device("cpu"), "fp32", 1)
    assert peak > 1e8
    assert "not kept, so another run's may differ" in source


def test_measuring_leaves_the_random_numbers_of_the_run_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    peak_flops(torch.device("cpu"), "bf16", 1)
    assert torch.equal(torch.rand(3), expected)


def test_gpu_peaks_have_bf16_above_fp32() -> None:
    assert all(bf16 > fp32 > 1e13 for bf16, fp32 in GPU_PEAKS.values())


def test_the_progress_line_has_the_figures_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    progress = Progress("pretrain", 200)
    for step in range(1, 5):
        progress(row(step))
    assert progress.line(row(4)) == "pretrain step 4/200 · loss 0.7854 · 50 tokens/s · MFU 25.0% · 9m48s left"


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4s"), (62, "1m02s"), (3600 * 5 + 61, "5h01m")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def server() -> Iterator[str]:
    """It answers GET, and takes runs without ever answering: as behind a proxy that has lost what it stands for."""
    leave = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def do_POST(self) -> None:
            leave.wait(60)

        def log_message(self, *words: object) -> None:
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    leave.set()
    http_server.shutdown()


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    return monkeypatch


def test_tracking_is_where_the_settings_the_environment_the_key_and_the_server_say(
    keyed: pytest.MonkeyPatch, server: str, tmp_path: Path
) -> None:
    auto = TrackingSettings(mode="auto")
    keyed.setenv("WANDB_BASE_URL", server)
    assert wandb_mode(auto) == ("online", "a key is set")
    for value, mode in (("offline", "offline"), ("dryrun", "offline"), ("disabled", "off"), ("online", "online")):
        keyed.setenv("WANDB_MODE", value)
        assert wandb_mode(auto)[0] == mode, value
        assert wandb_mode(TrackingSettings(mode="online"))[0] == "online"  # what the settings say outright counts
    keyed.setenv("WANDB_MODE", "disabled")
    assert tracking_line(auto, "runs") == "tracking: metrics.jsonl only (WANDB_MODE=disabled)"
    keyed.delenv("WANDB_MODE")
    keyed.delenv("WANDB_API_KEY")
    assert "offline (no key is set)" in tracking_line(auto, "runs")
    (tmp_path / "none").write_text(
        "machine 127.0.0.1 login user password k\n"
    )  # `wandb login` at a server of one's own
    assert wandb_mode(auto)[0] == "online"
    assert "offline (tracking.mode=offline)" in tracking_line(TrackingSettings(mode="offline"), "runs")


def test_auto_is_offline_within_seconds_where_the_server_does_not_answer(keyed: pytest.MonkeyPatch) -> None:
    keyed.setattr(wandb_mode_module, "ANSWER_SECONDS", 0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        keyed.setenv("WANDB_BASE_URL", refusing)
        assert wandb_mode(TrackingSettings(mode="auto")) == ("offline", f"{refusing} does not answer")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        keyed.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        assert wandb_mode(TrackingSettings(mode="auto"))[0] == "offline"


@pytest.mark.slow
def test_a_server_that_answers_and_takes_no_run_leaves_auto_offline_and_says_so(
    keyed: pytest.MonkeyPatch, server: str, tmp_path: Path
) -> None:
    keyed.setenv("WANDB_BASE_URL", server)
    keyed.setattr(metrics_module, "INIT_SECONDS", 2.0)
    said: list[str] = []
    described: dict[str, Any] = {"name": RunName(id="abc124", label="pretrain"), "folder": tmp_path, "config": {}}
    with wandb_run(TrackingSettings(mode="auto"), **described, log=said.append) as run:
        assert isinstance(run, WandbRun)
        run(row(1))
    assert len(list(tmp_path.rglob("offline-*/*.wandb"))) == 1
    assert len(said) == 1 and said[0].startswith("tracking: Weights & Biases offline after all")


@pytest.mark.slow
def test_an_offline_run_resumes_under_its_id_with_its_own_step_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "5ecre7" * 6 + "abcd"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    command = "athanor run experiment=demo 'corpus.paths=[a b]'"
    about = {"experiment": "demo", "store": "/a store", "commit": "c0ffee", "command": command}
    settings = TrackingSettings(mode="offline", group="sweep-1", project="proj", tags=("mine",), about=about)

    def attempt(steps: range) -> None:
        name = RunName.kept(tmp_path, label="pretrain", url="/a store/pretrain/p1p2p3p4p5")
        with wandb_run(settings, name=name, folder=tmp_path, config={"train": {"seed": 7}, "ranks": 2}) as run:
            assert isinstance(run, WandbRun)
            for step in steps:
                run(row(step))
            digests = {"shards": "d1g3s7" * 10, "settings": "5e77"}
            run.lineage("/a store/pretrain/p1", inputs={"shards": "s3://b/shards/s1"}, digests=digests)

    attempt(range(1, 4))
    attempt(range(3, 6))
    files = sorted(tmp_path.rglob("*.wandb"))
    said = tracking_line(settings, "/a store/pretrain/p1p2p3p4p5")
    assert said.endswith("wandb sync '/a store/pretrain/p1p2p3p4p5'/logs/wandb/offline-run-*")  # a shell's pattern
    assert [file.parent for file in files] == sorted(tmp_path.glob(said.rpartition("/logs/")[2]))
    run_id = RunName.kept(tmp_path, label="pretrain", url="").id
    assert run_id != RunName.kept(tmp_path / "another store", label="pretrain", url="").id
    attempts = [wandb_records(file) for file in files]
    for records in attempts:
        started = next(r.run for r in records if r.HasField("run"))
        assert (started.run_id, started.run_group, started.project) == (run_id, "sweep-1", "proj")
        assert (started.display_name, list(started.tags)) == ("demo pretrain p1p2p3p4", ["demo", "pretrain", "mine"])
        config = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert {name: config[name] for name in (*about, "ranks")} == {**about, "ranks": 2}
        # What the user typed, and not the process that happens to train.
        environment = next(r.environment for r in records if r.HasField("environment"))
        assert [environment.program, *environment.args] == shlex.split(command)
        used, made = references(records)
        assert used == {"shards-s1": ("dataset", "s3://b/shards/s1", {"digest": "d1g3s7" * 10})}
        made_from = {
            "shards": {"digest": "d1g3s7" * 10, "url": "s3://b/shards/s1"},
            "settings": {"digest": "5e77", "url": None},
        }
        assert made == {"pretrain-p1": ("model", "file:///a%20store/pretrain/p1", {"made_from": made_from})}
    histories = [dict(history(records)) for records in attempts]
    assert histories[0] == {step: math.pi / step for step in (1, 2, 3)}
    assert histories[1] == {step: math.pi / step for step in (3, 4, 5)}
    assert not [p for p in tmp_path.rglob("*") if p.is_symlink()]  # a published artifact has none
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def references(records: list[Any]) -> list[dict[str, tuple[str, str, Any]]]:
    """What the run used and what it made: {name: (type, where it is, metadata)} of both."""
    found: list[dict[str, tuple[str, str, Any]]] = [{}, {}]
    for artifact in (record.artifact for record in records if record.HasField("artifact")):
        if artifact.type == "run_table":  # what a logged table is kept as
            continue
        [entry] = artifact.manifest.contents
        one = (artifact.type, entry.ref, json.loads(artifact.metadata))
        found[0 if artifact.use_after_commit else 1][artifact.name] = one
    return found


def history(records: list[Any]) -> list[tuple[int, float]]:
    found = []
    for record in records:
        if record.HasField("history"):
            items = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            found.append((items["_step"], items["loss"]))
    return found


def wandb_records(path: Path) -> list[Any]:
    """The records of a .wandb file: a 7-byte header, then a log in 32 KiB blocks as LevelDB's."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, records, parts = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records
