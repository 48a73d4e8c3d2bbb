"""A few planners of moves and the directory between them, with views as stale as a test wants."""

from __future__ import annotations

import random
from dataclasses import replace

from petald.block_load import BlockLoad, Capacity, read_load
from petald.move_actions import (
    FinishMove,
    MakeClaim,
    MoveAction,
    MoveSettings,
    StartMove,
    WithdrawClaim,
)
from petald.move_planner import MovePlanner
from petald.swarm import Announcement, Claim, Server, ServerState, SwarmView, make_view

MODEL = bytes(32)


def announcement(
    start: int,
    end: int,
    *,
    speed: float = 1.0,
    state: str = ServerState.SERVING,
    claim: tuple[int, int, int] | None = None,
) -> Announcement:
    """Of a server that does so many block-steps a second."""
    return Announcement(
        model=MODEL,
        start=start,
        end=end,
        state=state,
        step_ms=1e3 * (end - start) / speed if speed else 0.0,
        cache_tokens=100,
        free_cache_tokens=100,
        dtype="float32",
        claim=None if claim is None else Claim(start=claim[0], end=claim[1], made_at_ms=claim[2]),
    )


def view_of(num_blocks: int, said: dict[str, Announcement]) -> SwarmView:
    servers = [Server(peer=peer, announcement=one) for peer, one in said.items()]
    return make_view(MODEL, num_blocks, servers)


def load_of(num_blocks: int, *spans: tuple[int, int] | tuple[int, int, float]) -> BlockLoad:
    """The load of servers that stay: start, end, and block-steps a second."""
    said = {
        str(number): announcement(start, end, speed=speed[0] if speed else 1.0)
        for number, (start, end, *speed) in enumerate(spans)
    }
    return read_load(view_of(num_blocks, said))


class PlacementWorld:
    """Planners that see each other's announcements some time later.

    Args:
        staleness_s: of a view, at most; each reading of each other server is by chance as old.
    """

    def __init__(
        self,
        num_blocks: int,
        servers: list[tuple[int, int, int, float]],
        *,
        seed: int,
        staleness_s: float = 0.0,
        load_s: float = 20.0,
        settings: MoveSettings | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.rng = random.Random(seed)
        self.now = 0.0
        self.staleness_s, self.load_s = staleness_s, load_s
        self.said: dict[str, list[tuple[float, Announcement]]] = {}
        self.planners: dict[str, MovePlanner] = {}
        self.speeds: dict[str, float] = {}
        self.loaded_at: dict[str, float] = {}
        self.look_at: dict[str, float] = {}
        self.skew_ms: dict[str, int] = {}
        self.moves: list[tuple[float, str, tuple[int, int]]] = []
        for number, (start, end, fit, speed) in enumerate(servers):
            peer = f"peer{number}"
            self.planners[peer] = MovePlanner(
                peer,
                (start, end),
                Capacity(fit=fit, block_steps_per_s=speed),
                settings=settings or MoveSettings(rest_s=0.0, hourly=1e9, haste=1e9),
                now=0.0,
                rng=random.Random(seed * 1000 + number),
            )
            self.speeds[peer] = speed
            self.skew_ms[peer] = self.rng.randint(-60_000, 60_000)
            self.look_at[peer] = self.rng.uniform(0, 60)
            self.said[peer] = [(-1e9, announcement(start, end, speed=speed))]

    def coverage(self) -> tuple[int, ...]:
        """By who really serves, now."""
        return view_of(self.num_blocks, {p: s[-1][1] for p, s in self.said.items()}).coverage()

    def throughput(self) -> list[float]:
        truth = view_of(self.num_blocks, {p: s[-1][1] for p, s in self.said.items()})
        plain = [replace(one, announcement=_staying(one.announcement)) for one in truth.servers]
        return list(read_load(make_view(MODEL, self.num_blocks, plain)).throughput_L)

    def run(self, seconds: float) -> None:
        """Looks, in the order of their time, of all planners."""
        until = self.now + seconds
        while True:
            peer = min(self.planners, key=lambda peer: (self.due_at(peer), peer))
            if self.due_at(peer) > until:
                self.now = until
                return
            self.now = max(self.now, self.due_at(peer))
            self.look(peer)

    def due_at(self, peer: str) -> float:
        deadline = self.planners[peer].next_deadline()
        due = self.look_at[peer] if deadline is None else min(deadline, self.look_at[peer])
        return min(due, self.loaded_at.get(peer, due))

    def look(self, peer: str) -> None:
        planner = self.planners[peer]
        if self.loaded_at.get(peer, self.now + 1) <= self.now:
            del self.loaded_at[peer]
            planner.on_loaded(self.now)
            return
        self.look_at[peer] = self.now + self.rng.uniform(15, 60)
        seen = {other: self.seen(other) for other in self.said}
        load = read_load(view_of(self.num_blocks, seen), own=peer)
        for action in planner.on_load(load, self.now):
            self.carry_out(peer, action)

    def seen(self, peer: str) -> Announcement:
        """What a reading now may find of a peer."""
        as_of = self.now - self.rng.uniform(0, self.staleness_s) * self.rng.choice([1, 1, 0])
        return [one for at, one in self.said[peer] if at <= as_of][-1]

    def carry_out(self, peer: str, action: MoveAction) -> None:
        planner = self.planners[peer]
        if isinstance(action, MakeClaim):
            made_at_ms = int(self.now * 1e3) + 100_000 + self.skew_ms[peer]
            self.say(peer, (action.start, action.end, made_at_ms))
            planner.on_claimed(made_at_ms, self.now)
        elif isinstance(action, WithdrawClaim):
            self.loaded_at.pop(peer, None)
            self.say(peer)
        elif isinstance(action, StartMove):
            self.loaded_at[peer] = self.now + self.load_s
        elif isinstance(action, FinishMove):
            planner.on_moved(action.start, action.end, self.now)
            self.moves.append((self.now, peer, (action.start, action.end)))
            self.say(peer)

    def say(self, peer: str, claim: tuple[int, int, int] | None = None) -> None:
        start, end = self.planners[peer].span
        one = announcement(start, end, speed=self.speeds[peer], claim=claim)
        self.said[peer].append((self.now, one))

    def lose(self, peer: str) -> None:
        """A server is gone, and everybody knows at once."""
        for table in (self.planners, self.said, self.speeds, self.look_at, self.skew_ms):
            del table[peer]  # type: ignore[attr-defined]
        self.loaded_at.pop(peer, None)


def _staying(one: Announcement) -> Announcement:
    return replace(one, claim=None)
