"""How a training run is shown: a bar on a terminal, lines elsewhere, JSON for programs.

What comes from elsewhere is made harmless before it is shown.
"""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from petalctl.terminal import neutralise_line, tell
from petalctl.training.trainer import Listener, StepReport

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINES_OF_A_RUN = 20
SMOOTHING = 0.9
"""How much of the loss that is shown is the one shown before, once there were many."""


class Display(Listener, Protocol):
    """Shows a run; use as a context manager."""

    def __enter__(self) -> Self:
        """Begins."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the terminal as it was."""

    def on_note(self, event: str, text: str) -> None:
        """Something that the user should know."""


def make_display(*, steps: int, done: int, wants_json: bool) -> Display:
    """The display for what standard error is.

    Args:
        steps: of the whole run.
        done: of them before.
        wants_json: tell programs, on standard output.
    """
    if wants_json:
        return JsonDisplay()
    if sys.stderr.isatty():
        return BarDisplay(steps, done)
    return LineDisplay(steps)


class SmoothedLoss:
    """The mean of the losses so far, of which older ones count less and less."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    def add(self, loss: float) -> float:
        """Takes a loss; gives the mean."""
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._sum / self._weight


class _Notes:
    """Notes for people: none twice between two steps, for a pass may be tried again and again."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def is_new(self, text: str) -> bool:
        """Whether it was not told since the last step."""
        is_new = text not in self._told
        self._told.add(text)
        return is_new

    def forget(self) -> None:
        """A step was done."""
        self._told.clear()


class _Plain:
    """What the displays without a bar have in common: nothing is to be left as it was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def on_stage(self, text: str) -> None:
        pass

    def on_saved(self, step: int) -> None:
        pass


class JsonDisplay(_Plain):
    """One JSON object on each line of standard output."""

    def on_step(self, report: StepReport) -> None:
        """Prints a step."""
        print_event(
            "step",
            step=report.step,
            loss=report.loss,
            lr=report.lr,
            gradient_norm=report.gradient_norm,
            tokens_per_s=report.tokens_per_s,
        )

    def on_eval(self, step: int, loss: float) -> None:
        """Prints a held-out loss."""
        print_event("eval", step=step, loss=loss)

    def on_saved(self, step: int) -> None:
        """Prints that a checkpoint was saved."""
        print_event("saved", step=step)

    def on_note(self, event: str, text: str) -> None:
        """Prints it."""
        print_event(event, text=text)


class LineDisplay(_Plain):
    """A line on standard error now and then.

    Args:
        steps: of the whole run.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._every = max(1, steps // LINES_OF_A_RUN)
        self._smoothed = SmoothedLoss()
        self._notes = _Notes()

    def on_step(self, report: StepReport) -> None:
        """Tells of every so many steps."""
        self._notes.forget()
        loss = self._smoothed.add(report.loss)
        if report.step % self._every == 0 or report.step == self._steps:
            tell(
                f"step {report.step} of {self._steps}: loss {loss:.4f}, "
                f"{report.tokens_per_s:.0f} tokens/s"
            )

    def on_eval(self, step: int, loss: float) -> None:
        """Tells of it."""
        tell(f"held-out loss after step {step}: {loss:.4f}")

    def on_note(self, event: str, text: str) -> None:
        """Tells of it."""
        if self._notes.is_new(text):
            tell(f"{event}: {text}")


class BarDisplay:
    """A bar on the terminal, with lines above it for what stays.

    Args:
        steps: of the whole run.
        done: of them before.
    """

    def __init__(self, steps: int, done: int) -> None:
        self._bars = _make_bars()
        self._task = self._bars.add_task(
            "training", total=steps, completed=done, loss="", held_out="", speed=""
        )
        self._smoothed = SmoothedLoss()
        self._notes = _Notes()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def on_stage(self, text: str) -> None:
        """Shows what is done instead of steps."""
        self._bars.update(self._task, description=text)

    def on_step(self, report: StepReport) -> None:
        """Moves the bar."""
        self._notes.forget()
        self._bars.update(
            self._task,
            completed=report.step,
            description="training",
            loss=f"loss {self._smoothed.add(report.loss):.3f}",
            speed=f"{report.tokens_per_s:.0f} tok/s",
        )

    def on_eval(self, step: int, loss: float) -> None:
        """Shows it in the bar, and leaves a line."""
        self._bars.update(self._task, description="training", held_out=f"held-out {loss:.3f}")
        self._print(f"held-out loss after step {step}: {loss:.4f}")

    def on_saved(self, step: int) -> None:
        """Saving takes no time to speak of."""

    def on_note(self, event: str, text: str) -> None:
        """Leaves a line."""
        if self._notes.is_new(text):
            self._print(f"{event}: {text}")

    def _print(self, text: str) -> None:
        self._bars.console.print(neutralise_line(text), markup=False, highlight=False)


def print_event(event: str, **fields: object) -> None:
    """One line of JSON on standard output."""
    print(json.dumps({"event": event, **fields}), flush=True)


def _make_bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[held_out]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
