"""Signals that end long work: the first in good order, the second at once."""

from __future__ import annotations

import os
import signal

import pytest

from petalctl.stop_signals import StopRequested, StopSignals

NUMBERS = [signal.SIGINT, signal.SIGTERM]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    for _ in range(1000):  # until the interpreter looks
        pass


@pytest.mark.parametrize("number", NUMBERS)
def test_first_breaks_off_what_may_be(number: signal.Signals) -> None:
    with StopSignals() as signals:
        with pytest.raises(StopRequested), signals.may_break_off():
            send(number)
        assert signals.has_come


@pytest.mark.parametrize("number", NUMBERS)
def test_first_waits_for_the_end_of_what_may_not(number: signal.Signals) -> None:
    with StopSignals() as signals:
        send(number)
        with pytest.raises(StopRequested):
            signals.check()
        reached = False
        with pytest.raises(StopRequested), signals.may_break_off():
            reached = True
        assert not reached


def test_second_does_not_wait() -> None:
    with StopSignals():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as raised:
            send(signal.SIGINT)
    assert not isinstance(raised.value, StopRequested)


def test_interrupt_that_another_took_counts_as_the_first() -> None:
    with StopSignals() as signals:
        with pytest.raises(StopRequested), signals.may_break_off():
            raise KeyboardInterrupt
        assert signals.has_come
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_are_as_before_in_the_end() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with StopSignals() as signals:
        assert [signal.getsignal(number) for number in NUMBERS] != before
        with pytest.raises(StopRequested), signals.may_break_off():
            send(signal.SIGINT)
    assert [signal.getsignal(number) for number in NUMBERS] == before
