"""Serving other peers' sessions: the inbound side of ``/petald/session/1`` and ``/petald/push/1``.

A session's stream from its client is served by one task, which owns the session: it takes steps
from an inbox, runs them, and sends the output on. The inbox is filled by a reader of the client's
stream and, on every hop but the first, by the push stream of the hop before. What becomes of a step
is decided in `petald.session`. Invariant: a session's cache and links are gone when its task is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import trio

from kernels.errors import CacheFull, KernelError
from kernels.kv_cache import SequenceCache
from p2p.errors import P2PError, RemoteProtocolError
from p2p.network import Network, PeerAddress, Stream
from p2p.rpc import MessageStream
from p2p.wire.message import Message, expect
from p2p.wire.replies import Ok, Refusal
from p2p.wire.session_messages import (
    MAX_HOPS,
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    AttachPush,
    HopTime,
    LinkNext,
    OpenSession,
    SessionOpened,
    Step,
    StepFailed,
    StepResult,
    Wanted,
)
from petald.config import ServeConfig
from petald.errors import BadRequest, PetaldError, leaves
from petald.executor import Timed
from petald.hosted_span import HostedSpan
from petald.log import get_logger, log_context
from petald.session import HopSession, PassOver, RepeatOutput
from petald.tensors import from_wire, to_wire

log = get_logger(__name__)

HELLO_DEADLINE_S = 10.0
"""For the first message of a stream; a peer that opens streams and says nothing holds nothing."""

LINK_DEADLINE_S = 10.0
"""For dialling the next hop: its TCP and Noise handshakes over a slow home link."""

IDLE_SESSION_S = 900.0
"""A chat may pause; its room is not kept for ever."""

INBOX_STEPS = 2
"""Steps that wait in memory for a session; more of them wait in the stream's own flow control."""

RETRY_AFTER_S = 5.0

CODE_NEXT_HOP_LOST = "next_hop_lost"
CODE_SESSION_IDLE = "session_idle"


@dataclass(eq=False, slots=True)
class _Hop:
    """One open session of this server."""

    request: OpenSession
    client: MessageStream
    cache: SequenceCache
    state: HopSession
    inbox_in: trio.MemorySendChannel[Message]
    inbox_out: trio.MemoryReceiveChannel[Message]
    next_peer: str | None = None
    next_stream: MessageStream | None = None
    previous_stream: MessageStream | None = None
    last_output: Message | None = None
    last_active_at: float = field(default_factory=trio.current_time)
    is_busy: bool = False


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
    """

    def __init__(
        self, network: Network, hosted: HostedSpan, *, fingerprint: bytes, config: ServeConfig
    ) -> None:
        self._network = network
        self._hosted = hosted
        self._fingerprint = fingerprint
        self._config = config
        self._hops: dict[bytes, _Hop] = {}
        self._opening = 0
        self._is_draining = False

    def start(self) -> None:
        """Takes streams from now on."""
        self._network.set_handler(SESSION_PROTOCOL, self.serve_session)
        self._network.set_handler(PUSH_PROTOCOL, self.serve_push)

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._hops)

    @property
    def is_draining(self) -> bool:
        """Whether new sessions are refused because this server leaves."""
        return self._is_draining

    def stop_accepting(self) -> None:
        """Refuses new sessions from now on."""
        self._is_draining = True

    async def drain(self, *, deadline_s: float, idle_s: float = 1.0) -> None:
        """Lets the open sessions finish what they do, after `stop_accepting`.

        A session that has done nothing for ``idle_s`` is not waited for; after ``deadline_s``, none
        is.
        """
        with trio.move_on_after(deadline_s):
            while any(  # noqa: ASYNC110  # idleness comes by time, not by an event
                hop.is_busy or trio.current_time() - hop.last_active_at < idle_s
                for hop in self._hops.values()
            ):
                await trio.sleep(0.05)

    async def serve_session(self, stream: Stream) -> None:
        """Serves one session, from its client's stream."""
        async with MessageStream(stream) as client:
            try:
                hop = await self._open(client)
            except _RefusedSession as refused:
                await client.send(refused.refusal)
                log.info("session refused", peer=client.remote_peer, code=refused.refusal.code)
                return
            with log_context(session=hop.request.session.hex()[:8], peer=client.remote_peer):
                try:
                    await self._run_session(hop)
                except* P2PError as group:
                    for error in leaves(group):
                        log.info("session broken", reason=str(error))
                finally:
                    await self._close(hop)

    async def serve_push(self, stream: Stream) -> None:
        """Takes the steps that the hop before pushes."""
        async with MessageStream(stream) as messages:
            with trio.fail_after(HELLO_DEADLINE_S):
                attach = expect(await _receive(messages), AttachPush)
            hop = self._hops.get(attach.session)
            if hop is None or hop.request.previous != messages.remote_peer:
                await messages.send(
                    Refusal(code="unknown_session", text="no session here expects your pushes")
                )
                return
            if hop.previous_stream is not None:
                await hop.previous_stream.abort()
            hop.previous_stream = messages
            await messages.send(Ok())
            try:
                while (step := await messages.receive()) is not None:
                    await hop.inbox_in.send(expect(step, Step))
            except RemoteProtocolError as error:
                log.info("pushes refused", peer=messages.remote_peer, reason=str(error))
                await _report(hop, 0, error.code, str(error), culprit=messages.remote_peer)
                raise
            except trio.BrokenResourceError:
                pass  # the session ended meanwhile

    async def _open(self, client: MessageStream) -> _Hop:
        with trio.fail_after(HELLO_DEADLINE_S):
            request = expect(await _receive(client), OpenSession)
        self._admit(request)
        self._opening += 1
        try:
            cache = await self._hosted.open_cache(request.max_tokens)
        except CacheFull as error:
            raise _RefusedSession("overloaded", str(error), RETRY_AFTER_S) from error
        finally:
            self._opening -= 1
        inbox_in, inbox_out = trio.open_memory_channel[Message](INBOX_STEPS)
        hop = _Hop(
            request=request,
            client=client,
            cache=cache,
            state=HopSession(
                max_tokens=request.max_tokens, max_step_tokens=self._config.max_step_tokens
            ),
            inbox_in=inbox_in,
            inbox_out=inbox_out,
        )
        self._hops[request.session] = hop
        return hop

    def _admit(self, request: OpenSession) -> None:
        span = self._hosted.span
        if self._is_draining:
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
        if request.session in self._hops:
            raise _RefusedSession("bad_request", "a session of this id is open here already")
        if len(self._hops) + self._opening >= self._config.max_sessions:
            raise _RefusedSession(
                "overloaded",
                f"all {self._config.max_sessions} sessions of this server are taken",
                RETRY_AFTER_S,
            )

    async def _close(self, hop: _Hop) -> None:
        self._hops.pop(hop.request.session, None)
        hop.inbox_out.close()
        hop.inbox_in.close()
        with trio.CancelScope(shield=True):
            for stream in (hop.next_stream, hop.previous_stream):
                if stream is not None:
                    await stream.abort()
            await self._hosted.close_cache(hop.cache)

    async def _run_session(self, hop: _Hop) -> None:
        await hop.client.send(SessionOpened(max_step_tokens=self._config.max_step_tokens))
        log.debug("session opened", blocks=f"{hop.request.start}:{hop.request.end}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_fill_inbox, hop, nursery.cancel_scope)
            while True:
                with trio.move_on_after(IDLE_SESSION_S) as waiting:
                    item = await hop.inbox_out.receive()
                if waiting.cancelled_caught:
                    await _report(hop, 0, CODE_SESSION_IDLE, "the session was idle for too long")
                    nursery.cancel_scope.cancel()
                    return
                hop.is_busy = True
                try:
                    await self._handle(hop, item)
                finally:
                    hop.is_busy = False
                    hop.last_active_at = trio.current_time()

    async def _handle(self, hop: _Hop, item: Message) -> None:
        if isinstance(item, LinkNext):
            await self._link(hop, item)
            return
        step = expect(item, Step)
        try:
            output = await self._do_step(hop, step)
        except (KernelError, PetaldError, P2PError) as error:
            log.info("step failed", number=step.number, code=error.code, reason=str(error))
            culprit = hop.request.previous if isinstance(error, RemoteProtocolError) else None
            await _report(hop, step.number, error.code, str(error), culprit=culprit)
            return
        if output is not None:
            await self._send_on(hop, step.number, output)

    async def _link(self, hop: _Hop, link: LinkNext) -> None:
        if hop.next_stream is not None:
            await hop.next_stream.abort()
            hop.next_stream = None
        hop.next_peer = link.peer
        self._network.learn(PeerAddress(link.peer, link.addresses))
        try:
            with trio.fail_after(LINK_DEADLINE_S):
                stream = await self._network.open_stream(link.peer, PUSH_PROTOCOL)
                hop.next_stream = MessageStream(stream)
                await hop.next_stream.send(AttachPush(session=link.session))
                reply = await _receive(hop.next_stream)
        except (P2PError, trio.TooSlowError) as error:
            text = str(error) or f"no answer within {LINK_DEADLINE_S:g} s"
            await hop.client.send(Refusal(code=CODE_NEXT_HOP_LOST, text=text))
            return
        await hop.client.send(reply)

    async def _do_step(self, hop: _Hop, step: Step) -> Message | None:
        """Runs a step, and gives what is to be sent on, if anything is."""
        shape = step.hidden.shape
        decision = hop.state.on_step(
            number=step.number, position=step.position, tokens=shape[0] if shape else 0
        )
        if isinstance(decision, PassOver):
            return None
        if isinstance(decision, RepeatOutput):
            return hop.last_output
        span = self._hosted.span
        hidden_SD = from_wire(
            step.hidden,
            hidden_size=span.config.hidden_size,
            max_tokens=self._config.max_step_tokens,
            dtype=span.dtype,
            device=span.device,
        )
        try:
            timed = await self._hosted.run_step(
                hop.cache,
                hidden_SD,
                position=decision.truncate_to,
                start=hop.request.start,
                end=hop.request.end,
            )
        except KernelError:
            hop.state.on_truncated(decision.truncate_to)
            raise
        hop.state.on_done(number=step.number, position=step.position, tokens=hidden_SD.shape[0])
        hop.last_output = _make_output(hop, step, timed)
        return hop.last_output

    async def _send_on(self, hop: _Hop, number: int, output: Message) -> None:
        if hop.next_peer is None:
            await hop.client.send(output)
            return
        try:
            if hop.next_stream is None:
                raise BadRequest("the link to the next hop was never made")
            await hop.next_stream.send(output)
        except (P2PError, PetaldError) as error:
            await _report(hop, number, CODE_NEXT_HOP_LOST, str(error), culprit=hop.next_peer)


async def _fill_inbox(hop: _Hop, scope: trio.CancelScope) -> None:
    """Reads the client's stream; its end is the session's end."""
    while (item := await hop.client.receive()) is not None:
        if isinstance(item, Step) and hop.request.previous is not None:
            raise RemoteProtocolError("a step came from the client to a hop that is not the first")
        await hop.inbox_in.send(item)
    scope.cancel()


async def _receive(messages: MessageStream) -> Message:
    received = await messages.receive()
    if received is None:
        raise RemoteProtocolError("the stream ended before its first message")
    return received


async def _report(
    hop: _Hop, number: int, code: str, text: str, *, culprit: str | None = None
) -> None:
    await hop.client.send(StepFailed(number=number, code=code, text=text[:1024], culprit=culprit))


def _make_output(hop: _Hop, step: Step, timed: Timed) -> Message:
    spent = HopTime(
        queue_us=math.ceil(timed.queue_s * 1e6), compute_us=math.ceil(timed.compute_s * 1e6)
    )
    times = (*step.times, spent)[-MAX_HOPS:]
    output_SD: torch.Tensor = timed.value
    if hop.next_peer is not None:
        return Step(
            number=step.number,
            position=step.position,
            hidden=to_wire(output_SD),
            wanted=step.wanted,
            times=times,
        )
    if step.wanted == Wanted.NONE:
        return StepResult(number=step.number, times=times)
    rows_SD = output_SD if step.wanted == Wanted.ALL else output_SD[-1:]
    return StepResult(number=step.number, hidden=to_wire(rows_SD), times=times)
