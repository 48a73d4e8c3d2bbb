"""A simulated swarm on an event heap: servers that join, look, claim, load, move and die.

What they decide is decided by the real deciders (or by the ancestor's rule, for comparison); what
stands in for the rest is here. It is repeatable by seed. What is assumed:

- a server does 1 to 20 block-steps in a unit of time (log-uniform), and fits 2 to 20 blocks of 80
  (uniform), the one independent of the other;
- what it measures of itself errs by a tenth (log-normal), each minute anew; what it announces of
  that, and decides by, is what a server makes of it (`petald.steady_rate`);
- an announcement is to be seen after 0.3 to 2 s, one in twenty 15 s later, when it is repeated;
- a server that dies is seen for another 30 to 45 s (`petald.announcer`), or, where it leaves
  politely, as long as any other announcement;
- a view is read as often as a server does it (`petald.move_planner.next_look_s`);
- a block is loaded in 5 s: a 70B model's in 8 bits from a disk of 200 MB/s.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from benchmarks.swarm_sim_directory import Said, SimDirectory, Span, Views
from petald.block_load import Capacity
from petald.steady_rate import SteadyRate

BLOCKS = 80
SPEED_SPREAD = 20.0
LEAST_FIT, MOST_FIT = 2, 20
VISIBLE_S = (0.3, 2.0)
LOST, REPEATED_S = 0.05, 15.0
EXPIRY_S = (30.0, 45.0)
LOAD_BLOCK_S = 5.0
MEASURE_S = 60.0
SAMPLE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class SimSettings:
    """One run.

    Attributes:
        servers: how many there are, from when all have joined.
        seed: repeats it.
        join_s: they join within this time.
        settle_s: and have this time for it, until the churn begins.
        churn_s: for how long servers are replaced.
        replaced_per_hour: the part of them that is.
        crashes: of those that go, the part that does not say so.
        views: what a server sees of a large swarm.
        strike_s: how long after the settling all who hold some block die at once; none: never.
        error: the standard deviation of the logarithm of a measured speed.
    """

    servers: int
    seed: int
    join_s: float = 600.0
    settle_s: float = 2400.0
    churn_s: float = 3600.0
    replaced_per_hour: float = 1 / 3
    crashes: float = 0.5
    views: Views = Views.KIN
    strike_s: float | None = None
    error: float = 0.1


@dataclass(slots=True, eq=False)
class SimServer:
    """A server, as it really is, but for what it measured."""

    peer: str
    speed: float
    fit: int
    measured: SteadyRate
    rng: random.Random
    born_at: float
    rule: ServerRule | None = None
    span: Span | None = None
    is_alive: bool = True
    look_token: int = 0
    said_token: int = 0
    claim: tuple[Span | None, int] = (None, 0)
    moved_at: list[float] = field(default_factory=list)
    died_at: float | None = None

    @property
    def capacity(self) -> Capacity:
        """As far as it knows."""
        return Capacity(fit=self.fit, block_steps_per_s=self.measured.value)


class ServerRule(Protocol):
    """By which a server decides, after it has a first span."""

    def on_look(self) -> None:
        """It may look at the directory now."""

    def next_look_at(self) -> float:
        """When it wants to do so next."""

    def on_loaded(self, span: Span) -> None:
        """A span has been loaded."""

    def on_measured(self) -> None:
        """What the server knows of its own speed is another than before."""


class MakeRule(Protocol):
    """Makes the rule by which a server moves."""

    def __call__(self, world: World, server: SimServer) -> ServerRule: ...


class World:
    """The swarm.

    Args:
        settings: of the run.
        choose: the first span of a server that joins.
        make_rule: by which servers move.
    """

    def __init__(
        self,
        settings: SimSettings,
        *,
        choose: Callable[[World, SimServer], Span],
        make_rule: MakeRule,
    ) -> None:
        self.settings = settings
        self.rng = random.Random(f"{settings.servers} {settings.seed}")
        self.now = 0.0
        self.directory = SimDirectory(BLOCKS, SPEED_SPREAD**0.5, settings.views)
        self.servers: list[SimServer] = []
        self.throughput_L = np.zeros(BLOCKS)
        self.covering_L = np.zeros(BLOCKS, np.int64)
        self.fit = 0
        self.samples: list[Sample] = []
        self.gaps: list[tuple[float, float]] = []
        self._gap_since: float | None = 0.0
        self._choose, self._make_rule = choose, make_rule
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def run(self) -> None:
        settings = self.settings
        for _ in range(settings.servers):
            self.at(self.rng.uniform(0, settings.join_s), self._join)
        self.at(settings.settle_s, self._begin_churn)
        if settings.strike_s is not None:
            self.at(settings.settle_s + settings.strike_s, self._strike)
        self.at(SAMPLE_S, self._sample)
        until = settings.settle_s + settings.churn_s
        while self._heap and self._heap[0][0] <= until:
            self.now, _, do = heapq.heappop(self._heap)
            do()
        if self._gap_since is not None:
            self.gaps.append((self._gap_since, until))

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), do))

    # What servers do.

    def publish(self, server: SimServer, claim: Span | None, made_at_ms: int = 0) -> None:
        """Announces what holds now; it is to be seen a little later."""
        server.said_token += 1
        server.claim = claim, made_at_ms
        token = server.said_token
        said = Said(server.span, claim, made_at_ms, server.measured.value)

        def show() -> None:
            if server.said_token == token and server.is_alive:
                self.directory.put(server.peer, said)

        lost_s = REPEATED_S if self.rng.random() < LOST else 0.0
        self.at(self.now + self.rng.uniform(*VISIBLE_S) + lost_s, show)

    def serve(self, server: SimServer, span: Span | None) -> None:
        """From now on a server really serves a span, or none."""
        for old, sign in ((server.span, -1), (span, 1)):
            if old is not None:
                start, end = old
                self.throughput_L[start:end] += sign * server.speed / (end - start)
                self.covering_L[start:end] += sign
        server.span = span
        if self.covering_L.all():
            if self._gap_since is not None:
                self.gaps.append((self._gap_since, self.now))
            self._gap_since = None
        elif self._gap_since is None:
            self._gap_since = self.now

    def load(self, server: SimServer, span: Span, kept: Span = (0, 0)) -> None:
        """Loads a span, of which some blocks are there already."""
        new = set(range(*span)) - set(range(*kept))

        def done() -> None:
            if server.is_alive:
                if server.rule is None:
                    self._first_loaded(server, span)
                else:
                    server.rule.on_loaded(span)
                    self.schedule_look(server)

        self.at(self.now + LOAD_BLOCK_S * len(new), done)

    def schedule_look(self, server: SimServer) -> None:
        server.look_token += 1
        if server.rule is None:  # it begins anew
            return
        token = server.look_token

        def look() -> None:
            if server.is_alive and server.look_token == token:
                assert server.rule is not None
                server.rule.on_look()
                self.schedule_look(server)

        self.at(max(self.now, server.rule.next_look_at()), look)

    # What befalls them.

    def _join(self) -> None:
        rng = self.rng
        fit = rng.randint(LEAST_FIT, MOST_FIT)
        speed = SPEED_SPREAD ** rng.random()
        server = SimServer(
            peer=f"{rng.getrandbits(32):08x}-{len(self.servers)}",
            speed=speed,
            fit=fit,
            measured=SteadyRate(self._measure(speed)),
            rng=random.Random(rng.getrandbits(64)),
            born_at=self.now,
        )
        self.servers.append(server)
        self.fit += fit
        self.start_anew(server)
        self.at(self.now + MEASURE_S, lambda: self._measure_again(server))
        if self.now >= self.settings.settle_s:
            self._doom(server)

    def _measure(self, speed: float) -> float:
        return speed * math.exp(self.rng.gauss(0.0, self.settings.error))

    def _measure_again(self, server: SimServer) -> None:
        if not server.is_alive:
            return
        before = server.measured.value
        server.measured.on_measured(self._measure(server.speed), MEASURE_S)
        if server.measured.value != before and server.rule is not None:
            server.rule.on_measured()
            self.publish(server, *server.claim)
        self.at(self.now + MEASURE_S, lambda: self._measure_again(server))

    def start_anew(self, server: SimServer) -> None:
        """Chooses and loads a first span, which is announced as a claim meanwhile."""
        server.rule = None
        span = self._choose(self, server)
        self.publish(server, span, int(self.now * 1e3))
        self.load(server, span)

    def _first_loaded(self, server: SimServer, span: Span) -> None:
        self.serve(server, span)
        self.publish(server, None)
        server.rule = self._make_rule(self, server)
        self.schedule_look(server)

    def _strike(self) -> None:
        """All who serve one block die without a word, and nobody comes instead."""
        block = self.rng.randrange(BLOCKS)
        for server in self.servers:
            span = server.span
            if server.is_alive and span is not None and span[0] <= block < span[1]:
                self._die(server, is_crash=True, is_replaced=False)

    def _begin_churn(self) -> None:
        for server in self.servers:
            self._doom(server)

    def _doom(self, server: SimServer) -> None:
        life_s = self.rng.expovariate(self.settings.replaced_per_hour / 3600)

        def end() -> None:
            if server.is_alive:
                self._die(server, is_crash=self.rng.random() < self.settings.crashes)

        self.at(self.now + life_s, end)

    def _die(self, server: SimServer, *, is_crash: bool, is_replaced: bool = True) -> None:
        server.is_alive, server.died_at = False, self.now
        self.fit -= server.fit
        self.serve(server, None)
        seen_s = self.rng.uniform(*(EXPIRY_S if is_crash else VISIBLE_S))
        self.at(self.now + seen_s, lambda: self.directory.put(server.peer, None))
        if is_replaced:
            self.at(self.now + self.rng.uniform(0, 60), self._join)

    def _sample(self) -> None:
        total = float(self.throughput_L.sum())
        least = float(self.throughput_L.min()) if self.covering_L.all() else 0.0
        ratio = least * BLOCKS / max(total, 1e-9)
        self.samples.append(Sample(self.now, ratio, self.fit / BLOCKS))
        self.at(self.now + SAMPLE_S, self._sample)


@dataclass(frozen=True, slots=True)
class Sample:
    """How the swarm does at one time.

    Attributes:
        at: when.
        ratio: the throughput of the least-served block over the mean of all, of what serves now.
        times: how many times the servers could hold the model.
    """

    at: float
    ratio: float
    times: float


def memory_bound(servers: list[SimServer], num_blocks: int = BLOCKS) -> float:
    """The part of the upper bound that no placement can exceed, for want of memory.

    A server that fits few blocks cannot spread what it does: at a throughput ``x`` of all blocks it
    is of use for no more than ``x`` on each block that it can host.
    """
    speeds = np.array([server.speed for server in servers])
    fits = np.array([min(server.fit, num_blocks) for server in servers])
    bound = speeds.sum() / num_blocks
    low, high = 0.0, float(bound)
    for _ in range(50):
        middle = (low + high) / 2
        is_possible = np.minimum(speeds, fits * middle).sum() >= middle * num_blocks
        low, high = (middle, high) if is_possible else (low, middle)
    return float(low / bound)
