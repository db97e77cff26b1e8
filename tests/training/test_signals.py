"""Signals: the first is a wish, its echoes are nothing, and a user who insists is obeyed."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pipelines.training import signals as module
from pipelines.training.signals import catch_signals


def test_the_first_signal_is_remembered_and_its_echoes_do_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals() as signals:
        assert signals.caught is None
        os.kill(os.getpid(), signal.SIGINT)
        for echo in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), echo)
        assert signals.caught == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_well_after_the_first_signal_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_OF_ONE_WISH", 0.0)
    with catch_signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_a_thread_signals_are_left_to_whoever_started_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with catch_signals() as signals:
            seen.append((signal.getsignal(signal.SIGTERM), signals.caught))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
