"""The table of speeds with failures: what is measured, and what is estimated."""

from __future__ import annotations

import pytest

from benchmarks.failures_draw import Strike
from benchmarks.failures_table import Run, Speeds, failure_cost_s, pair, print_speeds


def make_speeds() -> Speeds:
    """A step takes 0.1 s and a failure 2 s; nothing was measured at 0.0001."""
    undisturbed = [Run(128, 12.8), Run(128, 12.8)]
    disturbed = Run(128, 16.8, failures=2, unseen=[Strike(7, 1, 15, "a")])
    pair(disturbed, *undisturbed)
    return Speeds(128, 1, undisturbed, {"petald": {1e-4: [], 1e-2: [disturbed]}, "restart": {}})


def test_the_cost_of_a_failure_is_taken_from_where_most_were_measured() -> None:
    speeds = make_speeds()
    single = Run(128, 99.0, failures=1, paired_steps_per_s=10.0)
    speeds.runs["petald"][1e-3] = [single]
    assert failure_cost_s(speeds, "petald") == (pytest.approx(2.0), 1e-2)


def test_without_any_failure_there_is_no_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = make_speeds()
    speeds.runs["petald"] = {1e-4: [], 1e-2: []}
    print_speeds(speeds)
    assert "~" not in (printed := capsys.readouterr().out)
    assert printed.count("no estimate") == 2


def test_a_table_marks_estimates_and_tells_what_did_not_show(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_speeds(make_speeds())
    printed = capsys.readouterr().out
    estimate, measured = [line for line in printed.splitlines() if line.startswith("petald   ")]
    assert "~0.994" in estimate  # 0.1 s against 0.1 s + 3 * 0.0001 * 2 s
    assert "estimate" in estimate
    assert "0.762" in measured
    assert "published 0.30" in measured
    assert "petald: 1 of 2 failures showed as a move; not so: step 7 hop 1" in printed
