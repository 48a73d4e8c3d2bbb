"""The table of speeds with failures: how runs become ratios, and ratios lines; pure.

*pooled* is what the published figures mean: steps by seconds over all rounds, divided by the same
of the runs without failures. *paired* divides each run by the mean speed of the runs without
failures before and after it, and gives the median with the least and the most; where most rounds
have no failure it is near 1, whatever a failure costs. Where not even one failure is to be expected
in all rounds, nothing is measured: what one failure cost where most were measured, times the
probability, gives an estimate, which is marked with ``~``.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.failures_draw import HOPS, Strike, count_expected
from p2p.wire.control_messages import ChainMove

AIMS = {(128, 1e-3): 0.97, (128, 1e-2): 0.80, (1024, 1e-3): 0.90, (1024, 1e-2): 0.60}
PUBLISHED = {(128, 1e-3): 0.93, (128, 1e-2): 0.30, (1024, 1e-3): 0.73, (1024, 1e-2): 0.20}
"""Of the ancestor's algorithm, relative to its own speed without failures (arXiv:2312.08361)."""

EFFECTS = {"petald": "showed as a move", "restart": "broke connections"}
"""What must be seen of a failure."""


@dataclass
class Run:
    """One run of one strategy.

    Attributes:
        steps: from token to token.
        failures: that were caused.
        unseen: those of them that had no effect (see `EFFECTS`).
        unexplained: moves that none of them explains.
        paired_steps_per_s: without failures, just before and after.
    """

    steps: int
    seconds: float
    failures: int = 0
    unseen: list[Strike] = field(default_factory=list)
    unexplained: list[ChainMove] = field(default_factory=list)
    paired_steps_per_s: float = 0.0

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds


@dataclass
class Speeds:
    """What was measured at one length.

    Attributes:
        undisturbed: petald's runs without failures; there is one more than there are rounds, and
            one within each.
        runs: by strategy and probability; empty where no failure was to be expected.
    """

    length: int
    rounds: int
    undisturbed: list[Run] = field(default_factory=list)
    runs: dict[str, dict[float, list[Run]]] = field(default_factory=dict)


def pool(runs: Sequence[Run]) -> float:
    """Steps per second over all of them."""
    return sum(run.steps for run in runs) / sum(run.seconds for run in runs)


def pair(run: Run, before: Run, after: Run) -> None:
    run.paired_steps_per_s = pool([before, after])


def failure_cost_s(speeds: Speeds, strategy: str) -> tuple[float, float] | None:
    """What one failure costs, and the probability at which most were measured to tell it."""
    counts = {
        p: sum(run.failures for run in runs) for p, runs in speeds.runs[strategy].items() if runs
    }
    if not any(counts.values()):
        return None
    p = max(counts, key=lambda p: counts[p])
    lost_s = sum(
        run.seconds - run.steps / run.paired_steps_per_s for run in speeds.runs[strategy][p]
    )
    return lost_s / counts[p], p


def print_speeds(speeds: Speeds) -> None:
    undisturbed = [run.steps_per_s for run in speeds.undisturbed]
    print(
        f"\n{speeds.length} tokens, {speeds.rounds} round(s); without failures petald makes"
        f" {pool(speeds.undisturbed):.2f} steps/s; its runs, n = {len(undisturbed)}:"
        f" {_spread(undisturbed)}"
    )
    print(f"{'':9} {'p':6} {'failures':>17} {'steps/s':>8} {'pooled':>7}  {'paired':21}")
    for strategy, by_probability in speeds.runs.items():
        for p, runs in by_probability.items():
            print(_format_line(speeds, strategy, p, runs).rstrip())
    for strategy, effect in EFFECTS.items():
        runs = [run for runs in speeds.runs[strategy].values() for run in runs]
        _print_effects(strategy, effect, runs)
    _print_unexplained("without failures", speeds.undisturbed)
    _print_unexplained(
        "with failures", [r for runs in speeds.runs["petald"].values() for r in runs]
    )


def _format_line(speeds: Speeds, strategy: str, p: float, runs: Sequence[Run]) -> str:
    undisturbed = pool(speeds.undisturbed)
    expected = count_expected(speeds.length, p, speeds.rounds)
    line = f"{strategy:9} {p:<6g} "
    if strategy == "no cache":
        line += f"{'by arithmetic' if p else '':>17} "
    else:
        line += f"{sum(run.failures for run in runs):4} of {expected:6.2f} due "
    if runs:
        ratios = [run.steps_per_s / run.paired_steps_per_s for run in runs]
        line += f"{pool(runs):8.2f} {pool(runs) / undisturbed:7.3f}  {_spread(ratios):21}"
    else:
        line += _format_estimate(speeds, strategy, p)
    if strategy == "petald" and (speeds.length, p) in AIMS:
        line += f" aim {AIMS[speeds.length, p]:.2f}, published {PUBLISHED[speeds.length, p]:.2f}"
    return line


def _format_estimate(speeds: Speeds, strategy: str, p: float) -> str:
    found = failure_cost_s(speeds, strategy)
    if found is None:
        return "no estimate: too few rounds for one failure at any p"
    cost_s, source = found
    if cost_s <= 0:
        return f"no estimate: runs with failures at p = {source:g} were no slower than without"
    undisturbed = pool(speeds.undisturbed)
    estimate = 1 / (1 / undisturbed + HOPS * p * cost_s)
    return (
        f"{estimate:8.2f} {f'~{estimate / undisturbed:.3f}':>7}  estimate, from"
        f" {1e3 * cost_s:.0f} ms for a failure at p = {source:g}"
    )


def _print_effects(strategy: str, effect: str, runs: Sequence[Run]) -> None:
    total = sum(run.failures for run in runs)
    unseen = [strike for run in runs for strike in run.unseen]
    line = f"{strategy}: {total - len(unseen)} of {total} failures {effect}"
    if unseen:
        line += "; not so: " + ", ".join(f"step {at.step} hop {at.hop}" for at in unseen)
    print(line)


def _print_unexplained(what: str, runs: Sequence[Run]) -> None:
    reasons = Counter(move.reason for run in runs for move in run.unexplained)
    if reasons:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        print(f"petald {what}: moves that no caused failure explains: {told}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
