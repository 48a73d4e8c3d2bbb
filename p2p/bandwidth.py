"""How fast bytes reach the other end of one connection, from its own traffic. Pure.

A large write goes out between two pings. Each is answered by the other side's muxer as soon as it
has arrived, whatever the application there does, so the time between the two answers is the time
that the bytes between them took: over the whole way, relays and encryption included. What is
measured is what one direction carries beside everything else that uses it.
"""

from __future__ import annotations

import statistics
from collections import deque

LEAST_BYTES = 32 * 1024
"""A smaller write tells little: it fits into what a link passes on at once."""

KEPT = 5
"""The median of so many counts: one slow answer, or one burst that a link lets through, is no
measure of it."""

FIRST_VALUE = 1 << 31
"""Of the pings that enclose a write; smaller values are for other pings."""

_LEAST_S = 1e-6
_VALUES = 1 << 31


class Bandwidth:
    """What the pings round the writes of one connection tell; one write is measured at a time."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=KEPT)
        self._value = 0
        self._size_bytes = 0
        self._is_asking = False
        self._began_at: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """What the connection carries; none where nothing was measured yet."""
        return statistics.median(self._rates) if self._rates else None

    def on_write(self, size_bytes: int) -> tuple[int, int] | None:
        """A write is about to go out: the values of the pings to put round it, or none."""
        if self._is_asking or size_bytes < LEAST_BYTES:
            return None
        self._is_asking = True
        self._size_bytes = size_bytes
        self._began_at = None
        self._value = (self._value + 2) % _VALUES
        return FIRST_VALUE + self._value, FIRST_VALUE + self._value + 1

    def on_pong(self, value: int, now: float) -> None:
        """A ping was answered; those of others are passed over."""
        if not self._is_asking:
            return
        if value == FIRST_VALUE + self._value:
            self._began_at = now
        elif value == FIRST_VALUE + self._value + 1 and self._began_at is not None:
            self._rates.append(self._size_bytes / max(now - self._began_at, _LEAST_S))
            self._is_asking = False
