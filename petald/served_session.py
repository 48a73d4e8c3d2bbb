"""One session at this server: its stream from the client, its links, its cache.

A session has a reader, which answers at once what needs no computing, and a worker, which does
steps in order. Steps come from the client or from the hop before, through one inbox. What becomes
of a step is decided in `petald.hop_session`. Invariant: a step's output is pushed on, and copied to
the client, before the next step of the session begins.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import trio

from kernels.errors import KernelError
from kernels.kv_cache import SequenceCache
from p2p.errors import P2PError, RemoteProtocolError
from p2p.network import Network, PeerAddress
from p2p.rpc import MessageStream
from p2p.wire.message import Message, expect
from p2p.wire.replies import Ok, Refusal
from p2p.wire.session_messages import (
    MAX_HOPS,
    PUSH_PROTOCOL,
    AttachPush,
    HandOver,
    HopTime,
    Leaving,
    LinkDone,
    LinkFailed,
    LinkNext,
    LinkPrevious,
    OpenSession,
    Probe,
    ProbeReply,
    SessionOpened,
    Step,
    StepFailed,
    StepOutput,
    StepResult,
    Wanted,
)
from petald.cache_transfer import send_cache
from petald.errors import PetaldError
from petald.executor import Timed
from petald.hop_session import HopSession, PassOver, RepeatOutput
from petald.hosted_span import HostedSpan
from petald.log import get_logger
from petald.tensors import from_wire, to_wire

log = get_logger(__name__)

LINK_DEADLINE_S = 4.0
"""For dialling the next hop: its TCP and Noise handshakes over a slow home link."""

IDLE_SESSION_S = 900.0
"""A chat may pause; its room is not kept for ever."""

INBOX_STEPS = 16
"""Twice what a client may have under way, so that the reader is never kept from a probe."""

CODE_NEXT_HOP_LOST = "next_hop_lost"
CODE_SESSION_IDLE = "session_idle"
CODE_HAND_OVER_FAILED = "hand_over_failed"


class ServedSession:
    """One session; `Server` makes it when there is room.

    Args:
        request: what was asked for.
        client: the stream that it came on.
        cache: the session's, owned by this object's maker.
        network: to reach the next hop.
        hosted: the span.
        max_step_tokens: the longest step to take.
    """

    def __init__(
        self,
        request: OpenSession,
        client: MessageStream,
        cache: SequenceCache,
        *,
        network: Network,
        hosted: HostedSpan,
        max_step_tokens: int,
    ) -> None:
        self.request = request
        self.client = client
        self.cache = cache
        self.previous = request.previous
        self.state = HopSession(max_tokens=request.max_tokens, max_step_tokens=max_step_tokens)
        self.last_active_at = trio.current_time()
        self.is_busy = False
        self._network = network
        self._hosted = hosted
        self._inbox_in, self._inbox_out = trio.open_memory_channel[Message](INBOX_STEPS)
        self._received = 0
        self._next_stream: MessageStream | None = None
        self._next_peer: str | None = None
        self._previous_stream: MessageStream | None = None
        self._linking: trio.CancelScope | None = None
        self._is_handing_over = False
        self._last_output: tuple[Step, torch.Tensor, tuple[HopTime, ...]] | None = None

    async def run(self) -> None:
        """Serves until the client ends the session, or does nothing for long.

        Raises:
            P2PError, in a group: a stream broke, or what came on it was no message.
        """
        await self.client.send(SessionOpened(max_step_tokens=self.state.max_step_tokens))
        log.debug("session opened", blocks=f"{self.request.start}:{self.request.end}")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, nursery)
                await self._work(nursery.cancel_scope)
        finally:
            self._inbox_out.close()
            self._inbox_in.close()
            with trio.CancelScope(shield=True):
                for stream in (self._next_stream, self._previous_stream):
                    if stream is not None:
                        await stream.abort()

    async def tell_leaving(self, within_s: float) -> None:
        """Asks the client to move."""
        with contextlib.suppress(P2PError):
            await self.client.send(Leaving(within_s=within_s))

    async def take_pushes(self, messages: MessageStream) -> None:
        """Takes what the hop before pushes, until it ends, or another is to push."""
        if self._previous_stream is not None:
            await self._previous_stream.abort()
        self._previous_stream = messages
        await messages.send(Ok())
        try:
            while (item := await messages.receive()) is not None:
                step = expect(item, Step)
                self._received = max(self._received, step.number)
                await self._inbox_in.send(step)
        except RemoteProtocolError as error:
            log.info("pushes refused", peer=messages.remote_peer, reason=str(error))
            await self._report(0, error.code, str(error), culprit=messages.remote_peer)
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the session ended meanwhile

    async def _read(self, nursery: trio.Nursery) -> None:
        """Reads the client's stream; its end is the session's end."""
        while (item := await self.client.receive()) is not None:
            if isinstance(item, Step):
                self._received = max(self._received, item.number)
                await self._inbox_in.send(item)
            elif isinstance(item, Probe):
                reply = ProbeReply(request=item.request, received=self._received)
                await self.client.send(reply)
            elif isinstance(item, LinkPrevious):
                await self._expect_pushes_of(item, nursery)
            elif isinstance(item, LinkNext):
                self._cut_next(nursery)  # at once: the worker may wait for a hop that hangs
                await self._inbox_in.send(item)
            else:
                nursery.start_soon(self._hand_over, expect(item, HandOver))
        nursery.cancel_scope.cancel()

    async def _work(self, scope: trio.CancelScope) -> None:
        while True:
            with trio.move_on_after(IDLE_SESSION_S) as waiting:
                item = await self._inbox_out.receive()
            if waiting.cancelled_caught:
                await self._report(0, CODE_SESSION_IDLE, "the session was idle for too long")
                scope.cancel()
                return
            self.is_busy = True
            try:
                if isinstance(item, LinkNext):
                    await self._link(item)
                else:
                    await self._take_step(expect(item, Step))
            finally:
                self.is_busy = False
                self.last_active_at = trio.current_time()

    # Links.

    async def _expect_pushes_of(self, link: LinkPrevious, nursery: trio.Nursery) -> None:
        self.previous = link.peer
        stream = self._previous_stream
        if stream is not None and stream.remote_peer != link.peer:
            nursery.start_soon(stream.abort)
        await self.client.send(LinkDone(request=link.request))

    def _cut_next(self, nursery: trio.Nursery) -> None:
        """Ends the link to the next hop; nobody waits for it, since that hop may hang."""
        if self._linking is not None:
            self._linking.cancel()
        stream, self._next_stream = self._next_stream, None
        if stream is not None:
            nursery.start_soon(stream.abort)

    async def _link(self, link: LinkNext) -> None:
        self._next_peer = link.peer
        self._network.learn(PeerAddress(link.peer, link.addresses))
        reply: Message = LinkFailed(
            request=link.request,
            code=CODE_NEXT_HOP_LOST,
            text=f"{link.peer} did not answer within {LINK_DEADLINE_S:g} s",
        )
        with trio.move_on_after(LINK_DEADLINE_S) as self._linking:
            try:
                opened = await self._network.open_stream(link.peer, PUSH_PROTOCOL)
                self._next_stream = MessageStream(opened)
                await self._next_stream.send(AttachPush(session=link.session))
                answer = await self._next_stream.receive()
                if isinstance(answer, Ok):
                    reply = LinkDone(request=link.request)
                elif isinstance(answer, Refusal):
                    text = answer.text[:1024]
                    reply = LinkFailed(request=link.request, code=CODE_NEXT_HOP_LOST, text=text)
            except P2PError as error:
                text = str(error)[:1024]
                reply = LinkFailed(request=link.request, code=CODE_NEXT_HOP_LOST, text=text)
        self._linking = None
        if isinstance(reply, LinkFailed) and self._next_stream is not None:
            await self._next_stream.abort()
            self._next_stream = None
        await self.client.send(reply)

    async def _hand_over(self, item: HandOver) -> None:
        if self._is_handing_over:
            text = "another hand-over of this session is under way"
            await self.client.send(
                LinkFailed(request=item.request, code=CODE_HAND_OVER_FAILED, text=text)
            )
            return
        self._is_handing_over = True
        try:
            await send_cache(
                item,
                self.cache,
                network=self._network,
                hosted=self._hosted,
                blocks=(self.request.start, self.request.end),
            )
        except (P2PError, PetaldError, KernelError) as error:
            log.info("hand-over failed", to=item.peer, reason=str(error))
            await self.client.send(
                LinkFailed(request=item.request, code=CODE_HAND_OVER_FAILED, text=str(error)[:1024])
            )
        else:
            await self.client.send(LinkDone(request=item.request))
        finally:
            self._is_handing_over = False

    # Steps.

    async def _take_step(self, step: Step) -> None:
        try:
            output = await self._do_step(step)
        except (KernelError, PetaldError, P2PError) as error:
            log.info("step failed", number=step.number, code=error.code, reason=str(error))
            culprit = self.previous if isinstance(error, RemoteProtocolError) else None
            await self._report(step.number, error.code, str(error), culprit=culprit)
            return
        if output is not None:
            self._last_output = output
            await self._send_on(*output)

    async def _do_step(self, step: Step) -> tuple[Step, torch.Tensor, tuple[HopTime, ...]] | None:
        """Runs a step; gives it with its output and times, if anything is to be sent on."""
        shape = step.hidden.shape
        decision = self.state.on_step(
            number=step.number, position=step.position, tokens=shape[0] if shape else 0
        )
        if isinstance(decision, PassOver):
            return None
        if isinstance(decision, RepeatOutput):
            return self._last_output
        span = self._hosted.span
        hidden_SD = from_wire(
            step.hidden,
            hidden_size=span.config.hidden_size,
            max_tokens=self.state.max_step_tokens,
            dtype=span.dtype,
            device=span.device,
        )
        with self._truncated_on_failure(decision.truncate_to):
            timed = await self._hosted.run_step(
                self.cache,
                hidden_SD,
                position=decision.truncate_to,
                start=self.request.start,
                end=self.request.end,
                peer=self.client.remote_peer,
            )
        self.state.on_done(number=step.number, position=step.position, tokens=hidden_SD.shape[0])
        return step, timed.value, _add_time(step, timed)

    @contextlib.contextmanager
    def _truncated_on_failure(self, position: int) -> Iterator[None]:
        try:
            yield
        except KernelError:
            self.state.on_truncated(position)
            raise

    async def _send_on(
        self, step: Step, output_SD: torch.Tensor, times: tuple[HopTime, ...]
    ) -> None:
        codec = self.request.codec
        end = self.request.end
        if end in (step.until, self._hosted.span.config.num_blocks):
            rows_SD = output_SD if step.wanted == Wanted.ALL else output_SD[-1:]
            hidden = None if step.wanted == Wanted.NONE else to_wire(rows_SD, codec)
            await self.client.send(StepResult(number=step.number, hidden=hidden, times=times))
            return
        hidden = to_wire(output_SD, codec)
        try:
            if self._next_stream is None:
                raise _NoLink("the link to the next hop was never made, or is gone")
            await self._next_stream.send(
                Step(
                    number=step.number,
                    position=step.position,
                    hidden=hidden,
                    wanted=step.wanted,
                    until=step.until,
                    times=times,
                )
            )
        except (P2PError, _NoLink) as error:
            text = str(error)
            await self._report(step.number, CODE_NEXT_HOP_LOST, text, culprit=self._next_peer)
        # The copy comes after the push, which somebody waits for.
        await self.client.send(StepOutput(number=step.number, hidden=hidden))

    async def _report(
        self, number: int, code: str, text: str, *, culprit: str | None = None
    ) -> None:
        failed = StepFailed(number=number, code=code, text=text[:1024], culprit=culprit)
        await self.client.send(failed)


class _NoLink(PetaldError):
    """There is nobody to push to."""


def _add_time(step: Step, timed: Timed) -> tuple[HopTime, ...]:
    spent = HopTime(
        queue_us=math.ceil(timed.queue_s * 1e6), compute_us=math.ceil(timed.compute_s * 1e6)
    )
    return (*step.times, spent)[-MAX_HOPS:]
