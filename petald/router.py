"""Finding chains: the swarm view of each model, kept fresh, and the sessions opened by it.

The choice itself is `petald.routing`'s; here are the directory, the measured round trips and the
memory of who failed lately.
"""

from __future__ import annotations

import contextlib

import trio

from p2p.directory import Directory
from p2p.errors import P2PError, RemoteProtocolError
from p2p.network import Network, PeerAddress
from petald.chain_client import ChainSession
from petald.errors import HopFailed, MissingBlocks
from petald.local_model import ModelIdentity
from petald.log import get_logger
from petald.routing import choose_chain
from petald.swarm import Announcement, Server, SwarmView, directory_key, make_view

log = get_logger(__name__)

VIEW_AGE_S = 5.0
"""A view is read again when it is older: a third of the time between two announcements."""

PENALTY_S = 30.0
"""How long a peer that failed is left out: one announcement later it is known to live or not."""

MAX_TRIES = 8
PING_DEADLINE_S = 2.0
MAX_PENALISED = 4096


class Router:
    """Opens sessions through the best chain now.

    Args:
        network: the way to the servers.
        directory: where they announce themselves.
    """

    def __init__(self, network: Network, directory: Directory) -> None:
        self._network = network
        self._directory = directory
        self._views: dict[bytes, tuple[float, SwarmView]] = {}
        self._left_out_until: dict[str, float] = {}

    async def read_view(self, model: ModelIdentity, *, max_age_s: float = VIEW_AGE_S) -> SwarmView:
        """The swarm view of a model, at most so old."""
        known = self._views.get(model.fingerprint)
        if known is not None and trio.current_time() - known[0] <= max_age_s:
            return known[1]
        records = await self._directory.lookup(directory_key(model.fingerprint))
        servers = []
        for record in records:
            try:
                announcement = Announcement.decode(record.body)
            except RemoteProtocolError as error:
                log.debug("announcement passed over", peer=record.peer, reason=str(error))
                continue
            self._network.learn(PeerAddress(record.peer, announcement.addresses))
            servers.append(
                Server(
                    peer=record.peer,
                    announcement=announcement,
                    round_trip_s=self._network.round_trip_s(record.peer),
                )
            )
        view = make_view(model.fingerprint, model.config.num_blocks, servers)
        self._views[model.fingerprint] = (trio.current_time(), view)
        return view

    async def open_session(
        self, model: ModelIdentity, *, max_tokens: int, nursery: trio.Nursery
    ) -> ChainSession:
        """Opens a session through the best chain; a peer that refuses or fails is routed around.

        Args:
            model: whose blocks to cover.
            max_tokens: room that every hop must promise.
            nursery: holds the session's task.

        Raises:
            MissingBlocks: no chain covers the model.
            HopFailed: several chains were tried, and each failed.
        """
        failure: HopFailed | None = None
        for attempt in range(MAX_TRIES):
            view = await self.read_view(model, max_age_s=0.0 if attempt else VIEW_AGE_S)
            try:
                chain = choose_chain(
                    view, needed_tokens=max_tokens, penalties_s=self._penalties_s()
                )
            except MissingBlocks as error:
                if failure is not None:
                    raise MissingBlocks(f"{error}; {failure}", ranges=error.ranges) from failure
                if attempt == 0:  # the view may be older than the server that is needed
                    self._views.pop(model.fingerprint, None)
                    continue
                raise
            session = ChainSession(
                self._network, model=model.fingerprint, chain=chain, max_tokens=max_tokens
            )
            failure = await nursery.start(session.run)
            if failure is None:
                return session
            log.info("chain not opened", reason=str(failure))
            self.penalise(failure.peer)
        assert failure is not None
        raise failure

    def penalise(self, peer: str) -> None:
        """Leaves a peer that failed out of chains for a while."""
        if len(self._left_out_until) >= MAX_PENALISED:
            self._left_out_until.clear()
        self._left_out_until[peer] = trio.current_time() + PENALTY_S

    async def measure_round_trips(self, model: ModelIdentity) -> None:
        """Pings the servers of a model, all at once, for the next views."""

        async def ping(peer: str) -> None:
            # A server that is gone disappears from the directory by itself.
            with trio.move_on_after(PING_DEADLINE_S), contextlib.suppress(P2PError):
                await self._network.ping(peer)

        view = await self.read_view(model)
        async with trio.open_nursery() as nursery:
            for server in view.servers[:64]:
                if server.peer != self._network.peer:
                    nursery.start_soon(ping, server.peer)
        self._views.pop(model.fingerprint, None)

    def _penalties_s(self) -> dict[str, float]:
        now = trio.current_time()
        self._left_out_until = {
            peer: until for peer, until in self._left_out_until.items() if until > now
        }
        return dict.fromkeys(self._left_out_until, float("inf"))
