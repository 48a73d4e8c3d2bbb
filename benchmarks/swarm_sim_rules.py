"""The rules that are compared in simulated swarms: petald's own, and its ancestor's.

The ancestor's (Petals 2.x) is written from its description. A server always hosts as many blocks as
fit. It takes the window whose sorted throughputs per block come first in lexicographic order. Every
0 to 120 s it computes what the least-served block would have if it moved to its best window, and
then everyone else to theirs, until nobody would; if what there is now is less than 0.75 of that, it
restarts with the window that is best then, and serves nothing until that is loaded. What all would
come to is computed here once in 60 s for the whole swarm, not by every server: it depends on the
one who asks by its own part alone, and for 10,000 servers it takes a second.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.swarm_sim_directory import Span
from benchmarks.swarm_sim_world import BLOCKS, MakeRule, SimServer, World
from petald.block_load import BlockLoad, confirm_gaps, wants_whole
from petald.move_actions import FinishMove, MakeClaim, MoveSettings, StartMove, WithdrawClaim
from petald.move_planner import MovePlanner, next_look_s
from petald.span_choice import choose_span
from petald.swarm import Floats

ANCESTOR_QUALITY = 0.75
ANCESTOR_PERIOD_S = 120.0
ANCESTOR_SWEEPS = 10


def choose_own(world: World, server: SimServer) -> Span:
    return choose_span(read_load(world, server), server.capacity, rng=server.rng)


def read_load(world: World, server: SimServer, *, is_urgent: bool = False) -> BlockLoad:
    """What petald decides by."""
    load = world.directory.load_for(server.peer)
    if wants_whole(load, is_urgent=is_urgent):
        whole = world.directory.load_for(server.peer, whole=True)
        return confirm_gaps(load, whole, is_urgent=is_urgent)
    return load


class OwnRule:
    """Drives the real planner."""

    def __init__(self, world: World, server: SimServer, settings: MoveSettings) -> None:
        assert server.span is not None
        self._world, self._server = world, server
        self._planner = MovePlanner(
            server.peer,
            server.span,
            server.capacity,
            settings=settings,
            now=world.now,
            rng=server.rng,
        )
        self._seen = 0
        self._skew_ms = server.rng.randint(-1000, 1000)

    def next_look_at(self) -> float:
        deadline = self._planner.next_deadline()
        rhythm = self._world.now + next_look_s(self._seen, self._server.rng)
        return rhythm if deadline is None else min(deadline, rhythm)

    def on_loaded(self, span: Span) -> None:
        if self._planner.claim == span:
            self._planner.on_loaded(self._world.now)

    def on_measured(self) -> None:
        self._planner.set_capacity(self._server.capacity)

    def on_look(self) -> None:
        world, server, planner = self._world, self._server, self._planner
        load = read_load(world, server, is_urgent=planner.is_urgent)
        self._seen = world.directory.seen_by(server.peer)
        for action in planner.on_load(load, world.now):
            match action:
                case MakeClaim():
                    made_at_ms = int(world.now * 1e3) + self._skew_ms
                    world.publish(server, (action.start, action.end), made_at_ms)
                    planner.on_claimed(made_at_ms, world.now)
                case WithdrawClaim():
                    world.publish(server, None)
                case StartMove():
                    assert server.span is not None
                    world.load(server, (action.start, action.end), server.span)
                case FinishMove():
                    span = (action.start, action.end)
                    world.serve(server, span)
                    server.moved_at.append(world.now)
                    planner.on_moved(*span, world.now)
                    world.publish(server, None)


def own_rule(settings: MoveSettings) -> MakeRule:
    return lambda world, server: OwnRule(world, server, settings)


def choose_window(throughput_L: Floats, length: int) -> int:
    """The first block of the window that needs a server most, as the ancestor sees it."""
    windows = np.lib.stride_tricks.sliding_window_view(throughput_L, length)
    least = windows.min(axis=1)
    ties = np.flatnonzero(least == least.min())  # the least element decides nearly always
    if len(ties) == 1:
        return int(ties[0])
    needs = np.sort(windows[ties], axis=1)
    return int(ties[np.lexsort(needs.T[::-1])[0]])


def choose_ancestor(world: World, server: SimServer) -> Span:
    length = min(server.capacity.fit, BLOCKS)
    start = choose_window(world.directory.load_for(server.peer, whole=True).throughput_L, length)
    return start, start + length


class AncestorForecast:
    """What the least-served block would have if everybody moved."""

    def __init__(self) -> None:
        self._least, self._made_at = 0.0, -1e9

    def least(self, world: World) -> float:
        if world.now - self._made_at >= 60.0:
            self._least, self._made_at = self._forecast(world), world.now
        return self._least

    def _forecast(self, world: World) -> float:
        servers = world.directory.everyone()
        throughput_L = np.zeros(BLOCKS)
        for (start, end), speed in servers:
            throughput_L[start:end] += speed / (end - start)
        has_moved, sweeps = True, 0
        while has_moved and sweeps < ANCESTOR_SWEEPS:
            has_moved, sweeps = False, sweeps + 1
            world.rng.shuffle(servers)
            for number, ((start, end), speed) in enumerate(servers):
                length = end - start
                throughput_L[start:end] -= speed / length * 1.001  # stays where all is equal
                new = choose_window(throughput_L, length)
                throughput_L[start:end] += speed / length * 0.001
                throughput_L[new : new + length] += speed / length
                has_moved |= new != start
                servers[number] = ((new, new + length), speed)
        return float(throughput_L.min())


class AncestorRule:
    """Looks, and restarts."""

    def __init__(self, world: World, server: SimServer, forecast: AncestorForecast) -> None:
        self._world, self._server, self._forecast = world, server, forecast

    def next_look_at(self) -> float:
        return self._world.now + self._server.rng.uniform(0, ANCESTOR_PERIOD_S)

    def on_loaded(self, span: Span) -> None:
        raise AssertionError("it loads nothing while it serves")

    def on_measured(self) -> None:
        """What it does is computed anew at each look."""

    def on_look(self) -> None:
        world, server = self._world, self._server
        assert server.span is not None
        start, end = server.span
        others_L = world.directory.load_for(server.peer, whole=True).throughput_L
        share = server.measured.value / (end - start)
        now_L = others_L.copy()
        now_L[start:end] += share
        others_L[start:end] -= share * 0.001
        if choose_window(others_L, end - start) == start:
            return
        forecast = self._forecast.least(world)
        if forecast < 1e-3 or now_L.min() / forecast >= ANCESTOR_QUALITY - 1e-3:
            return
        world.serve(server, None)
        server.moved_at.append(world.now)
        world.start_anew(server)


def ancestor_rule() -> MakeRule:
    forecast = AncestorForecast()
    return lambda world, server: AncestorRule(world, server, forecast)


Rules = dict[str, tuple[Callable[[World, SimServer], Span], Callable[[], MakeRule]]]
RULES: Rules = {
    "petald": (choose_own, lambda: own_rule(MoveSettings())),
    "ancestor": (choose_ancestor, ancestor_rule),
}
