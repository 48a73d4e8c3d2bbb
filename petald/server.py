"""Serving other peers' sessions: the inbound side of ``/petald/session/1`` and ``/petald/push/1``.

Here a session is admitted, or refused with a reason that a client can act on, and found again when
the hop before attaches to it. What happens within one is `petald.served_session`'s. Invariant: a
session's cache and links are gone when its task is.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from kernels.adapter import SpanAdapter
from kernels.errors import CacheFull
from p2p.errors import P2PError
from p2p.network import Network, Stream
from p2p.rpc import FIRST_MESSAGE_BYTES, MessageStream, receive_first
from p2p.wire.message import expect
from p2p.wire.pass_messages import CODE_MISSING_ADAPTER, CODE_UNKNOWN_ADAPTER
from p2p.wire.replies import Refusal
from p2p.wire.session_messages import (
    MAX_CACHE_ROWS_BYTES,
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    AttachCache,
    AttachPush,
    OpenSession,
    max_step_bytes,
)
from petald.adapter_store import AdapterStore
from petald.config import ServeConfig
from petald.errors import PetaldError, leaves
from petald.hosted_span import HostedSpan
from petald.log import get_logger, log_context
from petald.message_codecs import KNOWN_CODECS, MessageCodecs
from petald.served_session import ServedSession

log = get_logger(__name__)

HELLO_DEADLINE_S = 10.0
"""For the first message of a stream; a peer that opens streams and says nothing holds nothing."""

RETRY_AFTER_S = 5.0

MAX_QUEUED_STEPS = 16
"""Longest steps that may wait for the device before new sessions are sent elsewhere: at a second
each on a slow machine, they would wait for a quarter of a minute."""

FAIR_SHARE = 4
"""One in so many sessions is kept from a peer that has all the others, for those who have none."""

IDLE_S = 1.0
"""A session that did nothing for so long is not waited for when this server leaves."""


class _RefusedSession(PetaldError):
    """A session that cannot be opened; what the client is told."""

    def __init__(self, code: str, text: str, retry_after_s: float = 0.0) -> None:
        super().__init__(text)
        self.refusal = Refusal(code=code, text=text, retry_after_s=retry_after_s)


class Server:
    """Serves sessions on one hosted span.

    Args:
        network: where peers come from; the protocols' handlers are set on it by `start`.
        hosted: the span.
        fingerprint: of the span's model.
        config: limits.
        adapters: that clients lend, and that this server hosts; none by default.
        codecs: encode what is sent.

    Attributes:
        hosted: what new sessions are run on; an open one stays on what it began on.
        adapters: that go with it.
        caches_received: from hops that handed over, since the start.
        is_leaving_for_good: whether it takes no sessions any more, ever.
    """

    def __init__(
        self,
        network: Network,
        hosted: HostedSpan,
        *,
        fingerprint: bytes,
        config: ServeConfig,
        adapters: AdapterStore | None = None,
        codecs: MessageCodecs | None = None,
    ) -> None:
        self._network = network
        self.hosted = hosted
        self.codecs = codecs or MessageCodecs(network)
        self.adapters = adapters or AdapterStore(hosted.span, limit_bytes=0, max_adapter_bytes=0)
        self._fingerprint = fingerprint
        self._config = config
        self.caches_received = 0
        self._sessions: dict[bytes, ServedSession] = {}
        self._opening: dict[bytes, str] = {}
        self._running: dict[ServedSession, trio.CancelScope] = {}
        self.is_leaving_for_good = False
        self._is_draining = False
        self._is_paused = False
        self._max_step_bytes = max_step_bytes(
            config.max_step_tokens, hosted.span.config.hidden_size
        )

    def start(self) -> None:
        """Takes streams from now on."""
        self._network.set_handler(SESSION_PROTOCOL, self.serve_session)
        self._network.set_handler(PUSH_PROTOCOL, self.serve_push)

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    @property
    def is_draining(self) -> bool:
        """Whether new sessions are refused because this server leaves."""
        return self._is_draining or self.is_leaving_for_good

    def stop_accepting(self) -> None:
        """Refuses new sessions from now on."""
        self._is_draining = True

    def accept_again(self) -> None:
        """Takes new sessions again, unless it leaves for good."""
        self._is_draining = False

    def leave_for_good(self) -> None:
        """Refuses new sessions from now on, whatever is asked of it later."""
        self.is_leaving_for_good = True

    @property
    def is_accepting(self) -> bool:
        """Whether new sessions are taken."""
        return not (self.is_draining or self._is_paused)

    def pause(self) -> None:
        """Refuses new sessions until `resume` or `move`, whatever becomes of a drain meanwhile."""
        self._is_paused = True

    def resume(self) -> None:
        """Ends what `pause` began."""
        self._is_paused = False

    async def drain(self, *, deadline_s: float, idle_s: float = IDLE_S) -> None:
        """Asks the clients to move their sessions, and waits until they have; refuses new ones.

        A session that has done nothing for ``idle_s`` since it was told is not waited for; after
        ``deadline_s``, none is.
        """
        self._is_draining = True
        await self._wait_moved(list(self._sessions.values()), deadline_s, idle_s)

    def switch(self, hosted: HostedSpan, adapters: AdapterStore) -> list[ServedSession]:
        """Takes new sessions on another span from now on; gives those that are on the old one."""
        before = list(self._sessions.values())
        self.hosted, self.adapters = hosted, adapters
        self._is_paused = False
        return before

    async def end_sessions(
        self,
        sessions: Sequence[ServedSession] | None = None,
        *,
        deadline_s: float,
        idle_s: float = IDLE_S,
    ) -> None:
        """Has sessions move away, all by default; what they ran on is in no use then.

        Those that have not after ``deadline_s``, or do nothing, are ended: their clients find
        another server when they need one.
        """
        leaving = list(self._sessions.values()) if sessions is None else sessions
        await self._give_up(leaving, deadline_s, idle_s)

    def cut_sessions(self) -> int:
        """Ends those that are left, which their clients rebuild elsewhere; says how many."""
        for running in self._running.values():
            running.cancel()
        return len(self._running)

    async def serve_session(self, stream: Stream) -> None:
        """Serves one session, from its client's stream."""
        async with MessageStream(stream, max_received_bytes=FIRST_MESSAGE_BYTES) as client:
            try:
                session = await self._open(client)
                client.limit_received(self._max_step_bytes)
            except _RefusedSession as refused:
                await client.send(refused.refusal)
                log.info("session refused", peer=client.remote_peer, code=refused.refusal.code)
                return
            name = session.request.session
            with log_context(session=name.hex()[:8], peer=client.remote_peer):
                try:
                    with trio.CancelScope() as self._running[session]:
                        await session.run()
                except* P2PError as group:
                    for error in leaves(group):
                        log.info("session broken", reason=str(error))
                finally:
                    del self._sessions[name], self._running[session]
                    await session.hosted.close_cache(session.cache)

    async def _give_up(
        self, sessions: Sequence[ServedSession], deadline_s: float, idle_s: float
    ) -> None:
        """Has sessions move away, and ends those that have not; nothing runs on them then."""
        await self._wait_moved(sessions, deadline_s, idle_s)
        left = set(sessions).intersection(self._sessions.values())
        for session in left:
            if session in self._running:
                self._running[session].cancel()
        # Not by their names, under which their clients may open others at once.
        while not left.isdisjoint(self._sessions.values()):  # noqa: ASYNC110  # as they end
            await trio.sleep(0.01)

    async def _wait_moved(
        self, sessions: Sequence[ServedSession], deadline_s: float, idle_s: float
    ) -> None:
        """Asks clients to move sessions, and waits until they have, or until the deadline."""
        with trio.move_on_after(deadline_s):
            async with trio.open_nursery() as nursery:
                for session in sessions:
                    nursery.start_soon(session.tell_leaving, deadline_s)
            told_at = trio.current_time()
            while any(  # noqa: ASYNC110  # idleness comes by time, not by an event
                not session.has_ended and session.is_in_use(idle_s, since=told_at)
                for session in sessions
            ):
                await trio.sleep(0.05)

    async def serve_push(self, stream: Stream) -> None:
        """Takes the steps that the hop before pushes, or the cache that one hands over."""
        async with MessageStream(stream, max_received_bytes=FIRST_MESSAGE_BYTES) as messages:
            first = await receive_first(messages, HELLO_DEADLINE_S)
            attach = first if isinstance(first, AttachCache) else expect(first, AttachPush)
            session = self._sessions.get(attach.session)
            peer = messages.remote_peer
            if session is not None and isinstance(attach, AttachCache):
                if session.request.cache_from == peer:
                    messages.limit_received(MAX_CACHE_ROWS_BYTES)
                    if await session.receive_cache(attach, messages):
                        self.caches_received += 1
                    return
            elif session is not None and session.previous == peer:
                messages.limit_received(self._max_step_bytes)
                await session.take_pushes(messages)
                return
            text = "no session here expects this of you"
            await messages.send(Refusal(code="unknown_session", text=text))

    async def _open(self, client: MessageStream) -> ServedSession:
        request = expect(await receive_first(client, HELLO_DEADLINE_S), OpenSession)
        peer = client.remote_peer
        self._admit(request, peer)
        adapters = self._find_adapters(request)
        hosted = self.hosted
        self._opening[request.session] = peer
        try:
            cache = await hosted.open_cache(request.max_tokens, adapters)
        except CacheFull as error:
            raise _RefusedSession("overloaded", str(error), RETRY_AFTER_S) from error
        finally:
            del self._opening[request.session]
        if not self.is_accepting or hosted is not self.hosted:  # meanwhile: its client was not told
            await hosted.close_cache(cache)
            raise _RefusedSession("draining", "this server is leaving the swarm")
        session = ServedSession(
            request,
            client,
            cache,
            network=self._network,
            hosted=hosted,
            codecs=self.codecs,
            max_step_tokens=self._config.max_step_tokens,
        )
        self._sessions[request.session] = session
        return session

    def _admit(self, request: OpenSession, peer: str) -> None:
        span = self.hosted.span
        if not self.is_accepting:
            raise _RefusedSession("draining", "this server is leaving the swarm")
        if request.model != self._fingerprint:
            raise _RefusedSession("model_mismatch", "this server hosts other weights")
        if not span.start <= request.start < request.end <= span.end:
            raise _RefusedSession(
                "missing_blocks",
                f"blocks {request.start}:{request.end} were asked for; "
                f"this server hosts {span.start}:{span.end}",
            )
        if request.max_tokens < 1:
            raise _RefusedSession("bad_request", "a session needs room for at least one token")
        if request.session in self._sessions or request.session in self._opening:
            raise _RefusedSession("bad_request", "a session of this id is open here already")
        if request.codec not in KNOWN_CODECS:
            raise _RefusedSession(
                "unknown_codec", f"this server knows the codecs {', '.join(KNOWN_CODECS)}"
            )
        most = self._config.max_sessions
        taken = len(self._sessions) + len(self._opening)
        if taken >= most:
            text = f"all {most} sessions of this server are taken"
            raise _RefusedSession("overloaded", text, RETRY_AFTER_S)
        if self.hosted.queued_tokens > MAX_QUEUED_STEPS * self._config.max_step_tokens:
            text = f"{self.hosted.queued_tokens} tokens wait for the device already"
            raise _RefusedSession("overloaded", text, RETRY_AFTER_S)
        peers = [session.client.remote_peer for session in self._sessions.values()]
        own = [*peers, *self._opening.values()].count(peer)
        if own >= max(1, most - most // FAIR_SHARE):
            text = f"{own} of the {most} sessions are yours; the rest is for others"
            raise _RefusedSession("overloaded", text, RETRY_AFTER_S)

    def _find_adapters(self, request: OpenSession) -> tuple[SpanAdapter, ...]:
        """Those that a session runs with, which hold on to them however long it lasts."""
        adapters: list[SpanAdapter] = []
        if request.hosted is not None:
            hosted = self.adapters.hosted.get(request.hosted)
            if hosted is None:
                text = "this server does not host that adapter"
                raise _RefusedSession(CODE_MISSING_ADAPTER, text)
            adapters.append(hosted)
        if request.adapter is not None:
            lent = self.adapters.find_lent(request.adapter, request.start, request.end)
            if lent is None:
                text = "this server does not have the adapter; lend it"
                raise _RefusedSession(CODE_UNKNOWN_ADAPTER, text)
            adapters.append(lent)
        return tuple(adapters)
