"""How a run is shown to people."""

from __future__ import annotations

import io
import sys

import pytest

from p2p.wire.control_messages import ChainMove, Progress
from petalctl.train_command import _tell_progress
from petalctl.training.display import (
    BarDisplay,
    Display,
    JsonDisplay,
    LineDisplay,
    SmoothedLoss,
    make_display,
)
from petalctl.training.trainer import StepReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(step: int, loss: float = 2.0) -> StepReport:
    return StepReport(step=step, loss=loss, lr=0.1, gradient_norm=1.0, tokens_per_s=123.4)


def move(old: str, new: str) -> Progress:
    told = ChainMove(
        start=1,
        end=2,
        old=(old,),
        new=(new,),
        reason="peer_unreachable",
        silent_s=0.0,
        pause_s=0.5,
        replayed_tokens=0,
        handed_over_tokens=0,
    )
    return Progress(job=1, event="moved", text="it moved", move=told)


def waiting() -> Progress:
    return Progress(job=1, event="waiting", text="nobody holds\x1b[2J 1:2")


def show(display: Display) -> None:
    on_progress = _tell_progress(display)
    with display:
        display.on_stage("held-out loss 0 of 3")
        display.on_eval(0, 3.5)
        for _ in range(3):
            on_progress(waiting())
            on_progress(move("a" * 20, "a" * 20))
        on_progress(move("a" * 20, "b" * 20))
        display.on_step(report(1))
        display.on_saved(1)
        on_progress(waiting())
        display.on_step(report(2))


def test_lines_tell_the_news_once_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    show(LineDisplay(2))
    assert capsys.readouterr().err.splitlines() == [
        "held-out loss after step 0: 3.5000",
        "waiting: nobody holds␛[2J 1:2",
        "moved: blocks 1:2 moved from …aaaaaa to …bbbbbb, 500 ms (peer unreachable)",
        "step 1 of 2: loss 2.0000, 123 tokens/s",
        "waiting: nobody holds␛[2J 1:2",
        "step 2 of 2: loss 2.0000, 123 tokens/s",
    ]


def test_lines_are_few_in_long_runs(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay(1000)
    for step in range(1, 1001):
        display.on_step(report(step))
    assert len(capsys.readouterr().err.splitlines()) == 20


def test_bar_has_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    display = make_display(steps=2, done=0, wants_json=False)
    assert isinstance(display, BarDisplay)
    show(display)
    shown = terminal.getvalue()
    assert shown.count("waiting: nobody holds␛[2J 1:2") == 2
    assert "held-out loss after step 0: 3.5000" in shown
    assert "2/2" in shown
    assert "held-out 3.500" in shown


def test_display_is_chosen_by_where_it_goes() -> None:
    assert isinstance(make_display(steps=2, done=0, wants_json=True), JsonDisplay)
    assert isinstance(make_display(steps=2, done=0, wants_json=False), LineDisplay)


def test_smoothed_loss_begins_at_the_first_and_follows() -> None:
    smoothed = SmoothedLoss()
    assert smoothed.add(4.0) == pytest.approx(4.0)
    assert smoothed.add(2.0) == pytest.approx((0.9 * 4 + 2) / 1.9)
    for _ in range(200):
        last = smoothed.add(1.0)
    assert last == pytest.approx(1.0)
