"""Whether to lend the device now: the owner's word, the hours of the day, and who else uses it.

Pure. The owner's pause beats all; outside the hours nothing is lent; within them, not while others
use more than their share. The load of others is looked at over a window of time that begins anew
with every change, so that whatever the load does, the server is away for at least ``idle_s`` and
back for at least ``busy_s`` for its sake. Under a steady load above the threshold it yields once
``busy_s`` and one sample have passed.

Invariant: what `decide` says depends on what it was told alone, and is the same when asked twice.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import islice

from petald.config import LendConfig
from petald.lending_hours import format_time, is_within, next_start, parse_hours

SAMPLES = 10
"""In a window: each counts for a tenth, and what began is noticed a tenth late at most."""

MAX_CHECK_S = 60.0
"""A clock may be set, or a machine sleep: what waits for a time of the day looks up each minute."""

NEVER = 1.0
"""Nobody uses more of a device than all of it: with this for ``max_load`` it is never looked at."""


class Why(StrEnum):
    """Why nothing is lent."""

    OWNER = "owner"
    HOURS = "hours"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class Pause:
    """The owner's word that nothing is to be lent.

    Attributes:
        until: seconds since the epoch; none until the owner takes it back.
    """

    until: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What is so now.

    Attributes:
        why: why nothing is lent; none while something is.
        text: the same as a sentence for the owner; empty while something is lent.
        ends_in_s: when it ends by itself, where that is known.
        check_in_s: no later than then it may change without a new sample.
    """

    why: Why | None
    text: str
    ends_in_s: float | None
    check_in_s: float

    @property
    def lends(self) -> bool:
        """Whether the device is lent."""
        return self.why is None


LEND = Decision(None, "", None, MAX_CHECK_S)


class LoadGate:
    """Whether others use too much of the device, without flapping.

    Args:
        max_load: the share above which it is too much.
        busy_s: the window over which their mean use must be above it, to begin with.
        idle_s: the window over which it must not, to end.
    """

    def __init__(self, *, max_load: float, busy_s: float, idle_s: float) -> None:
        self._max_load = max_load
        self._busy_s = busy_s
        self._idle_s = idle_s
        self._samples: deque[tuple[float, float]] = deque()
        self.is_busy = False

    @property
    def window_s(self) -> float:
        """Over how long the use by others is averaged now."""
        return self._idle_s if self.is_busy else self._busy_s

    def on_sample(self, load: float, over_s: float) -> None:
        """Notes what share of the device others used, over the time since the last sample.

        A time that nothing is known of is left out: it neither counts nor ends anything.
        """
        if over_s <= 0:
            return
        # A machine that slept comes back with one long sample, which tells no more than a window's.
        self._samples.append((min(max(load, 0.0), 1.0), min(over_s, self.window_s)))
        # Added up in one order always: else the sum may fall short of the window by a last bit.
        while sum(s for _, s in islice(self._samples, 1, None)) >= self.window_s:
            self._samples.popleft()
        known_s = sum(s for _, s in self._samples)
        if known_s < self.window_s:
            return
        mean = sum(load * s for load, s in self._samples) / known_s
        if (mean > self._max_load) is not self.is_busy:
            self.is_busy = not self.is_busy
            self._samples.clear()


class Lending:
    """Decides whether to lend.

    Args:
        config: the hours, and what is too much.
        pause: the owner's word, as it was left.
    """

    def __init__(self, config: LendConfig, pause: Pause | None = None) -> None:
        self.pause = pause
        self._windows = parse_hours(config.hours)
        self._hours = ", ".join(config.hours)
        self._config = config
        self._gate = LoadGate(max_load=config.max_load, busy_s=config.busy_s, idle_s=config.idle_s)

    def on_pause(self, until: float | None) -> None:
        """The owner says that nothing is to be lent, for some time or until further notice."""
        self.pause = Pause(until)

    def on_resume(self) -> None:
        """The owner takes that back."""
        self.pause = None

    @property
    def sample_s(self) -> float:
        """How often the use by others is to be looked at now."""
        return self._gate.window_s / SAMPLES

    def on_sample(self, load: float | None, over_s: float) -> None:
        """What share of the device others used since the last sample; none where unknown."""
        if load is not None:
            self._gate.on_sample(load, over_s)

    def decide(self, wall: datetime) -> Decision:
        """Whether to lend now.

        Args:
            wall: the date and time here, with its offset from UTC.
        """
        if self.pause is not None:
            until = self.pause.until
            if until is None:
                return Decision(Why.OWNER, "its owner paused it", None, MAX_CHECK_S)
            left_s = until - wall.timestamp()
            if left_s > 0:
                check_s = min(left_s, MAX_CHECK_S)
                return Decision(Why.OWNER, "its owner paused it", left_s, check_s)
        if not is_within(self._windows, wall.time()):
            start = next_start(self._windows, wall.time())
            wait_s = _seconds_to(start.hour * 60 + start.minute, wall)
            text = f"it serves at {self._hours} only; it comes back at {format_time(start)}"
            return Decision(Why.HOURS, text, wait_s, min(wait_s, MAX_CHECK_S))
        if self._gate.is_busy:
            text = (
                f"others use more than {self._config.max_load:.0%} of its device; it comes back "
                f"when they have not for {self._config.idle_s:g} s"
            )
            return Decision(Why.LOAD, text, None, MAX_CHECK_S)
        return LEND


def _seconds_to(minute: int, wall: datetime) -> float:
    """To the next such minute of the day, by the clock on the wall."""
    now_s = 3600 * wall.hour + 60 * wall.minute + wall.second + wall.microsecond / 1e6
    return (60 * minute - now_s) % 86400 or 86400.0
