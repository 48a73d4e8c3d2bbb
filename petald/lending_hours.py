"""Hours of the day in which to lend, as a person writes them: ``22:00-08:00``.

Pure, and by what the clock on the wall says: on the night that has 02:30 twice, a window that
begins then begins twice; on the one that has no 02:30, it begins at 03:00.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import time

DAY_MINUTES = 24 * 60
_WINDOW = re.compile(r"([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})")


@dataclass(frozen=True, slots=True)
class Window:
    """From one minute of the day up to another; over midnight where the first is not earlier.

    Attributes:
        start: the first minute within.
        end: the first one after it, up to 1440, which is midnight.
    """

    start: int
    end: int

    def contains(self, minute: int) -> bool:
        """Whether a minute of the day is within."""
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


def parse_hours(texts: Sequence[str]) -> tuple[Window, ...]:
    """Reads the windows of a day.

    Raises:
        ValueError: one is none; the text says what was expected.
    """
    windows = []
    for text in texts:
        match = _WINDOW.fullmatch(text.replace(" ", ""))
        numbers = [int(part) for part in match.groups()] if match else [99] * 4
        start, end = (60 * hour + minute for hour, minute in (numbers[:2], numbers[2:]))
        is_right = start < DAY_MINUTES and end <= DAY_MINUTES and max(numbers[1], numbers[3]) < 60
        if not is_right or start == end:
            raise ValueError(f'{text!r} are no hours of the day; write them like "22:00-08:00"')
        windows.append(Window(start, end))
    return tuple(windows)


def is_within(windows: Sequence[Window], at: time) -> bool:
    """Whether a time of the day is in one of the windows; any is, where there is none."""
    minute = 60 * at.hour + at.minute
    return not windows or any(window.contains(minute) for window in windows)


def next_start(windows: Sequence[Window], at: time) -> time:
    """When, by the clock on the wall, the next window begins; there must be one."""
    minute = 60 * at.hour + at.minute
    ahead = min((window.start - minute - 1) % DAY_MINUTES for window in windows)
    start = (minute + 1 + ahead) % DAY_MINUTES
    return time(start // 60, start % 60)


def format_time(at: time) -> str:
    """Hours and minutes."""
    return f"{at.hour:02d}:{at.minute:02d}"
