"""How long a pause lasts, as a person says it: ``for 1h30m``, ``until 08:00``, or nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from petalctl.errors import CommandError

MAX_PAUSE_S = 366 * 86400.0
ADVICE = 'say "for 2h", "for 1h30m", "until 08:00", or nothing for a pause until `petalctl resume`'

_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "min": 60, "s": 1}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(d|h|min|m|s)")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})")


def parse_pause(words: Sequence[str], now: datetime) -> float | None:
    """Seconds that a pause lasts; none where it lasts until it is ended.

    Args:
        words: what followed the command.
        now: here, by the clock on the wall.

    Raises:
        CommandError: it is no duration and no time of the day.
    """
    if not words:
        return None
    rest = "".join(words[1:])
    if words[0] == "for":
        return _duration_s(rest)
    if words[0] == "until":
        return _wait_s(rest, now)
    raise _wrong(f"{' '.join(words)!r} does not say how long")


def _duration_s(text: str) -> float:
    parts = _PART.findall(text)
    if not parts or "".join(map("".join, parts)) != text:
        raise _wrong(f"{text!r} is no duration")
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if not 0 < seconds <= MAX_PAUSE_S:
        raise _wrong(f"{text!r} is not between a second and 366 days")
    return seconds


def _wait_s(text: str, now: datetime) -> float:
    match = _CLOCK.fullmatch(text)
    if match is None or int(match[1]) > 23 or int(match[2]) > 59:
        raise _wrong(f"{text!r} is no time of the day")
    wall = now.replace(tzinfo=None)
    then = wall.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    if then <= wall:
        then += timedelta(days=1)
    # By way of the epoch: a night in which the clocks change is longer or shorter.
    return then.timestamp() - wall.replace(fold=now.fold).timestamp()


def format_end(ends_in_s: float, now: datetime) -> str:
    """The time at which something ends; with its day, where that is not within one."""
    end = datetime.fromtimestamp(now.timestamp() + ends_in_s)
    return f"{end:%H:%M}" if ends_in_s < 86400 else f"{end:%A %d %B, %H:%M}"


def _wrong(text: str) -> CommandError:
    return CommandError(f"{text}; {ADVICE}", code="usage", exit_status=2)
