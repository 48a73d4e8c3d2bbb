"""Moves of this server: the planner's decisions, carried out.

The planner (`petald.move_planner`) decides by fresh views; here are the reading of them, the
announcements, and the loading, which goes on while views are read. Servers that alone hold some
blocks are pinged at each look, since a view still has those that died for most of a minute.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import trio

from kernels.errors import KernelError
from p2p.errors import P2PError
from p2p.network import Network
from petald.announcer import Announcer
from petald.block_load import BlockLoad, Capacity, confirm_gaps, read_load, wants_whole
from petald.errors import MoveGivenUp, PetaldError
from petald.hosting import Hosting
from petald.log import get_logger
from petald.move_actions import (
    FinishMove,
    MakeClaim,
    MoveAction,
    MoveSettings,
    StartMove,
    WithdrawClaim,
)
from petald.move_planner import MovePlanner, next_look_s
from petald.router import Router
from petald.serving import Serving
from petald.swarm import Claim, Server, ServerState, SwarmView

log = get_logger(__name__)

WHOLE_AGE_S = 120.0
"""All servers of a large swarm are read no more often than that where those of a sample cannot
cover the model and others do. Of 10,000 it is some 6 MB."""

SETTLE_LOOK_S = 0.05

FEW_SERVERS = 2
MAX_PINGED = 32
PING_DEADLINE_S = 2.0
MOST_LOADING_S = 900.0
"""Whoever says for longer that it is about to serve some blocks is not counted on any more: the
weights of a span are loaded in less, and a liar must not keep others from blocks that need them."""

MAX_LOADING = 16384
"""Loading servers that are remembered, of views of 10,000 and more; who was seen longest ago is
forgotten first."""

MAX_MISSING = 1024
"""Servers whose missed pings are remembered: some 30 looks' worth of them."""

MISSES = 2
"""Whoever is one of so few that hold a block is pinged, and left out of what is decided by when it
has not answered twice in a row."""


class Mover:
    """Has a server move where the swarm needs it; `run` does it.

    Args:
        serving: the server.
        capacity: what it can do.
        router: reads views.
        announcer: of the server.
        network: the way to other servers.
        settings: how moves are weighed.
        rng: of all that is left to chance.
        wall_clock: seconds since the epoch; orders the claims.
    """

    def __init__(
        self,
        serving: Serving,
        capacity: Capacity,
        *,
        router: Router,
        announcer: Announcer,
        network: Network,
        settings: MoveSettings,
        rng: random.Random,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._serving = serving
        self._capacity = capacity
        self._router = router
        self._announcer = announcer
        self._network = network
        self._rng = rng
        self._wall_clock = wall_clock
        span = serving.hosting.span
        self._planner = MovePlanner(
            network.peer,
            (span.start, span.end),
            capacity,
            settings=settings,
            now=trio.current_time(),
            rng=rng,
        )
        self._servers = 0
        self._misses: dict[str, int] = {}
        self._loading_seen: dict[str, tuple[float, float]] = {}  # first, and last
        self._prepared: Hosting | None = None
        self._loading: trio.CancelScope | None = None
        self._wake = trio.Event()

    @property
    def is_moving(self) -> bool:
        """Whether a move is claimed, or made."""
        return self._planner.claim is not None

    async def settle(self) -> None:
        """Ends what move there is, for a server that is draining and about to end."""
        self._wake.set()
        while self.is_moving:  # it ends in many places
            self._serving.give_up_move()
            await trio.sleep(SETTLE_LOOK_S)

    async def run(self) -> None:
        """Looks and moves, until cancelled."""
        async with trio.open_nursery() as nursery:
            has_failed = False
            while True:
                await self._wait(has_failed=has_failed)
                has_failed = False
                if self._serving.server.is_draining:
                    await self._give_up()
                    continue
                now = trio.current_time()
                try:
                    load = await self._read_load()
                except (P2PError, PetaldError) as error:
                    log.debug("no view to move by", reason=str(error))
                    has_failed = True
                    continue
                if self._serving.server.is_draining:  # since the reading began
                    await self._give_up()
                    continue
                self._measure()
                for action in self._planner.on_load(load, now):
                    await self._carry_out(action, nursery)

    async def _wait(self, *, has_failed: bool) -> None:
        """Until the next look; a deadline that has passed is none where the last look failed."""
        until = trio.current_time() + next_look_s(self._servers, self._rng)
        deadline = None if has_failed else self._planner.next_deadline()
        with trio.move_on_at(until if deadline is None else min(until, deadline)):
            await self._wake.wait()
        self._wake = trio.Event()
        await trio.lowlevel.checkpoint()

    def _measure(self) -> None:
        rate = self._serving.block_steps_per_s
        self._planner.set_capacity(replace(self._capacity, block_steps_per_s=rate))

    async def _carry_out(self, action: MoveAction, nursery: trio.Nursery) -> None:
        if isinstance(action, MakeClaim):
            made_at_ms = int(self._wall_clock() * 1e3)
            log.info("move claimed", blocks=f"{action.start}:{action.end}")
            self._serving.claim = Claim(start=action.start, end=action.end, made_at_ms=made_at_ms)
            if await self._announcer.publish():
                self._planner.on_claimed(made_at_ms, trio.current_time())
            else:
                await self._fail("the claim could not be announced")
        elif isinstance(action, WithdrawClaim):
            log.info("move withdrawn")
            await self._clear()
        elif isinstance(action, StartMove):
            nursery.start_soon(self._load, action)
        elif isinstance(action, FinishMove):
            await self._finish(action)

    async def _load(self, action: StartMove) -> None:
        failure: str | None = None
        with trio.CancelScope() as self._loading:
            try:
                self._prepared = await self._serving.prepare(action.start, action.end)
            except KernelError as error:
                failure = str(error)
            else:
                self._planner.on_loaded(trio.current_time())
                self._wake.set()
        if failure is not None:  # told outside of the scope, which telling it cancels
            await self._fail(failure)

    async def _finish(self, action: FinishMove) -> None:
        prepared, self._prepared = self._prepared, None
        try:
            await self._serving.move(action.start, action.end, prepared, on_changed=self._announce)
        except (KernelError, MoveGivenUp) as error:
            await self._fail(str(error))
        else:
            self._planner.on_moved(action.start, action.end, trio.current_time())

    async def _announce(self) -> None:
        await self._announcer.publish()

    async def _fail(self, reason: str) -> None:
        log.warning("move failed", reason=reason)
        await self._clear()
        self._planner.on_move_failed(trio.current_time())

    async def _clear(self) -> None:
        """Announces no claim any more, and frees what was loaded for it."""
        self._serving.claim = self._prepared = None
        if self._loading is not None:
            self._loading.cancel()
        await self._announcer.publish()

    async def _give_up(self) -> None:
        if self._planner.claim is not None:
            await self._clear()
        self._planner.give_up(trio.current_time())

    # What is known of the others.

    async def _read_load(self) -> BlockLoad:
        """What is decided by: the view, and a whole one where that is a sample and lacks blocks."""
        own, is_urgent = self._network.peer, self._planner.is_urgent
        asked: set[str] = set()
        load = read_load(await self._read_view(asked), own=own)
        if not wants_whole(load, is_urgent=is_urgent):
            return load
        whole = await self._read_whole(asked, max_age_s=0.0 if is_urgent else WHOLE_AGE_S)
        if whole.has_gap and not is_urgent:  # it may have been mended since
            whole = await self._read_whole(asked, max_age_s=0.0)
        return confirm_gaps(load, whole, is_urgent=is_urgent)

    async def _read_view(self, asked: set[str]) -> SwarmView:
        view = await self._router.read_view(self._serving.identity, max_age_s=0.0)
        self._servers = len(view.servers)
        return await self._keep_reliable(view, asked)

    async def _read_whole(self, asked: set[str], *, max_age_s: float) -> BlockLoad:
        view = await self._router.read_view(self._serving.identity, max_age_s=max_age_s, whole=True)
        return read_load(await self._keep_reliable(view, asked), own=self._network.peer)

    async def _keep_reliable(self, view: SwarmView, asked: set[str]) -> SwarmView:
        """A view without those that do not answer though much depends on them, or load for ever.

        Args:
            view: a sample, or whole; what is found out in one holds for the other.
            asked: whom this look has pinged; more are added. Two misses at once may be one chance.
        """
        vital = self._find_vital(view, asked)
        asked.update(server.peer for server in vital)
        async with trio.open_nursery() as nursery:
            for server in vital:
                nursery.start_soon(self._ping, server.peer)
        if view.share >= 1:  # a sample does not tell who is gone
            known = {server.peer for server in view.servers}
            self._misses = {peer: count for peer, count in self._misses.items() if peer in known}
        for peer in list(self._misses)[:-MAX_MISSING]:
            del self._misses[peer]
        unreliable = {peer for peer, count in self._misses.items() if count >= MISSES}
        unreliable |= self._find_endless(view)
        if not unreliable:
            return view
        return replace(
            view, servers=tuple(server for server in view.servers if server.peer not in unreliable)
        )

    def _find_endless(self, view: SwarmView) -> set[str]:
        """Servers that have been loading for too long, by when they were first seen to."""
        now = trio.current_time()
        endless = set()
        for server in view.servers:
            peer, known = server.peer, self._loading_seen.pop(server.peer, None)
            if server.announcement.state != ServerState.LOADING:
                continue
            since = now if known is None else known[0]
            self._loading_seen[peer] = since, now
            if now - since > MOST_LOADING_S:
                endless.add(peer)
        kept = list(self._loading_seen.items())[-MAX_LOADING:]  # in the order of the last time
        self._loading_seen = {peer: seen for peer, seen in kept if now - seen[1] <= MOST_LOADING_S}
        return endless

    def _find_vital(self, view: SwarmView, asked: set[str]) -> Sequence[Server]:
        coverage = view.coverage()
        # In a small sample nobody would be one of few in all: who is alone in it is asked, then.
        few = max(1.0, FEW_SERVERS * view.share)
        vital = [
            server
            for server in view.servers
            if server.peer not in asked
            and (
                server.peer in self._misses
                or (
                    server.announcement.state != ServerState.LEAVING
                    and server.peer != self._network.peer
                    and min(coverage[server.start : server.end]) <= few
                )
            )
        ]
        return vital if len(vital) <= MAX_PINGED else self._rng.sample(vital, MAX_PINGED)

    async def _ping(self, peer: str) -> None:
        with trio.move_on_after(PING_DEADLINE_S):
            try:
                await self._network.ping(peer)
            except P2PError:
                pass
            else:
                self._misses.pop(peer, None)
                return
        self._misses[peer] = self._misses.get(peer, 0) + 1
        if self._misses[peer] < MISSES:
            self._wake.set()
