"""Streams to the servers that run a client's forward and backward passes.

A `PassLink` is one stream to one server, for some blocks; several pieces may be on it at once. It
is kept between the steps of a training run, and found by what it is for. Invariant: whoever waits
for an answer gets it, or `HopFailed` with the server's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from kernels.errors import BadAdapter
from p2p.errors import P2PError, RemoteProtocolError
from p2p.network import Network
from p2p.rpc import MessageStream
from p2p.wire.frame import MAX_FRAME_BYTES
from p2p.wire.message import Message, expect
from p2p.wire.pass_messages import (
    CODE_NOT_FINITE,
    CODE_UNKNOWN_ADAPTER,
    PASS_PROTOCOL,
    AdapterLent,
    BackwardResult,
    ForwardResult,
    LendAdapter,
    OpenPass,
    PassFailed,
    PassOpened,
    RunBackward,
    RunForward,
)
from p2p.wire.replies import Refusal
from p2p.wire.tensor import WireTensor
from petald.errors import HopFailed, leaves
from petald.lent_adapter import AdapterPart, LentAdapter
from petald.lively_stream import LivelyStream
from petald.log import get_logger
from petald.tensors import off_loop

log = get_logger(__name__)

M = TypeVar("M", ForwardResult, BackwardResult)

OPEN_DEADLINE_S = 10.0
"""For dialling and the server's first answer, over a slow home link."""

WINDOW = 2
"""Pieces on a link at once: while one is computed, the next is on its way."""

SILENCE_S = 1.0
PING_DEADLINE_S = 4.0
"""A server that owes an answer, and from and to which not a byte went for so long, is pinged; its
network answers while its device computes."""

MOST_SILENCE_S = 1800.0
"""A server that lives, and has not sent a byte of an answer for so long, is given up."""

MAX_LINKS_PER_PEER = 8
"""Beyond these, links that nothing waits for are closed: a model that is cut into many parts would
take all streams of a server."""

IDLE_S = 120.0
"""A link that no job used for so long is closed."""

MAX_LENT = 1024
"""Adapters that a link remembers to have lent."""

MAX_LENDS = 3
"""Times that one piece's adapter is lent again, before the server counts as failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkKey:
    """What a link is for.

    Attributes:
        model: the fingerprint.
        peer: the server.
        start: first block.
        end: the block after the last one.
        codec: of forward's outputs.
        gradient_codec: of backward's.
        hosted: the name of an adapter of the server's own; none for none.
    """

    model: bytes
    peer: str
    start: int
    end: int
    codec: str
    gradient_codec: str
    hosted: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PassPiece:
    """Some whole sequences of a batch.

    Attributes:
        sequences: how many.
        tokens: of each.
        mask: uint8 ``[sequences, tokens]``; none where all tokens are real.
    """

    sequences: int
    tokens: int
    mask: WireTensor | None = None


@dataclass(eq=False, slots=True)
class _Request:
    """A request that somebody awaits."""

    done: trio.Event = field(default_factory=trio.Event)
    answer: Message | None = None


class PassLink:
    """One stream; made by `PassLinks.get`."""

    def __init__(self, network: Network, key: LinkKey, addresses: tuple[str, ...]) -> None:
        self.key = key
        self.max_tokens = 0
        self.used_at = trio.current_time()
        self.is_over = False
        self._network = network
        self._addresses = addresses
        self._max_adapter_bytes = 0
        self._window = trio.CapacityLimiter(WINDOW)
        self._requests: dict[int, _Request] = {}
        self._numbers = 0
        self._lent: dict[bytes, int] = {}  # with the number of the request that lent it
        self._heard_at = trio.current_time()
        self._is_open = trio.Event()
        self._failure: tuple[str, str] | None = None
        self._messages: MessageStream | None = None
        self._scope = trio.CancelScope()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return self._is_open.is_set() and not self._requests and not self._window.borrowed_tokens

    async def run(self) -> None:
        """Opens the stream, and keeps it until it fails, or is closed or idle."""
        try:
            with self._scope:
                await self._run()
        except* P2PError as group:
            for error in leaves(group):
                assert isinstance(error, P2PError)
                self._fail(error.code, str(error))
        finally:
            self._fail("stream_broken", "the stream was closed")

    async def wait_open(self) -> None:
        """Waits until requests can be made.

        Raises:
            HopFailed: it could not be opened.
        """
        await self._is_open.wait()
        if self._failure is not None:
            raise self._failed()

    def close(self) -> None:
        """Ends the stream; those who wait get `HopFailed`."""
        self.is_over = True
        self._scope.cancel()

    async def run_forward(
        self, piece: PassPiece, hidden: WireTensor, adapter: LentAdapter | None
    ) -> ForwardResult:
        """Runs a piece of at most `max_tokens` through the link's blocks.

        Raises:
            HopFailed: the server did not do it.
            BadAdapter: the adapter is too large for the server, or does not fit.
        """
        return await self._ask(
            lambda number, digest: RunForward(
                number=number,
                sequences=piece.sequences,
                tokens=piece.tokens,
                hidden=hidden,
                mask=piece.mask,
                adapter=digest,
            ),
            ForwardResult,
            adapter,
        )

    async def run_backward(
        self,
        piece: PassPiece,
        hidden: WireTensor,
        gradient: WireTensor,
        adapter: LentAdapter | None,
    ) -> BackwardResult:
        """Takes a gradient back through the link's blocks; as `run_forward`."""
        return await self._ask(
            lambda number, digest: RunBackward(
                number=number,
                sequences=piece.sequences,
                tokens=piece.tokens,
                hidden=hidden,
                gradient=gradient,
                mask=piece.mask,
                adapter=digest,
            ),
            BackwardResult,
            adapter,
        )

    async def _ask(
        self,
        make_request: Callable[[int, bytes | None], Message],
        result: type[M],
        adapter: LentAdapter | None,
    ) -> M:
        await self.wait_open()
        await trio.lowlevel.checkpoint_if_cancelled()
        if adapter is not None:  # whose digest is made here, the first time
            size_bytes = adapter.values_LE.nbytes
            await off_loop(adapter.part, self.key.start, self.key.end, size_bytes=size_bytes)
        async with self._window:
            for _ in range(MAX_LENDS):
                lending = await self._lend(adapter)
                digest = None if adapter is None else self._part(adapter).digest
                lent_by = None if digest is None else self._lent[digest]
                answer = await self._exchange(make_request, digest)
                if isinstance(answer, result):
                    return answer
                failed = answer if isinstance(answer, PassFailed) else None
                if failed is None or failed.code != CODE_UNKNOWN_ADAPTER or digest is None:
                    break
                if self._lent.get(digest) == lent_by:  # nobody lent it again meanwhile
                    del self._lent[digest]
                if lending is not None:  # its own answer, which came before, says why
                    self._check_lent(lending)
        if isinstance(answer, PassFailed):
            raise HopFailed(
                f"{self.key.peer} could not do it ({answer.code}): {answer.text!r}",
                peer=self.key.peer,
                reason=answer.code,
            )
        self._fail("remote_protocol_error", "the answer is none that was asked for")
        self.close()
        raise self._failed()

    def _part(self, adapter: LentAdapter) -> AdapterPart:
        return adapter.part(self.key.start, self.key.end)

    async def _lend(self, adapter: LentAdapter | None) -> _Request | None:
        """Sends an adapter that was not sent on this stream yet, and does not wait."""
        if adapter is None:
            return None
        part = self._part(adapter)
        if part.digest in self._lent:
            return None
        if len(part.values.data) > self._max_adapter_bytes:
            raise BadAdapter(
                f"the adapter's part for blocks {self.key.start}:{self.key.end} has "
                f"{len(part.values.data)} bytes; their server takes {self._max_adapter_bytes}. Use "
                "a lower rank, fewer target modules, or fewer prompt tokens"
            )
        number, request = self._begin()
        self._lent[part.digest] = number
        if len(self._lent) > MAX_LENT:  # of a long training run, whose first ones are long gone
            del self._lent[next(iter(self._lent))]
        await self._send(
            LendAdapter(number=number, adapter=part.digest, form=part.form, values=part.values)
        )
        return request

    def _check_lent(self, lending: _Request) -> None:
        answer = lending.answer
        if isinstance(answer, PassFailed) and answer.code == BadAdapter.code:
            raise BadAdapter(f"{self.key.peer} does not take the adapter: {answer.text!r}")

    def _begin(self) -> tuple[int, _Request]:
        if not self._requests:  # until now it owed nothing
            self._note_life()
        self._numbers += 1
        request = self._requests[self._numbers] = _Request()
        return self._numbers, request

    async def _exchange(
        self, make_request: Callable[[int, bytes | None], Message], digest: bytes | None
    ) -> Message:
        number, request = self._begin()
        await self._send(make_request(number, digest))
        await request.done.wait()
        self.used_at = trio.current_time()
        if request.answer is None:
            raise self._failed()
        return request.answer

    async def _send(self, message: Message) -> None:
        if self._failure is not None or self._messages is None:
            raise self._failed()
        try:
            # Whole or not at all, for others share the stream; its end ends this too.
            with trio.CancelScope(shield=True):
                await self._messages.send(message)
        except P2PError as error:
            self._fail(error.code, str(error))
            self.close()
            raise self._failed() from error

    def _failed(self) -> HopFailed:
        code, text = self._failure or ("stream_broken", "it is not open")
        peer = self.key.peer
        return HopFailed(f"{peer} failed ({code}): {text!r}", peer=peer, reason=code)

    async def _run(self) -> None:
        with trio.move_on_after(OPEN_DEADLINE_S) as opening:
            stream = await self._network.open_stream(
                self.key.peer, PASS_PROTOCOL, hints=self._addresses
            )
        if opening.cancelled_caught:
            self._fail_silent_opening()
            return
        self._messages = messages = MessageStream(LivelyStream(stream, self._note_life))
        try:
            with trio.move_on_at(opening.deadline) as asking:
                opened = await self._open(messages)
            if asking.cancelled_caught:
                self._fail_silent_opening()
            elif opened is not None:
                await self._serve(messages, opened)
        finally:
            with trio.CancelScope(shield=True):
                await messages.abort()

    async def _open(self, messages: MessageStream) -> PassOpened | None:
        """Asks for the stream; gives none where it was refused."""
        key = self.key
        await messages.send(
            OpenPass(
                model=key.model,
                start=key.start,
                end=key.end,
                codec=key.codec,
                gradient_codec=key.gradient_codec,
                hosted=key.hosted,
            )
        )
        reply = await messages.receive()
        if isinstance(reply, Refusal):
            # What it says of numbers is believed of those that it computed alone.
            code = "refused" if reply.code == CODE_NOT_FINITE else reply.code
            self._fail(code, reply.text)
            return None
        if reply is None:
            raise RemoteProtocolError("the stream ended before the answer")
        return expect(reply, PassOpened)

    async def _serve(self, messages: MessageStream, opened: PassOpened) -> None:
        self.max_tokens = opened.max_tokens
        self._max_adapter_bytes = min(opened.max_adapter_bytes, MAX_FRAME_BYTES)
        self._is_open.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._break_when_cancelled, messages)
            await self._read(messages)
            nursery.cancel_scope.cancel()

    async def _break_when_cancelled(self, messages: MessageStream) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await messages.abort()

    def _fail_silent_opening(self) -> None:
        self._fail("deadline_exceeded", f"it did not answer within {OPEN_DEADLINE_S:g} s")

    def _note_life(self) -> None:
        self._heard_at = trio.current_time()

    async def _read(self, messages: MessageStream) -> None:
        while (received := await messages.receive()) is not None:
            number = getattr(received, "number", None)
            request = self._requests.pop(number, None) if isinstance(number, int) else None
            if request is None or not isinstance(
                received, ForwardResult | BackwardResult | AdapterLent | PassFailed
            ):
                raise RemoteProtocolError(
                    f"a message {received.MESSAGE_NAME!r} came that answers nothing"
                )
            request.answer = received
            request.done.set()
        self._fail("stream_broken", "it ended the stream")

    async def _watch(self) -> None:
        """Pings a server that owes an answer and is silent."""
        while True:
            await trio.sleep(SILENCE_S)
            now = trio.current_time()
            if not self._requests:
                if now - self.used_at > IDLE_S:
                    self.close()
                continue
            silent_s = now - self._heard_at
            if silent_s > MOST_SILENCE_S:
                self._fail("silent", f"it has not answered for {silent_s:.0f} s")
                self.close()
            if silent_s < SILENCE_S:
                continue
            with trio.move_on_after(PING_DEADLINE_S) as pinging, contextlib.suppress(P2PError):
                await self._network.ping(self.key.peer)
            if pinging.cancelled_caught and self._heard_at < now:
                self._fail("silent", f"it has been silent for {silent_s + PING_DEADLINE_S:.1f} s")
                self.close()

    def _fail(self, code: str, text: str) -> None:
        self.is_over = True
        if self._failure is None:
            self._failure = (code, text)
        self._is_open.set()
        for request in self._requests.values():
            request.done.set()
        self._requests.clear()


class PassLinks:
    """All links of a daemon.

    Args:
        network: the way to the servers.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._links: dict[LinkKey, PassLink] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Holds the links until it is cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def get(self, key: LinkKey, addresses: tuple[str, ...] = ()) -> PassLink:
        """The link that there is, or a new one, which is being opened.

        Args:
            key: what it is for.
            addresses: where the server was last known to listen.
        """
        link = self._links.get(key)
        if link is None or link.is_over:
            assert self._nursery is not None, "the links are not run"
            self._make_room(key.peer)
            link = self._links[key] = PassLink(self._network, key, addresses)
            self._nursery.start_soon(self._run_link, link)
        return link

    def _make_room(self, peer: str) -> None:
        own = [link for key, link in self._links.items() if key.peer == peer]
        idle = sorted((link for link in own if link.is_idle), key=lambda link: link.used_at)
        for link in idle[: max(0, len(own) + 1 - MAX_LINKS_PER_PEER)]:
            link.close()

    async def _run_link(self, link: PassLink) -> None:
        try:
            await link.run()
        finally:
            if self._links.get(link.key) is link:
                del self._links[link.key]
