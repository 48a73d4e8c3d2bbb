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
from dataclasses import dataclass
from functools import partial

import torch
import trio

from kernels.errors import KernelError
from p2p.errors import DeadlineExceeded, P2PError, RemoteProtocolError
from p2p.network import Network
from p2p.rpc import MessageStream
from p2p.wire.message import Message, expect
from p2p.wire.replies import Ok, Refusal
from p2p.wire.session_messages import (
    MAX_HOPS,
    PUSH_PROTOCOL,
    AttachCache,
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
from p2p.wire.tensor import WireTensor
from petald.cache_transfer import TRANSFER_DEADLINE_S, receive_cache, send_cache
from petald.errors import PetaldError
from petald.executor import Timed
from petald.hop_session import HopSession, PassOver, RepeatOutput
from petald.hosted_cache import HostedCache
from petald.hosted_span import HostedSpan
from petald.log import get_logger
from petald.message_codecs import MessageCodecs
from petald.tensors import from_wire, off_loop

log = get_logger(__name__)

LINK_DEADLINE_S = 4.0
"""For dialling the next hop: its TCP and Noise handshakes over a slow home link."""

IDLE_SESSION_S = 900.0
"""A chat may pause; its room is not kept for ever."""

INBOX_STEPS = 32
"""Four times what a client may have under way, so that the reader is never kept from a probe: what
a failure elsewhere made worthless, twice over, waits here for a moment together with what follows.
"""

SEND_DEADLINE_S = 60.0
"""A client that does not read for so long holds a place that others need."""

TELL_DEADLINE_S = 5.0

GAP_WEIGHT = 0.2
"""Of the newest pause between two steps in their mean."""

CODE_NEXT_HOP_LOST = "next_hop_lost"
CODE_SESSION_IDLE = "session_idle"
CODE_HAND_OVER_FAILED = "hand_over_failed"


@dataclass(frozen=True, slots=True)
class _Output:
    """What came of a step, as it goes out; whoever wants it again gets the same bytes.

    Attributes:
        step: of which it is.
        hidden: encoded; none where no rows are wanted.
        is_result: the step ends here, and the rows go to the client alone.
        times: of the hops passed.
    """

    step: Step
    hidden: WireTensor | None
    is_result: bool
    times: tuple[HopTime, ...]


@dataclass(frozen=True, slots=True)
class _Pushed:
    """A step in the inbox that the hop before pushed."""

    peer: str
    step: Step


class ServedSession:
    """One session; `Server` makes it when there is room.

    Args:
        request: what was asked for.
        client: the stream that it came on.
        cache: the session's, owned by this object's maker.
        network: to reach the next hop.
        hosted: the span.
        codecs: encode its outputs.
        max_step_tokens: the longest step to take.
    """

    def __init__(
        self,
        request: OpenSession,
        client: MessageStream,
        cache: HostedCache,
        *,
        network: Network,
        hosted: HostedSpan,
        codecs: MessageCodecs,
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
        self.hosted = hosted
        self._codecs = codecs
        self._inbox_in, self._inbox_out = trio.open_memory_channel[Message | _Pushed](INBOX_STEPS)
        self._received = 0
        self._pushed = 0
        self._end_received = 0
        self._rewound: tuple[int, int] | None = None
        self._gap_s = 0.0
        self._has_begun = False
        self._has_ended = False
        self._receiving: trio.CancelScope | None = None
        self._receive_ended = trio.Event()
        self._next_stream: MessageStream | None = None
        self._next_peer: str | None = None
        self._previous_stream: MessageStream | None = None
        self._linking: trio.CancelScope | None = None
        self._is_handing_over = False
        self._last_output: _Output | None = None

    async def run(self) -> None:
        """Serves until the client ends the session, or does nothing for long.

        Raises:
            P2PError, in a group: a stream broke, or what came on it was no message.
        """
        try:
            await self._tell(SessionOpened(max_step_tokens=self.state.max_step_tokens))
            log.debug("session opened", blocks=f"{self.request.start}:{self.request.end}")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, nursery)
                await self._work(nursery.cancel_scope)
        finally:
            self._has_ended = True
            self._inbox_out.close()
            self._inbox_in.close()
            if self._receiving is not None:
                self._receiving.cancel()
            with trio.CancelScope(shield=True):
                for stream in (self._next_stream, self._previous_stream):
                    if stream is not None:
                        await stream.abort()

    @property
    def has_ended(self) -> bool:
        """Whether it serves no more."""
        return self._has_ended

    def is_in_use(self, idle_s: float, *, since: float) -> bool:
        """Whether its client would miss it now.

        Args:
            idle_s: after so long without anything, or after some of its usual pauses, it is not.
            since: the least time from which that is counted.
        """
        quiet_s = trio.current_time() - max(self.last_active_at, since)
        return self.is_busy or self._is_handing_over or quiet_s < max(idle_s, 4 * self._gap_s)

    async def tell_leaving(self, within_s: float) -> None:
        """Asks the client to move."""
        with contextlib.suppress(P2PError), trio.move_on_after(TELL_DEADLINE_S):
            await self.client.send(Leaving(within_s=within_s))

    async def _tell(self, message: Message) -> None:
        with trio.move_on_after(SEND_DEADLINE_S):
            await self.client.send(message)
            return
        raise DeadlineExceeded(f"{self.client.remote_peer} does not read what it asked for")

    async def take_pushes(self, messages: MessageStream) -> None:
        """Takes what the hop before pushes, until it ends, or another is to push."""
        before, self._previous_stream = self._previous_stream, messages
        if before is not None:
            await before.abort()
        if self._has_ended or self._previous_stream is not messages:
            return
        await messages.send(Ok())
        try:
            while (item := await messages.receive()) is not None:
                step = expect(item, Step)
                if self.previous != messages.remote_peer:
                    return
                if step.number > self._pushed:  # else it came before, or goes in a circle
                    self._pushed = step.number
                    self._note_arrival(step)
                    await self._inbox_in.send(_Pushed(messages.remote_peer, step))
        except RemoteProtocolError as error:
            log.info("pushes refused", peer=messages.remote_peer, reason=str(error))
            await self._report(0, error.code, str(error), culprit=messages.remote_peer)
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the session ended meanwhile

    async def receive_cache(self, attach: AttachCache, messages: MessageStream) -> bool:
        """Takes the cache that another hop hands over, before any step; says whether it is here.

        The first step ends it, if it still goes on: then the client has changed its mind.
        """
        text = "the session has begun, or was opened for fewer tokens, or takes a cache already"
        is_late = self._has_begun or self._has_ended
        if is_late or self._receiving or attach.tokens > self.state.max_tokens:
            await messages.send(Refusal(code="bad_request", text=text))
            return False
        self._receive_ended = trio.Event()
        try:
            with trio.move_on_after(TRANSFER_DEADLINE_S) as self._receiving:
                await receive_cache(
                    attach,
                    messages,
                    self.cache,
                    hosted=self.hosted,
                    blocks=(self.request.start, self.request.end),
                )
                self.state.on_handed_over(attach.tokens)
        except KernelError as error:
            await messages.send(Refusal(code=error.code, text=str(error)[:1024]))
        finally:
            self._receiving = None
            self._receive_ended.set()
        if not self.state.length:
            return False
        await messages.send(Ok())
        return True

    def _note_arrival(self, step: Step) -> None:
        """Remembers where a client began again: what waits beyond that need not be computed."""
        self._received = max(self._received, step.number)
        if step.position < self._end_received:
            self._rewound = step.number, step.position
        self._end_received = step.position + (step.hidden.shape[0] if step.hidden.shape else 0)

    def _is_superseded(self, step: Step) -> bool:
        if self._rewound is None:
            return False
        number, position = self._rewound
        return step.number < number and step.position >= position

    async def _read(self, nursery: trio.Nursery) -> None:
        """Reads the client's stream; its end is the session's end."""
        while (item := await self.client.receive()) is not None:
            if isinstance(item, Step):
                self._note_arrival(item)
                await self._inbox_in.send(item)
            elif isinstance(item, Probe):
                await self._tell(ProbeReply(request=item.request, received=self._received))
            elif isinstance(item, LinkPrevious):
                await self._expect_pushes_of(item, nursery)
            elif isinstance(item, LinkNext):
                self._cut_next(nursery)  # at once: the worker may wait for a hop that hangs
                await self._inbox_in.send(item)
            elif self._is_handing_over:
                text = "another hand-over of this session is under way"
                request = expect(item, HandOver).request
                await self._tell(LinkFailed(request=request, code=CODE_HAND_OVER_FAILED, text=text))
            else:
                self._is_handing_over = True
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
                elif not isinstance(item, _Pushed):
                    await self._take_step(expect(item, Step))
                elif item.peer == self.previous:  # else its link was ended while it waited
                    await self._take_step(item.step)
            finally:
                self.is_busy = False
                now = trio.current_time()
                self._gap_s += GAP_WEIGHT * (now - self.last_active_at - self._gap_s)
                self.last_active_at = now

    # Links.

    async def _expect_pushes_of(self, link: LinkPrevious, nursery: trio.Nursery) -> None:
        if self.previous != link.peer:  # nothing that the other one said counts any more
            self.previous = link.peer
            self._pushed = self._received = self._end_received = 0
            self._rewound = None
            self.state.on_new_previous()
        stream = self._previous_stream
        if stream is not None and stream.remote_peer != link.peer:
            nursery.start_soon(stream.abort)
        await self._tell(LinkDone(request=link.request))

    def _cut_next(self, nursery: trio.Nursery) -> None:
        """Ends the link to the next hop; nobody waits for it, since that hop may hang."""
        if self._linking is not None:
            self._linking.cancel()
        stream, self._next_stream = self._next_stream, None
        if stream is not None:
            nursery.start_soon(stream.abort)

    async def _link(self, link: LinkNext) -> None:
        if self._next_stream is not None:  # of a link that was made while this one waited
            await self._next_stream.abort()
            self._next_stream = None
        self._next_peer = link.peer
        reply: Message = LinkFailed(
            request=link.request,
            code=CODE_NEXT_HOP_LOST,
            text=f"{link.peer} did not answer within {LINK_DEADLINE_S:g} s",
        )
        with trio.move_on_after(LINK_DEADLINE_S) as self._linking:
            try:
                opened = await self._network.open_stream(
                    link.peer, PUSH_PROTOCOL, hints=link.addresses
                )
                stream = self._next_stream = MessageStream(opened)
                await stream.send(AttachPush(session=link.session))
                answer = await stream.receive()
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
        await self._tell(reply)

    async def _hand_over(self, item: HandOver) -> None:
        try:
            await send_cache(
                item,
                self.cache,
                network=self._network,
                hosted=self.hosted,
                blocks=(self.request.start, self.request.end),
            )
        except (P2PError, PetaldError, KernelError) as error:
            log.info("hand-over failed", to=item.peer, reason=str(error))
            text = str(error)[:1024]
            await self._tell(
                LinkFailed(request=item.request, code=CODE_HAND_OVER_FAILED, text=text)
            )
        else:
            await self._tell(LinkDone(request=item.request))
        finally:
            self._is_handing_over = False

    # Steps.

    async def _take_step(self, step: Step) -> None:
        self._has_begun = True
        if self._receiving is not None:
            self._receiving.cancel()
            await self._receive_ended.wait()
        if self._is_superseded(step):
            return
        try:
            output = await self._do_step(step)
        except (KernelError, PetaldError, P2PError) as error:
            log.info("step failed", number=step.number, code=error.code, reason=str(error))
            culprit = self.previous if isinstance(error, RemoteProtocolError) else None
            await self._report(step.number, error.code, str(error), culprit=culprit)
            return
        if output is not None:
            self._last_output = output
            await self._send_on(output)

    async def _do_step(self, step: Step) -> _Output | None:
        """Runs a step; gives what is to be sent on, if anything."""
        shape = step.hidden.shape
        decision = self.state.on_step(
            number=step.number, position=step.position, tokens=shape[0] if shape else 0
        )
        if isinstance(decision, PassOver):
            return None
        if isinstance(decision, RepeatOutput):
            return self._last_output
        span, previous = self.hosted.span, self.previous
        hidden_SD = await off_loop(
            partial(
                from_wire,
                step.hidden,
                hidden_size=span.config.hidden_size,
                max_tokens=self.state.max_step_tokens,
                dtype=span.dtype,
                device=span.device,
            ),
            size_bytes=4 * math.prod(shape),
        )
        with self._truncated_on_failure(decision.truncate_to):
            timed = await self.hosted.run_step(
                self.cache,
                hidden_SD,
                position=decision.truncate_to,
                start=self.request.start,
                end=self.request.end,
                peer=self.client.remote_peer,
            )
            output = await self._make_output(step, timed.value, _add_time(step, timed))
        self.state.on_done(number=step.number, position=step.position, tokens=hidden_SD.shape[0])
        if self.previous != previous:  # meanwhile: the step may have been the other one's
            self.state.on_new_previous()
        return output

    async def _make_output(
        self, step: Step, output_SD: torch.Tensor, times: tuple[HopTime, ...]
    ) -> _Output:
        client = self.client.remote_peer
        asked = self.request.codec
        if self.request.end not in (step.until, self.hosted.span.config.num_blocks):
            to = [client] if self._next_peer is None else [self._next_peer, client]
            hidden = await self._codecs.encode(output_SD, asked, to=to)
            return _Output(step, hidden, is_result=False, times=times)
        if step.wanted == Wanted.NONE:
            return _Output(step, None, is_result=True, times=times)
        rows_SD = output_SD if step.wanted == Wanted.ALL else output_SD[-1:]
        hidden = await self._codecs.encode(rows_SD, asked, to=[client])
        return _Output(step, hidden, is_result=True, times=times)

    @contextlib.contextmanager
    def _truncated_on_failure(self, position: int) -> Iterator[None]:
        try:
            yield
        except KernelError:
            self.state.on_truncated(position)
            raise

    async def _send_on(self, output: _Output) -> None:
        step, hidden = output.step, output.hidden
        if output.is_result or hidden is None:
            result = StepResult(number=step.number, hidden=hidden, times=output.times)
            await self._tell(result)
            return
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
                    times=output.times,
                )
            )
        except (P2PError, _NoLink) as error:
            text = str(error)
            await self._report(step.number, CODE_NEXT_HOP_LOST, text, culprit=self._next_peer)
        # The copy comes after the push, which somebody waits for.
        await self._tell(StepOutput(number=step.number, hidden=hidden))

    async def _report(
        self, number: int, code: str, text: str, *, culprit: str | None = None
    ) -> None:
        failed = StepFailed(number=number, code=code, text=text[:1024], culprit=culprit)
        await self._tell(failed)


class _NoLink(PetaldError):
    """There is nobody to push to."""


def _add_time(step: Step, timed: Timed) -> tuple[HopTime, ...]:
    spent = HopTime(
        queue_us=math.ceil(timed.queue_s * 1e6), compute_us=math.ceil(timed.compute_s * 1e6)
    )
    return (*step.times, spent)[-MAX_HOPS:]
