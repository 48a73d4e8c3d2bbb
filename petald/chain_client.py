"""A session from the client's side: one cache on every hop of a chain, and steps through it.

`ChainSession.run` is the one task that owns the session; whoever generates awaits `run_step`. Steps
are sent to the first hop and come back from the last; several may be under way, so that a prefill
moves through the hops as a pipeline. Any hop may report a failure on its own stream. Invariant:
when `run` has ended, every hop has seen its stream end, and so gives the session's room back.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from p2p.errors import P2PError, Refused, RemoteProtocolError
from p2p.network import Network, PeerAddress
from p2p.rpc import MessageStream
from p2p.wire.message import Message, expect
from p2p.wire.replies import Ok, Refusal
from p2p.wire.session_messages import (
    SESSION_PROTOCOL,
    LinkNext,
    OpenSession,
    SessionOpened,
    Step,
    StepFailed,
    StepResult,
    Wanted,
)
from p2p.wire.tensor import WireTensor
from petald.errors import HopFailed, SessionLost
from petald.log import get_logger
from petald.routing import Hop

log = get_logger(__name__)

M = TypeVar("M", bound=Message)

OPEN_DEADLINE_S = 20.0
"""For opening a hop: a dial, two handshakes and one round trip over a slow home link."""

STEP_DEADLINE_S = 120.0
"""For a step through the whole chain: the longest prefill piece on a slow machine."""

CODE_NO_ANSWER = "no_answer"
CODE_STREAM_BROKEN = "stream_broken"


@dataclass(eq=False, slots=True)
class _Pending:
    """A step under way."""

    done: trio.Event = field(default_factory=trio.Event)
    result: StepResult | None = None


class ChainSession:
    """One inference on one chain.

    Args:
        network: the way to the hops.
        model: the fingerprint.
        chain: hops in block order, which cover the model.
        max_tokens: the most tokens that the session will have cached.
    """

    def __init__(
        self, network: Network, *, model: bytes, chain: Sequence[Hop], max_tokens: int
    ) -> None:
        self.chain = tuple(chain)
        self.max_tokens = max_tokens
        self.max_step_tokens = 0
        self._network = network
        self._model = model
        self._ids = [os.urandom(16) for _ in self.chain]
        self._streams: list[MessageStream] = []
        self._pending: dict[int, _Pending] = {}
        self._next_number = 1
        self._failure: HopFailed | None = None
        self._scope = trio.CancelScope()
        self._has_ended = trio.Event()

    @property
    def is_open(self) -> bool:
        """Whether steps can be run."""
        return bool(self._streams) and self._failure is None and not self._has_ended.is_set()

    async def run(
        self, *, task_status: trio.TaskStatus[HopFailed | None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Opens the session, and keeps it until `close`.

        Reports, as the nursery's start value, the failure of the hop that could not be opened, or
        none once steps can be run.
        """
        with self._scope:
            try:
                try:
                    await self._open()
                except HopFailed as failure:
                    self._failure = failure
                    task_status.started(failure)
                    return
                task_status.started(None)
                async with trio.open_nursery() as nursery:
                    for hop, stream in zip(self.chain, self._streams, strict=True):
                        nursery.start_soon(self._read, hop, stream)
            finally:
                with trio.CancelScope(shield=True):
                    for stream in self._streams:
                        await stream.abort()
                self._wake_all()
                self._has_ended.set()

    async def close(self) -> None:
        """Ends the session on every hop."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._has_ended.wait()

    async def run_step(
        self,
        hidden: WireTensor,
        *,
        position: int,
        wanted: Wanted,
        meanwhile: Callable[[], Awaitable[None]] | None = None,
    ) -> StepResult:
        """Runs one step through the chain.

        Args:
            hidden: ``[tokens, hidden]``, at most `max_step_tokens` tokens.
            position: of the first token; the caches are cut back to it.
            wanted: which rows of the output to bring back.
            meanwhile: awaited while the step is on its way.

        Raises:
            HopFailed, SessionLost: the session is lost.

        Cancellation: the step was sent, whole, or not. The session can be used on, since the next
        step says from where.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_failure()
        number = self._next_number
        self._next_number += 1
        pending = self._pending[number] = _Pending()
        try:
            await self._send_first(
                Step(number=number, position=position, hidden=hidden, wanted=wanted)
            )
            if meanwhile is not None:
                await meanwhile()
            with trio.move_on_after(STEP_DEADLINE_S) as waiting:
                await pending.done.wait()
        finally:
            del self._pending[number]
        self._check_failure()
        if waiting.cancelled_caught:
            text = f"no answer to a step within {STEP_DEADLINE_S:g} s"
            raise self._fail(self.chain[-1], CODE_NO_ANSWER, text)
        if pending.result is None:
            raise SessionLost("the session was closed while a step was under way")
        return pending.result

    async def _send_first(self, step: Step) -> None:
        """Sends a step to the first hop, whole or not at all, so that a job can be cancelled."""
        with trio.move_on_after(STEP_DEADLINE_S, shield=True) as sending:
            try:
                await self._streams[0].send(step)
            except P2PError as error:
                raise self._fail(self.chain[0], error.code, str(error)) from error
        if sending.cancelled_caught:
            text = f"did not take a step within {STEP_DEADLINE_S:g} s"
            raise self._fail(self.chain[0], CODE_NO_ANSWER, text)

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._has_ended.is_set():
            raise SessionLost("the session is closed")

    async def _open(self) -> None:
        failures: list[HopFailed] = []
        streams: list[MessageStream | None] = [None] * len(self.chain)
        limits: list[int] = []

        async def open_hop(index: int) -> None:
            hop = self.chain[index]
            with trio.move_on_after(OPEN_DEADLINE_S) as waiting:
                try:
                    self._network.learn(PeerAddress(hop.peer, hop.addresses))
                    stream = await self._network.open_stream(hop.peer, SESSION_PROTOCOL)
                    streams[index] = messages = MessageStream(stream)
                    limits.append(await self._say_hello(index, messages))
                except P2PError as error:
                    failures.append(_hop_failed(hop, error))
            if waiting.cancelled_caught:
                text = f"did not open a session within {OPEN_DEADLINE_S:g} s"
                failures.append(HopFailed(_describe(hop, text), peer=hop.peer))

        async def link_hop(index: int) -> None:
            following = self.chain[index + 1]
            messages = streams[index]
            assert messages is not None
            with trio.move_on_after(OPEN_DEADLINE_S) as waiting:
                try:
                    await messages.send(
                        LinkNext(
                            peer=following.peer,
                            session=self._ids[index + 1],
                            addresses=following.addresses,
                        )
                    )
                    _check_reply(messages, await messages.receive(), Ok)
                except Refused as error:  # it is the next hop that could not be reached
                    failures.append(_hop_failed(following, error))
                except P2PError as error:
                    failures.append(_hop_failed(self.chain[index], error))
            if waiting.cancelled_caught:
                text = f"was not linked within {OPEN_DEADLINE_S:g} s"
                failures.append(HopFailed(_describe(following, text), peer=following.peer))

        try:
            async with trio.open_nursery() as nursery:
                for index in range(len(self.chain)):
                    nursery.start_soon(open_hop, index)
            if not failures:
                async with trio.open_nursery() as nursery:
                    for index in range(len(self.chain) - 1):
                        nursery.start_soon(link_hop, index)
        finally:
            self._streams = [messages for messages in streams if messages is not None]
        if failures:
            raise failures[0]
        self.max_step_tokens = min(limits)

    async def _say_hello(self, index: int, messages: MessageStream) -> int:
        hop = self.chain[index]
        await messages.send(
            OpenSession(
                session=self._ids[index],
                model=self._model,
                start=hop.start,
                end=hop.end,
                max_tokens=self.max_tokens,
                previous=self.chain[index - 1].peer if index else None,
            )
        )
        opened = _check_reply(messages, await messages.receive(), SessionOpened)
        if opened.max_step_tokens < 1:
            raise RemoteProtocolError("the server takes no tokens in a step")
        return opened.max_step_tokens

    async def _read(self, hop: Hop, stream: MessageStream) -> None:
        """Takes what one hop has to say, until its stream ends."""
        try:
            while (received := await stream.receive()) is not None:
                if isinstance(received, StepResult) and hop is self.chain[-1]:
                    pending = self._pending.get(received.number)
                    if pending is not None:
                        pending.result = received
                        pending.done.set()
                elif isinstance(received, StepFailed):
                    self._blame(hop, received)
                else:
                    expect(received, StepFailed)
        except P2PError as error:
            self._fail(hop, error.code, str(error))
        else:
            self._fail(hop, CODE_STREAM_BROKEN, "it ended the session")

    def _blame(self, reporter: Hop, failed: StepFailed) -> None:
        culprit = next((hop for hop in self.chain if hop.peer == failed.culprit), reporter)
        self._fail(culprit, failed.code, failed.text)

    def _fail(self, hop: Hop, code: str, text: str) -> HopFailed:
        if self._failure is None:
            self._failure = HopFailed(_describe(hop, f"failed ({code}): {text!r}"), peer=hop.peer)
            log.info("hop failed", peer=hop.peer, blocks=f"{hop.start}:{hop.end}", reason=code)
        self._wake_all()
        return self._failure

    def _wake_all(self) -> None:
        for pending in self._pending.values():
            pending.done.set()


def _check_reply(messages: MessageStream, reply: Message | None, cls: type[M]) -> M:
    if reply is None:
        raise RemoteProtocolError("the stream ended before the answer")
    if isinstance(reply, Refusal):
        raise Refused(messages.remote_peer, reply.code, reply.text, reply.retry_after_s)
    return expect(reply, cls)


def _hop_failed(hop: Hop, error: P2PError) -> HopFailed:
    return HopFailed(_describe(hop, str(error)), peer=hop.peer)


def _describe(hop: Hop, text: str) -> str:
    return f"the hop {hop.peer} for blocks {hop.start}:{hop.end} {text}"
