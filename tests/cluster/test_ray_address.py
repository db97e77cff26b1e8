"""Addresses that lead nowhere, and settings that would leak: found out before anything is sent."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.ray_jobs import RaySettings, saved_address, status
from cluster.submit import submit
from conf.refusal import Refusal
from tests.cluster.head import free_ports


@pytest.fixture
def silent_address() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def stranger_address() -> Iterator[str]:
    """A web server that is no Ray dashboard."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def send(address: str | None, **settings: object) -> int:
    return submit(RaySettings(address=address, **settings), ["run", "experiment=demo"])  # type: ignore[arg-type]


def test_an_address_that_refuses_is_an_error_with_a_remedy() -> None:
    with pytest.raises(Refusal, match=r"does not answer as a Ray dashboard.*ray status"):
        send(f"http://127.0.0.1:{free_ports(1)[0]}")


def test_an_address_that_stays_silent_is_an_error_within_ten_seconds(silent_address: str) -> None:
    began = time.monotonic()
    with pytest.raises(Refusal, match="does not answer as a Ray dashboard"):
        status("some-job", address=silent_address)
    assert time.monotonic() - began < 10


def test_a_server_that_is_no_dashboard_is_told_apart(stranger_address: str) -> None:
    with pytest.raises(Refusal, match="does not answer as a Ray dashboard"):
        status("some-job", address=stranger_address)


@pytest.mark.parametrize("address", ["ray://head:10001", "head:6379", "auto"])
def test_other_ports_of_ray_are_not_taken_for_the_dashboard(address: str) -> None:
    with pytest.raises(Refusal, match=r"http://HOST:8265"):
        send(address)


def test_no_address_at_all_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(Refusal, match=r"address=http://HOST:8265"):
        send(None)


def test_a_value_among_the_names_to_pass_is_refused_and_not_repeated() -> None:
    with pytest.raises(Refusal, match="names of environment variables") as caught:
        RaySettings(pass_env=("WANDB_API_KEY=0123456789abcdef",))
    assert "0123456789abcdef" not in str(caught.value)


def test_a_relative_store_is_refused() -> None:
    with pytest.raises(Refusal, match="vanish"):
        submit(RaySettings(), ["run", "experiment=demo", "store=runs"], dry_run=True)


def test_a_dry_run_needs_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(RaySettings(), ["run", "experiment=demo", "corpus.paths=[a b]"], dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "python -m pipelines run experiment=demo 'corpus.paths=[a b]' \"store=$HOME/athanor/runs\"" in printed


def test_an_unknown_job_asks_for_its_address(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(Refusal, match="address="):
        saved_address("athanor-demo-00000000")
