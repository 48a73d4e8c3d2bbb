"""Ctrl-C and SIGTERM, for long work that is to be left in good order.

The first one breaks off what may be broken off, and is remembered where nothing may; a second one
ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(KeyboardInterrupt):
    """The user wants the work to end. No `Exception`, so that nothing on the way takes it."""


class StopSignals:
    """While the block runs, the signals are taken; elsewhere than on the main thread, they are not.

    Attributes:
        has_come: whether one has.
    """

    def __init__(self) -> None:
        self.has_come = False
        self._may_break_off = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as it was given
        self._before.clear()

    @contextmanager
    def may_break_off(self) -> Iterator[None]:
        """What is done in this block is of no use unless it is done to its end.

        A `KeyboardInterrupt` of somebody who took the signal meanwhile is the same.

        Raises:
            StopRequested: a signal has come, before or while it was done.
        """
        self._may_break_off = True
        try:
            self.check()
            yield
        except StopRequested:
            raise
        except KeyboardInterrupt as error:
            self._note()
            raise StopRequested from error
        finally:
            self._may_break_off = False

    def check(self) -> None:
        """Ends the work if a signal has come.

        Raises:
            StopRequested: it has.
        """
        if self.has_come:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note()
        if self._may_break_off:
            raise StopRequested

    def _note(self) -> None:
        """From now on a signal ends the process."""
        self.has_come = True
        if self._before:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
