"""Ctrl-C, when the first one shall only ask for an end, and the second shall not wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Interrupt:
    """Whether Ctrl-C was pressed."""

    has_come: bool = False


@contextmanager
def on_first_interrupt(action: Callable[[], None]) -> Iterator[Interrupt]:
    """While the block runs, the first SIGINT calls `action`; a second is a KeyboardInterrupt.

    So an answer that is being read is never cut in the middle of a frame. Elsewhere than on the
    main thread, nothing is changed.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt.has_come = True
        action()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def hold_interrupt() -> Iterator[None]:
    """The first SIGINT is put off to the block's end; a second is a KeyboardInterrupt.

    So a frame that is being written is never cut off.
    """
    with on_first_interrupt(_wait) as interrupt:
        yield
    if interrupt.has_come:
        signal.raise_signal(signal.SIGINT)


def _wait() -> None:
    """Does nothing."""
