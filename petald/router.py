"""Finding chains: the swarm view of each model, kept fresh, and the sessions opened by it.

The choice itself is `petald.routing`'s; here are the directory, the measured round trips and the
memory of who failed lately.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import trio

from p2p.directory import Directory
from p2p.errors import P2PError, RemoteProtocolError
from p2p.network import Network, PeerAddress
from p2p.wire.tensor import RAW
from petald.chain_client import ChainModel, ChainSession, News
from petald.codec_choice import AUTO
from petald.config import RouteConfig
from petald.coverage import find_hosted
from petald.errors import BadRequest, MissingBlocks, PetaldError
from petald.history import HistoryStore
from petald.lent_adapter import LentAdapter
from petald.local_model import ModelIdentity
from petald.log import get_logger
from petald.message_codecs import MessageCodecs
from petald.rebuild_cost import RebuildCost
from petald.routing import UNKNOWN_ROUND_TRIP_S, Hop, chain_cost_s, choose_chain, should_move
from petald.session_actions import NeedChain
from petald.session_settings import Replay
from petald.swarm import Announcement, Server, SwarmView, directory_key, make_view

log = get_logger(__name__)

VIEW_AGE_S = 5.0
"""A view is read again when it is older: a third of the time between two announcements."""

MEASURE_PERIOD_S = 60.0
"""Between two rounds of pings to a model's servers."""

FRESH_PERIOD_S = 12.0
"""Between two readings of the view while sessions are open: a little less than servers take to
announce themselves again."""

WHOLE_VIEW_AGE_S = 30.0
"""Of a large swarm all servers are read where a sample of them has none for some blocks, and not
more often: of 10,000 they are some 6 MB."""

REPAIR_VIEW_AGE_S = 40.0
RETRY_VIEW_AGE_S = 0.5
"""A session that stands still because a hop died does not wait for the directory, of which that
hop may be a part; only when what was known is of no use."""

PENALTY_S = 10.0
MAX_PENALTY_S = 300.0
PENALTY_HALF_LIFE_S = 15.0
LEAST_PENALTY_S = 0.001
"""What a failure adds to the time of a step through that peer, and how that fades: it is the last
choice at first, and like others again after some minutes. It does not fade before the peer has
announced itself anew: until then it is as likely gone for good."""

PING_DEADLINE_S = 2.0
MAX_PINGED = 64
MAX_PENALISED = 4096
MAX_ANNOUNCED = 65_536
MAX_DECODED = 4096
NEVER = (-1, 0)

_decode = functools.lru_cache(maxsize=MAX_DECODED)(Announcement.decode)
"""Announcements are read again and again, and few change in between."""


@dataclass(frozen=True, slots=True)
class _Penalty:
    """What a peer's failures have come to.

    Attributes:
        seconds: added to a step's time, at first.
        since: when it failed last.
        announced: what had been told last then, as `p2p.directory_memory.Known.version`.
    """

    seconds: float
    since: float
    announced: tuple[int, int]


class Router:
    """Opens sessions through the best chain now.

    Args:
        network: the way to the servers.
        directory: where they announce themselves.
        config: how sessions are to be run.
        codecs: encode what is sent.
    """

    def __init__(
        self,
        network: Network,
        directory: Directory,
        config: RouteConfig,
        *,
        codecs: MessageCodecs | None = None,
    ) -> None:
        self._network = network
        self._codecs = codecs or MessageCodecs(network)
        self._directory = directory
        self._config = config
        self._histories = HistoryStore(limit_bytes=config.history_bytes)
        self._views: dict[bytes, tuple[float, SwarmView]] = {}
        self._whole_views: dict[bytes, tuple[float, SwarmView]] = {}
        self._sessions = 0
        self._penalties: dict[str, _Penalty] = {}
        self._announced: dict[str, tuple[int, int]] = {}

    @property
    def is_replay_slow(self) -> bool:
        """Whether a hop is rebuilt step by step, as far as the configuration tells."""
        kind, codec = self._config.replay, self._config.codec
        return kind == "exact" or (kind == "auto" and codec not in (AUTO, RAW))

    async def read_view(
        self, model: ModelIdentity, *, max_age_s: float = VIEW_AGE_S, whole: bool = False
    ) -> SwarmView:
        """The swarm view of a model, at most so old.

        Args:
            model: whose servers.
            max_age_s: of what was read before and will do.
            whole: of all servers, however many there are; otherwise it may be a sample.
        """
        views = self._whole_views if whole else self._views
        known = views.get(model.fingerprint)
        if known is not None and trio.current_time() - known[0] <= max_age_s:
            return known[1]
        found = await self._directory.lookup(
            directory_key(model.fingerprint), whole=whole, max_age_s=max_age_s
        )
        if len(self._announced) > MAX_ANNOUNCED:
            self._announced.clear()
        servers = []
        for one in found.records:
            try:
                announcement = _decode(one.body)
            except RemoteProtocolError as error:
                log.debug("announcement passed over", peer=one.peer, reason=str(error))
                continue
            self._network.learn(PeerAddress(one.peer, announcement.addresses))
            self._announced[one.peer] = one.version
            servers.append(
                Server(
                    peer=one.peer,
                    announcement=announcement,
                    round_trip_s=self._network.round_trip_s(one.peer),
                )
            )
        view = make_view(model.fingerprint, model.config.num_blocks, servers, share=found.share)
        views[model.fingerprint] = (trio.current_time(), view)
        return view

    @property
    def codec(self) -> str:
        """In which hidden states travel, as configured."""
        return self._config.codec

    @property
    def gradient_codec(self) -> str:
        """In which gradients of hidden states travel, as configured."""
        return self._config.gradient_codec

    @property
    def codecs(self) -> MessageCodecs:
        """Encode what is sent."""
        return self._codecs

    @property
    def histories(self) -> HistoryStore:
        """Where what jobs sent is kept."""
        return self._histories

    def known_view(self, model: ModelIdentity) -> SwarmView | None:
        """The view that was read last."""
        known = self._views.get(model.fingerprint)
        return None if known is None else known[1]

    def round_trip_s(self, peer: str) -> float:
        """The round trip to a peer, or what one usually is."""
        measured = self._network.round_trip_s(peer)
        return UNKNOWN_ROUND_TRIP_S if measured is None else measured

    async def open_session(
        self,
        model: ModelIdentity,
        *,
        max_tokens: int,
        nursery: trio.Nursery,
        max_wait_s: float = 0.0,
        on_news: News = lambda news: None,
        adapter: LentAdapter | None = None,
        hosted: str = "",
    ) -> ChainSession:
        """Opens a session through the best chain; a peer that refuses or fails is routed around.

        Args:
            model: whose blocks to cover.
            max_tokens: room that every hop must promise.
            nursery: holds the session's task.
            max_wait_s: how long to wait where nobody can run some blocks, now and later.
            on_news: told of what happens to the chain; must not block.
            adapter: with which the blocks are run; it covers all of them, and is lent to the hops.
            hosted: the name of an adapter that the hops are to host themselves; empty for none.

        Raises:
            MissingBlocks: no chain covers the model.
            BadRequest: several adapters of this name are hosted.
            HopFailed: several chains were tried, and each failed.
        """
        prefix_tokens = 0 if adapter is None else adapter.form.prefix_tokens
        if hosted:
            with contextlib.suppress(MissingBlocks):  # there may be one later
                hosted = await self.find_hosted(model, hosted)
        chooser = _ModelChooser(self, model, hosted=hosted or None, prefix_tokens=prefix_tokens)
        session = ChainSession(
            self._network,
            model=ChainModel(
                fingerprint=model.fingerprint,
                num_blocks=model.config.num_blocks,
                hidden_size=model.config.hidden_size,
            ),
            chooser=chooser,
            histories=self._histories,
            max_tokens=max_tokens,
            codec=self._config.codec,
            max_wait_s=max_wait_s,
            replay=Replay(self._config.replay),
            codecs=self._codecs,
            prefers_hand_over=chooser.prefers_hand_over,
            adapter=adapter,
            hosted=lambda: chooser.hosted,
            on_news=on_news,
        )
        error = await nursery.start(self._run, session)
        if error is not None:
            raise error
        return session

    async def _run(
        self, session: ChainSession, *, task_status: trio.TaskStatus[PetaldError | None]
    ) -> None:
        self._sessions += 1
        try:
            await session.run(task_status=task_status)
        finally:
            self._sessions -= 1

    async def find_hosted(
        self, model: ModelIdentity, name: str, *, start: int = 0, end: int | None = None
    ) -> str:
        """The full name of an adapter that servers host, for some blocks; all by default.

        Raises:
            MissingBlocks: none is hosted for all of them now; the text names those there are.
            BadRequest: several are; the text names them.
        """
        view = await self.read_view(model)
        with contextlib.suppress(MissingBlocks):
            return find_hosted(view, name, start=start, end=end)
        view = await self.read_view(model, max_age_s=RETRY_VIEW_AGE_S)
        return find_hosted(view, name, start=start, end=end)

    async def choose(
        self, model: ModelIdentity, need: NeedChain, *, hosted: str | None = None
    ) -> tuple[Hop, ...]:
        """Servers for some blocks, by the newest view if an older one does not do.

        Args:
            model: whose blocks they are.
            need: which, and with how much room.
            hosted: the full name of an adapter that they must host; none for none.

        Raises:
            MissingBlocks: nobody can run some of them now.
        """
        known = self._views.get(model.fingerprint)
        max_age_s = VIEW_AGE_S
        if need.is_retry:
            max_age_s = RETRY_VIEW_AGE_S
        elif need.before is not None or need.after is not None:
            max_age_s = REPAIR_VIEW_AGE_S
        view = await self.read_view(model, max_age_s=max_age_s)
        with contextlib.suppress(MissingBlocks):
            return self._choose_in(view, need, hosted)
        if known is not None and known[1] is view:
            view = await self.read_view(model, max_age_s=0.0)
            with contextlib.suppress(MissingBlocks):
                return self._choose_in(view, need, hosted)
        if view.share < 1:
            view = await self.read_view(model, max_age_s=WHOLE_VIEW_AGE_S, whole=True)
        return self._choose_in(view, need, hosted)

    def _choose_in(self, view: SwarmView, need: NeedChain, hosted: str | None) -> tuple[Hop, ...]:
        return choose_chain(
            view,
            needed_tokens=need.tokens,
            start=need.start,
            end=need.end,
            before=need.before,
            after=need.after,
            penalties_s=self.penalties_s(),
            excluded=need.excluded,
            hosted=hosted,
        )

    def penalise(self, peer: str) -> None:
        """Makes chains through a peer that failed look longer, for a while."""
        if len(self._penalties) >= MAX_PENALISED:
            self._penalties.clear()
        now = trio.current_time()
        seconds = min(self._penalty_s(peer, now) + PENALTY_S, MAX_PENALTY_S)
        announced = self._announced.get(peer, NEVER)
        self._penalties[peer] = _Penalty(seconds, now, announced)

    async def measure_round_trips(self, model: ModelIdentity) -> None:
        """Pings the servers of a model, all at once, and reads the view with what was measured."""
        view = await self.read_view(model)
        await self.ping_all([server.peer for server in view.servers[:MAX_PINGED]])
        await self.read_view(model, max_age_s=0.0)

    async def keep_fresh(self, model: ModelIdentity) -> None:
        """Keeps view and round trips of a model at hand, so that no repair waits for them."""
        measured_at = -math.inf
        while True:
            if trio.current_time() - measured_at >= MEASURE_PERIOD_S:
                await self.measure_round_trips(model)
                measured_at = trio.current_time()
            elif self._sessions:
                await self.read_view(model, max_age_s=FRESH_PERIOD_S / 2)
            await trio.sleep(FRESH_PERIOD_S)

    async def ping_all(self, peers: Iterable[str]) -> set[str]:
        """Measures the round trips to some peers, all at once; gives those that answered.

        A server that is gone disappears from the directory by itself.
        """
        answered: set[str] = set()

        async def ping(peer: str) -> None:
            with trio.move_on_after(PING_DEADLINE_S), contextlib.suppress(P2PError):
                await self._network.ping(peer)
                answered.add(peer)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                if peer != self._network.peer:
                    nursery.start_soon(ping, peer)
        return answered

    def _penalty_s(self, peer: str, now: float) -> float:
        penalty = self._penalties.get(peer)
        if penalty is None:
            return 0.0
        if self._announced.get(peer, NEVER) <= penalty.announced:
            return penalty.seconds  # it has not been heard of since
        return float(penalty.seconds * 0.5 ** ((now - penalty.since) / PENALTY_HALF_LIFE_S))

    def penalties_s(self) -> dict[str, float]:
        """What peers that failed lately add to the time of a step."""
        now = trio.current_time()
        found = {peer: self._penalty_s(peer, now) for peer in self._penalties}
        for peer, seconds in list(found.items()):
            if seconds < LEAST_PENALTY_S:
                del self._penalties[peer], found[peer]
        return found


_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _cache_dtype(view: SwarmView, hop: Hop) -> str:
    position = view.columns.position.get(hop.peer)
    return "" if position is None else view.columns.servers[position].announcement.dtype


class _ModelChooser:
    """A `petald.chain_client.Chooser` for one session.

    Attributes:
        hosted: the adapter that every hop must host, by its full name as soon as that is known.
    """

    def __init__(
        self,
        router: Router,
        model: ModelIdentity,
        *,
        hosted: str | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        self.hosted = hosted
        self._router = router
        self._model = model
        self._prefix_tokens = prefix_tokens

    async def choose(self, need: NeedChain) -> Sequence[Hop]:
        if self.hosted is not None and "@" not in self.hosted:
            try:
                self.hosted = await self._router.find_hosted(self._model, self.hosted)
            except BadRequest as error:  # there was none when the session was opened
                raise MissingBlocks(str(error), ranges=()) from error
        room = replace(need, tokens=need.tokens + self._prefix_tokens)
        return await self._router.choose(self._model, room, hosted=self.hosted)

    async def find_better(
        self, chain: Sequence[Hop], *, max_tokens: int, cached_tokens: int
    ) -> Sequence[Hop] | None:
        view = await self._router.read_view(self._model, max_age_s=REPAIR_VIEW_AGE_S)
        penalties_s = self._router.penalties_s()
        current_s = chain_cost_s(view, chain, penalties_s=penalties_s)
        try:
            better = choose_chain(
                view,
                needed_tokens=max_tokens + self._prefix_tokens,
                hosted=self.hosted,
                holding={hop.peer for hop in chain},
                penalties_s=penalties_s,
            )
        except MissingBlocks:
            return None
        # Whom the view does not have is not measured against others: if it is gone, its stream
        # will tell.
        if math.isinf(current_s):
            return None
        stays = {(hop.peer, hop.start, hop.end) for hop in chain}
        moving = [hop for hop in better if (hop.peer, hop.start, hop.end) not in stays]
        pays = should_move(
            current_s=current_s,
            better_s=chain_cost_s(view, better, penalties_s=penalties_s),
            remaining_steps=max_tokens - cached_tokens,
            rebuild_s=sum(self._cost(view, hop, hop).replay_s(cached_tokens) for hop in moving),
        )
        return better if pays else None

    def prefers_hand_over(self, old: Hop, new: Hop, tokens: int) -> bool:
        view = self._router.known_view(self._model)
        if view is None or not tokens or _cache_dtype(view, old) != _cache_dtype(view, new):
            return False
        cost = self._cost(view, old, new)
        return cost.hand_over_s(tokens) < cost.replay_s(tokens)

    def _cost(self, view: SwarmView, old: Hop, new: Hop) -> RebuildCost:
        config = self._model.config
        position = view.columns.position.get(new.peer)
        blocks = new.end - new.start
        block_s = view.columns.block_s if self._router.is_replay_slow else view.columns.token_s
        trips = [self._router.round_trip_s(hop.peer) for hop in (old, new)]
        return RebuildCost(
            token_s=0.0 if position is None else float(block_s[position]) * blocks,
            row_bytes=4 * config.hidden_size,
            cache_bytes=2 * _DTYPE_BYTES.get(_cache_dtype(view, new), 4) * config.kv_size * blocks,
            client_round_trip_s=trips[1],
            round_trip_s=max(trips),  # of two near ones it is short; else it is not known
        )

    def penalise(self, peer: str) -> None:
        self._router.penalise(peer)
