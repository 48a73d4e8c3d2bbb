"""The serving part of a daemon: which span it hosts, its announcement, and moves to other spans."""

from __future__ import annotations

import importlib.metadata
import random
import statistics
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from kernels.errors import KernelError
from p2p.network import Network
from petald.config import ServeConfig
from petald.devices import dtype_name
from petald.errors import MoveGivenUp, forget_frames
from petald.hosting import Hosting, SpanLoader
from petald.local_model import ModelIdentity
from petald.log import get_logger
from petald.message_codecs import MessageCodecs
from petald.notify import notify_status
from petald.pass_server import PassServer
from petald.router import Router
from petald.server import Server
from petald.steady_rate import SteadyRate
from petald.swarm import (
    Announcement,
    Claim,
    RoundTripTo,
    ServerState,
    choose_next_hops,
    peer_digest,
)

log = get_logger(__name__)

VERSION = importlib.metadata.version("petald")


MOVE_DEADLINE_S = 120.0
"""For the sessions of a span that is given up: a replay of a long one on a slow machine takes a
minute. Those that are left then are ended, and their clients recover as from a failure."""


class Serving:
    """The serving part of a daemon; made by `load_serving`.

    Args:
        identity: of the model.
        config: how it is to be served.
        loader: loads spans of it.
        hosting: the first span.
        server: of sessions.
        pass_server: of passes.
        network: to say where this peer is, and how far others are.
        adapter_names: full names of the adapters that are hosted.

    Attributes:
        hosting: the span that is served now.
        next_hops: the peers to which round trips are announced.
        claim: the move that is announced to be made; none where there is none.
        lost: that it has no blocks any more, and will not have any.
    """

    def __init__(
        self,
        *,
        identity: ModelIdentity,
        config: ServeConfig,
        loader: SpanLoader,
        hosting: Hosting,
        server: Server,
        pass_server: PassServer,
        network: Network,
        adapter_names: tuple[str, ...] = (),
    ) -> None:
        self.identity = identity
        self.hosting = hosting
        self.server = server
        self.next_hops: list[str] = []
        self.claim: Claim | None = None
        self.lost = trio.Event()
        self._config = config
        self._loader = loader
        self._pass_server = pass_server
        self._network = network
        self._adapter_names = adapter_names
        self._is_between = False
        self._loading = trio.CancelScope()
        self._rate = SteadyRate(hosting.share / hosting.speed.step_s)
        self._noted_at = trio.current_time()

    @property
    def block_steps_per_s(self) -> float:
        """What it gives the swarm, as is announced."""
        return self._rate.value

    def note_speed(self) -> None:
        """Heeds how long decode steps took since the last call; to be called now and then."""
        now, before = trio.current_time(), self._noted_at
        self._noted_at = now
        block_s = self.hosting.hosted.take_lone_block_s()
        if block_s:
            self._rate.on_measured(self.hosting.share / block_s, now - before)

    @property
    def codecs(self) -> MessageCodecs:
        """Encode what is sent from here."""
        return self.server.codecs

    @property
    def quant(self) -> str:
        """The weight format."""
        return self._config.quant

    @property
    def state(self) -> ServerState:
        """What is announced."""
        if self._is_between and not self.server.is_draining:
            return ServerState.LOADING
        return ServerState.SERVING if self.server.is_accepting else ServerState.LEAVING

    def make_announcement(self) -> Announcement:
        """What this server says of itself now."""
        hosted = self.hosting.hosted
        span, arena = hosted.span, hosted.arena
        blocks, speed = span.end - span.start, self.hosting.speed
        step_s = speed.step_s * blocks if hosted.step_s is None else hosted.step_s
        token_s = speed.token_s * blocks if hosted.token_s is None else hosted.token_s
        return Announcement(
            model=self.identity.fingerprint,
            start=span.start,
            end=span.end,
            state=self.state,
            step_ms=round(step_s * 1e3, 2),
            prefill_ms=round(token_s * 1e3, 3),
            queue_ms=round(hosted.mean_queue_s * 1e3, 1),
            send_ms=round(self._send_s() * 1e3, 2),
            round_trips=self._round_trips(),
            cache_tokens=arena.capacity_tokens,
            free_cache_tokens=arena.free_tokens,
            dtype=dtype_name(span.dtype),
            quant=self._config.quant,
            codec=self._config.codec,
            version=VERSION,
            addresses=self._network.addresses[:16],
            adapters=self._adapter_names,
            claim=self.claim,
            block_steps_per_s=float(f"{self.block_steps_per_s:.3g}"),
        )

    async def drain(self, *, deadline_s: float) -> None:
        """Lets sessions move and passes end; see `Server.drain`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(self._pass_server.drain, deadline_s=deadline_s))
            await self.server.drain(deadline_s=deadline_s)

    def end_all(self) -> int:
        """Ends the sessions and passes that are left; says how many sessions."""
        self._pass_server.cut_streams()
        return self.server.cut_sessions()

    @property
    def is_in_use(self) -> bool:
        """Whether sessions or passes are open here, be they idle."""
        return self.server.sessions > 0 or self._pass_server.streams > 0

    @property
    def memory_bytes(self) -> int:
        """What its blocks and their cache take."""
        span = self.hosting.span
        return sum(self._loader.block_bytes(block) for block in range(span.start, span.end))

    async def end(self, *, deadline_s: float) -> None:
        """Lets sessions and passes move, ends those that have not, and frees blocks and cache."""
        self.server.leave_for_good()
        await self._end_everything(deadline_s)
        self.hosting.adapters.clear()
        await self._loader.shed(self.hosting, 0, 0)

    async def _end_everything(self, deadline_s: float) -> None:
        """Nothing runs on the span after this."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(self._pass_server.end_streams, deadline_s=deadline_s))
            nursery.start_soon(partial(self.server.end_sessions, deadline_s=deadline_s))

    @property
    def description(self) -> str:
        """What it does, for the service manager."""
        span = self.hosting.span
        return f"serving blocks {span.start}:{span.end} of {self.identity.name}"

    async def prepare(self, start: int, end: int) -> Hosting | None:
        """Loads other blocks beside those that are served; none where memory does not allow both.

        Raises:
            KernelError: they cannot be loaded.
        """
        if not self._loader.has_room(start, end, beside=self.hosting):
            return None
        return await self._loader.load(start, end, beside=self.hosting.span)

    async def move(
        self,
        start: int,
        end: int,
        prepared: Hosting | None,
        *,
        on_changed: Callable[[], Awaitable[None]],
        deadline_s: float = MOVE_DEADLINE_S,
    ) -> None:
        """Serves other blocks from now on; returns when all that the old ones held is freed.

        Sessions go to other servers: after the new blocks are served, where these were prepared;
        else before they are loaded, and what both spans share stays loaded.

        Args:
            start: first block.
            end: the block after the last one.
            prepared: what `prepare` gave for them.
            on_changed: tells the swarm what `make_announcement` says now.
            deadline_s: for open sessions to be moved by their clients.

        Raises:
            KernelError: the blocks cannot be loaded; the old ones are served on, unless they were
                given up before and cannot be loaded again either: then nothing is, and it is
                ``lost``.
            MoveGivenUp: by `give_up_move`.
        """
        hosting = prepared
        if hosting is None:
            hosting = await self._load_in_place(start, end, on_changed, deadline_s)
        before, self.hosting = self.hosting, hosting
        self.claim = None
        sessions = self.server.switch(hosting.hosted, hosting.adapters)
        self._pass_server.switch(hosting.passes, hosting.adapters)
        await on_changed()
        async with trio.open_nursery() as nursery:
            end_streams = partial(self._pass_server.end_streams, is_all=False)
            nursery.start_soon(partial(end_streams, deadline_s=deadline_s))
            nursery.start_soon(partial(self.server.end_sessions, sessions, deadline_s=deadline_s))
        del sessions
        log.info(
            "moved",
            before=f"{before.span.start}:{before.span.end}",
            blocks=f"{hosting.span.start}:{hosting.span.end}",
        )
        if self.server.is_accepting:
            notify_status(self.description)

    def give_up_move(self) -> None:
        """Ends what is being loaded in place of blocks that were given up: nothing is served then.

        For a server that is about to end.
        """
        self._loading.cancel()

    async def _load_in_place(
        self, start: int, end: int, on_changed: Callable[[], Awaitable[None]], deadline_s: float
    ) -> Hosting:
        """Ends all sessions, gives up what the spans do not share, and loads the rest.

        No sessions are taken until the server moves to what this returns. Should neither these
        blocks be loaded nor the old ones again, none are any more.
        """
        self._loading = trio.CancelScope()
        old = self.hosting
        before = old.span.start, old.span.end
        is_shed = False
        self._is_between = True
        self.server.pause()
        try:
            await on_changed()
            await self._end_everything(deadline_s)
            is_shed = True
            await self._loader.shed(old, start, end)
            with self._loading:
                try:
                    return await self._loader.load(start, end, beside=old.span)
                except KernelError as error:
                    forget_frames(error)  # they hold what was loaded; there may be no room for both
                    await self._load_again(old, *before)
                    await on_changed()
                    raise
            raise MoveGivenUp("nothing is to be served now")
        finally:
            self._is_between = False
            if not is_shed:
                self.server.resume()

    async def _load_again(self, old: Hosting, start: int, end: int) -> None:
        try:
            self.hosting = again = await self._loader.load(start, end, beside=old.span)
        except KernelError:
            self.lost.set()
            raise
        self.server.switch(again.hosted, again.adapters)
        self._pass_server.switch(again.passes, again.adapters)
        self._is_between = False

    async def measure_next_hops(self, router: Router, rng: random.Random) -> None:
        """Measures the way to those servers that a session here is likely to go on to."""
        view = await router.read_view(self.identity)
        chosen = choose_next_hops(view, self.hosting.span.end, own=self._network.peer, rng=rng)
        await router.ping_all(chosen)
        self.next_hops[:] = chosen

    def _send_s(self) -> float:
        """How long the hidden states of one token take to leave; zero where nothing was measured.

        Of the links the middle one: the slowest ones tell of what the other end can take.
        """
        peers = self._network.connected_peers()
        rates = [self._network.bytes_per_s(peer.peer) for peer in peers]
        known = [rate for rate in rates if rate is not None]
        span = self.hosting.span
        row_bytes = span.config.hidden_size * span.dtype.itemsize
        return row_bytes / max(statistics.median(known), 1.0) if known else 0.0

    def _round_trips(self) -> tuple[RoundTripTo, ...]:
        measured = [(peer, self._network.round_trip_s(peer)) for peer in self.next_hops]
        return tuple(
            RoundTripTo(peer=peer_digest(peer), ms=round(seconds * 1e3, 2))
            for peer, seconds in measured
            if seconds is not None
        )
