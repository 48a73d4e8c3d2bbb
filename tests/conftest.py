"""What holds for every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Lets the processes that tests start hear SIGINT and SIGHUP.

    A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP ignored; children
    inherit that, and a test that interrupts them would wait in vain.
    """
    before = {
        number: signal.signal(number, wanted)
        for number, wanted in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGHUP, signal.SIG_DFL),
        )
        if signal.getsignal(number) == signal.SIG_IGN
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
