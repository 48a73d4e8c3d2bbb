"""When to lend: hours, load and the owner's word, against made-up days and load curves."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petald.config import LendConfig
from petald.lending import LEND, MAX_CHECK_S, Lending, LoadGate, Pause, Why
from petald.lending_hours import is_within, next_start, parse_hours

NOON = datetime(2025, 6, 2, 12, tzinfo=UTC)
LONDON = ZoneInfo("Europe/London")


@pytest.mark.parametrize(
    ("texts", "inside", "outside"),
    [
        (["22:00-08:00"], ["22:00", "23:59", "00:00", "07:59"], ["08:00", "12:00", "21:59"]),
        (["12:30-13:30"], ["12:30", "13:29"], ["12:29", "13:30", "00:00"]),
        (["0:00-24:00"], ["00:00", "23:59"], []),
        (["20:00-24:00", "00:00 - 06:00"], ["20:00", "05:59"], ["06:00", "19:59"]),
        (["22:00-00:00"], ["22:00", "23:59"], ["00:00"]),
        ([], ["00:00", "12:00"], []),
    ],
)
def test_hours(texts: list[str], inside: list[str], outside: list[str]) -> None:
    windows = parse_hours(texts)
    assert all(is_within(windows, time.fromisoformat(text)) for text in inside)
    assert not any(is_within(windows, time.fromisoformat(text)) for text in outside)


@pytest.mark.parametrize(
    "text",
    ["", "22-08", "22:00", "22:00-24:01", "24:00-08:00", "08:60-09:00", "8:00-8:00", "a:b-c"],
)
def test_what_is_no_hours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="22:00-08:00"):
        parse_hours([text])


minutes = st.integers(0, 1439)


@given(minutes, minutes, minutes)
def test_the_next_window_begins_when_it_is_said_to(start: int, end: int, now: int) -> None:
    if start == end:
        return
    text = f"{start // 60:02d}:{start % 60:02d}-{end // 60:02d}:{end % 60:02d}"
    windows = parse_hours([text])
    at = time(now // 60, now % 60)
    begins = next_start(windows, at)
    assert is_within(windows, begins)
    if not is_within(windows, at):
        later = datetime.combine(NOON, at)
        while later.time() != begins:
            assert not is_within(windows, later.time())
            later += timedelta(minutes=1)


@pytest.mark.parametrize(
    "day", [datetime(2025, 3, 29), datetime(2025, 10, 25), datetime(2025, 7, 1)]
)
@pytest.mark.parametrize("hours", ["22:00-08:00", "01:30-03:00", "23:30-01:15"])
def test_hours_go_by_the_clock_on_the_wall_when_it_is_changed(day: datetime, hours: str) -> None:
    lending = Lending(LendConfig(hours=(hours,)))
    start, end = (time.fromisoformat(text) for text in hours.split("-"))
    at = day.replace(hour=12, tzinfo=LONDON).timestamp()
    waits_until: float | None = None
    for _ in range(24 * 60):
        wall = datetime.fromtimestamp(at, LONDON)
        minute = wall.time()
        is_in = start <= minute < end if start < end else minute >= start or minute < end
        decision = lending.decide(wall)
        assert decision.lends is is_in
        assert (decision.why is Why.HOURS) is not is_in
        assert 0 < decision.check_in_s <= MAX_CHECK_S
        if decision.ends_in_s is not None:
            waits_until = waits_until or at + decision.ends_in_s
        elif waits_until is not None:
            if day.month == 7:  # else what was said by the clock on the wall changes with it
                assert at == waits_until
            waits_until = None
        at += 60


def test_the_owners_word_beats_all_and_ends_in_time() -> None:
    lending = Lending(LendConfig(hours=("13:00-14:00",)))
    assert lending.decide(NOON).why is Why.HOURS
    lending.on_pause(NOON.timestamp() + 5400)
    decision = lending.decide(NOON)
    assert (decision.why, decision.ends_in_s) == (Why.OWNER, 5400)
    assert decision.check_in_s == MAX_CHECK_S
    assert lending.decide(NOON + timedelta(minutes=89, seconds=59)).why is Why.OWNER
    assert lending.decide(NOON + timedelta(minutes=90)) == LEND
    lending.on_pause(None)
    decision = lending.decide(NOON + timedelta(days=300, minutes=90))
    assert (decision.why, decision.ends_in_s) == (Why.OWNER, None)
    lending.on_resume()
    assert lending.decide(NOON + timedelta(minutes=90)) == LEND
    assert lending.decide(NOON).why is Why.HOURS
    assert Lending(LendConfig(), Pause()).decide(NOON).why is Why.OWNER


def test_a_decision_that_is_asked_for_twice_is_the_same() -> None:
    lending = Lending(LendConfig(hours=("13:00-14:00",)), Pause(NOON.timestamp() + 1))
    for later_s in (0, 2, 1, 0):  # a clock may be set back, too
        wall = NOON + timedelta(seconds=later_s)
        assert lending.decide(wall) == lending.decide(wall)


loads = st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 30)), max_size=200)
windows_s = st.floats(1, 60)


@given(loads, st.floats(0.05, 0.95), windows_s, windows_s)
def test_no_load_makes_it_flap(
    curve: list[tuple[float, float]], max_load: float, busy_s: float, idle_s: float
) -> None:
    gate = LoadGate(max_load=max_load, busy_s=busy_s, idle_s=idle_s)
    now, changed_at, was_busy = 0.0, 0.0, False
    for load, over_s in curve:
        now += over_s
        gate.on_sample(load, over_s)
        if gate.is_busy is not was_busy:
            least_s = idle_s if was_busy else busy_s
            assert now - changed_at >= least_s - 1e-6
            changed_at, was_busy = now, gate.is_busy


@given(loads, st.floats(0.05, 0.9), windows_s, windows_s, st.booleans())
def test_a_steady_load_is_followed_in_bounded_time(
    curve: list[tuple[float, float]], max_load: float, busy_s: float, idle_s: float, is_high: bool
) -> None:
    gate = LoadGate(max_load=max_load, busy_s=busy_s, idle_s=idle_s)
    for load, over_s in curve:
        gate.on_sample(load, over_s)
    load = max_load + 0.05 if is_high else max_load * 0.9
    longest_s = busy_s + idle_s  # a change that was under way may come first
    waited_s = 0.0
    while gate.is_busy is not is_high or waited_s < longest_s:
        step_s = gate.window_s / 10
        waited_s += step_s
        gate.on_sample(load, step_s)
        # The oldest sample of before may be as long as a window.
        assert waited_s <= 3 * longest_s
    for _ in range(40):
        gate.on_sample(load, gate.window_s / 10)
        assert gate.is_busy is is_high


def test_load_is_averaged_over_the_window() -> None:
    lending = Lending(LendConfig(max_load=0.5, busy_s=10, idle_s=20))
    assert lending.sample_s == 1
    for _ in range(30):  # a short peak each ten seconds, and a long one
        lending.on_sample(0.1, 6)
        lending.on_sample(1.0, 4)
    assert lending.decide(NOON).lends
    lending.on_sample(0.1, 10)
    for second in range(10):
        lending.on_sample(1.0, 1)
        if second == 2:
            assert lending.decide(NOON).lends
    decision = lending.decide(NOON)
    assert decision.why is Why.LOAD
    assert "more than 50% of its device" in decision.text
    assert lending.sample_s == 2
    for _ in range(8):
        lending.on_sample(0.2, 2)
    lending.on_sample(None, 1000)  # nothing is known of this time, so it counts for nothing
    assert not lending.decide(NOON).lends
    for _ in range(2):
        lending.on_sample(0.2, 2)
    assert lending.decide(NOON).lends


def test_a_machine_that_slept_is_not_judged_by_the_night() -> None:
    lending = Lending(LendConfig(max_load=0.5, busy_s=10, idle_s=20))
    lending.on_sample(0.0, 8 * 3600)
    for _ in range(12):
        lending.on_sample(1.0, 1)
    assert not lending.decide(NOON).lends
