"""Serving other peers' forward and backward passes: the inbound side of ``/petald/pass/1``.

A stream has a reader, which takes a request ahead, and a worker, which does them in order. Nothing
of a pass is kept when it has been answered. Invariant: no request is begun that this server said it
would not take: longer, of other blocks, or while it leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.errors import KernelError
from kernels.span_pass import PassGradients, PassWork
from p2p.errors import P2PError, RemoteProtocolError
from p2p.network import Network, Stream
from p2p.rpc import FIRST_MESSAGE_BYTES, MessageStream, receive_first
from p2p.wire.message import Message, expect
from p2p.wire.pass_messages import (
    CODE_MISSING_ADAPTER,
    CODE_NOT_FINITE,
    CODE_SEQUENCE_TOO_LONG,
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
    max_pass_message_bytes,
    max_pass_tokens,
)
from p2p.wire.replies import Refusal
from p2p.wire.session_messages import HopTime
from p2p.wire.tensor import WireTensor
from petald.adapter_store import AdapterStore, adapter_rows
from petald.config import ServeConfig
from petald.errors import PetaldError, leaves
from petald.hosted_passes import HostedPasses, PassTime
from petald.lively_stream import LivelyStream
from petald.log import get_logger, log_context
from petald.message_codecs import KNOWN_CODECS, MessageCodecs
from petald.tensors import all_finite, from_wire, mask_from_wire, off_loop, to_wire

log = get_logger(__name__)

HELLO_DEADLINE_S = 10.0
RETRY_AFTER_S = 5.0

IDLE_PASS_S = 300.0
"""Between the steps of a training run lies the client's own work; a stream that is not used for so
long makes room for others, and is opened again at the cost of a round trip."""

SEND_DEADLINE_S = 120.0
"""A client that does not read its answer for so long holds memory that others need."""

FAIR_SHARE = 4
"""One in so many streams is kept from a peer that has all the others, as for sessions."""


class _RefusedPass(PetaldError):
    """A request that is not done; what the client is told."""

    def __init__(self, code: str, text: str, retry_after_s: float = 0.0) -> None:
        super().__init__(text)
        self.said_code = code
        self.retry_after_s = retry_after_s


@dataclass(eq=False, slots=True)
class _PassStream:
    """One client's stream.

    Attributes:
        passes: run what it asks for; a stream stays with what it began on.
        adapters: that go with them.
        hosted: of these, the one that the client chose by its name.
    """

    request: OpenPass
    client: MessageStream
    passes: HostedPasses
    adapters: AdapterStore
    hosted: tuple[SpanAdapter, ...]
    inbox_in: trio.MemorySendChannel[Message] = field(init=False)
    inbox_out: trio.MemoryReceiveChannel[Message] = field(init=False)
    active_at: float = field(default_factory=trio.current_time)
    is_busy: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def __post_init__(self) -> None:
        # One request is computed, one waits to be, and one is being read: that keeps a device busy.
        self.inbox_in, self.inbox_out = trio.open_memory_channel[Message](0)


class PassServer:
    """Serves passes on one hosted span.

    Args:
        network: where peers come from; the protocol's handler is set on it by `start`.
        passes: runs them.
        adapters: that clients lend, and that this server hosts.
        fingerprint: of the span's model.
        config: limits.
        is_draining: whether this server is leaving.
        codecs: encode what is sent.
    """

    def __init__(
        self,
        network: Network,
        passes: HostedPasses,
        *,
        adapters: AdapterStore,
        fingerprint: bytes,
        config: ServeConfig,
        is_draining: Callable[[], bool] = lambda: False,
        codecs: MessageCodecs | None = None,
    ) -> None:
        self._network = network
        self._codecs = codecs or MessageCodecs(network)
        self._passes = passes
        self._adapters = adapters
        self._fingerprint = fingerprint
        self._config = config
        self._is_draining = is_draining
        self._streams: set[_PassStream] = set()
        self._running = 0
        self._hidden_size = passes.span.config.hidden_size
        self._max_tokens = min(
            config.max_pass_tokens, max_pass_tokens(self._hidden_size), passes.max_sequence_tokens
        )

    def start(self) -> None:
        """Takes streams from now on."""
        self._network.set_handler(PASS_PROTOCOL, self.serve_pass)

    @property
    def streams(self) -> int:
        """How many are open."""
        return len(self._streams)

    def switch(self, passes: HostedPasses, adapters: AdapterStore) -> None:
        """Takes new streams for another span from now on; those that are open are refused more."""
        self._passes, self._adapters = passes, adapters

    async def end_streams(self, *, deadline_s: float, is_all: bool = True) -> None:
        """Ends the streams that are open, whose clients go elsewhere.

        Args:
            deadline_s: for what is being computed to be answered.
            is_all: also those for the span that is served now.
        """
        streams = [one for one in self._streams if is_all or one.passes is not self._passes]
        with trio.move_on_after(deadline_s):
            while any(one.is_busy for one in streams):  # noqa: ASYNC110  # as in `drain`
                await trio.sleep(0.05)
        for one in streams:
            one.scope.cancel()
        while not self._streams.isdisjoint(streams):  # noqa: ASYNC110  # as they end
            await trio.sleep(0.01)

    async def drain(self, *, deadline_s: float) -> None:
        """Waits until what is being computed has been answered; the rest is refused meanwhile."""
        with trio.move_on_after(deadline_s):
            while self._running:  # noqa: ASYNC110  # several streams, and no hurry
                await trio.sleep(0.05)

    def cut_streams(self) -> None:
        """Ends those that are left, at once; what is being computed on them ends with its block."""
        for opened in self._streams:
            opened.scope.cancel()

    async def serve_pass(self, stream: Stream) -> None:
        """Serves one client's passes, until it ends the stream."""
        opened: _PassStream | None = None

        def note_life() -> None:
            if opened is not None:
                opened.active_at = trio.current_time()

        lively = LivelyStream(stream, note_life)
        async with MessageStream(lively, max_received_bytes=FIRST_MESSAGE_BYTES) as client:
            request = expect(await receive_first(client, HELLO_DEADLINE_S), OpenPass)
            try:
                opened = self._open(request, client)
            except _RefusedPass as refused:
                code, text = refused.said_code, str(refused)
                await client.send(
                    Refusal(code=code, text=text, retry_after_s=refused.retry_after_s)
                )
                log.info("pass refused", peer=client.remote_peer, code=code)
                return
            with log_context(peer=client.remote_peer):
                try:
                    with opened.scope:
                        await self._serve(opened)
                except* P2PError as group:
                    for error in leaves(group):
                        log.info("pass broken", reason=str(error))
                finally:
                    self._streams.discard(opened)

    def _open(self, request: OpenPass, client: MessageStream) -> _PassStream:
        span = self._passes.span
        if self._is_draining():
            raise _RefusedPass("draining", "this server is leaving the swarm")
        if request.model != self._fingerprint:
            raise _RefusedPass("model_mismatch", "this server hosts other weights")
        if not span.start <= request.start < request.end <= span.end:
            raise _RefusedPass(
                "missing_blocks",
                f"blocks {request.start}:{request.end} were asked for; "
                f"this server hosts {span.start}:{span.end}",
            )
        if not {request.codec, request.gradient_codec} <= set(KNOWN_CODECS):
            raise _RefusedPass(
                "unknown_codec", f"this server knows the codecs {', '.join(KNOWN_CODECS)}"
            )
        hosted: tuple[SpanAdapter, ...] = ()
        if request.hosted is not None:
            adapter = self._adapters.hosted.get(request.hosted)
            if adapter is None:
                raise _RefusedPass(CODE_MISSING_ADAPTER, "this server does not host that adapter")
            hosted = (adapter,)
        most = self._config.max_passes
        own = sum(one.client.remote_peer == client.remote_peer for one in self._streams)
        if len(self._streams) >= most or own >= max(1, most - most // FAIR_SHARE):
            text = f"{len(self._streams)} of {most} streams are open here, {own} of them yours"
            raise _RefusedPass("overloaded", text, RETRY_AFTER_S)
        opened = _PassStream(request, client, self._passes, self._adapters, hosted)
        self._streams.add(opened)
        client.limit_received(
            max_pass_message_bytes(
                self._max_tokens, self._hidden_size, self._adapters.max_adapter_bytes
            )
        )
        return opened

    async def _serve(self, opened: _PassStream) -> None:
        await opened.client.send(
            PassOpened(
                max_tokens=self._max_tokens, max_adapter_bytes=opened.adapters.max_adapter_bytes
            )
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, opened)
            nursery.start_soon(self._end_when_idle, opened, nursery.cancel_scope)
            async for request in opened.inbox_out:
                self._running += 1
                opened.is_busy = True
                try:
                    answer = await self._answer(opened, request)
                    with trio.move_on_after(SEND_DEADLINE_S) as sending:
                        await opened.client.send(answer)
                    if sending.cancelled_caught:
                        break
                finally:
                    self._running -= 1
                    opened.is_busy = False
                    opened.active_at = trio.current_time()
            nursery.cancel_scope.cancel()

    async def _read(self, opened: _PassStream) -> None:
        async with opened.inbox_in:
            while (request := await opened.client.receive()) is not None:
                opened.active_at = trio.current_time()
                await opened.inbox_in.send(request)

    async def _end_when_idle(self, opened: _PassStream, scope: trio.CancelScope) -> None:
        while opened.is_busy or trio.current_time() < opened.active_at + IDLE_PASS_S:  # noqa: ASYNC110
            await trio.sleep(IDLE_PASS_S / 10)
        scope.cancel()

    async def _answer(self, opened: _PassStream, request: Message) -> Message:
        if not isinstance(request, LendAdapter | RunForward | RunBackward):
            raise RemoteProtocolError(f"a message {request.MESSAGE_NAME!r} came for a pass")
        try:
            if self._is_draining():
                raise _RefusedPass("draining", "this server is leaving the swarm")
            if opened.passes is not self._passes:
                raise _RefusedPass("missing_blocks", "this server hosts other blocks now")
            if isinstance(request, LendAdapter):
                asked = opened.request
                await opened.adapters.take(
                    request.adapter, request.form, request.values, asked.start, asked.end
                )
                return AdapterLent(number=request.number)
            if isinstance(request, RunForward):
                return await self._forward(opened, request)
            return await self._backward(opened, request)
        except _RefusedPass as refused:
            return PassFailed(number=request.number, code=refused.said_code, text=str(refused))
        except (KernelError, RemoteProtocolError) as error:
            log.info("pass failed", code=error.code, reason=str(error))
            return PassFailed(number=request.number, code=error.code, text=str(error)[:4096])

    async def _forward(self, opened: _PassStream, request: RunForward) -> Message:
        output_BSD, spent = await opened.passes.run_forward(
            partial(self._read_work, opened, request), peer=opened.client.remote_peer
        )
        codec = self._choose_codec(opened, output_BSD, opened.request.codec)
        hidden = await off_loop(_encode_rows, output_BSD, codec, size_bytes=output_BSD.nbytes)
        return ForwardResult(number=request.number, hidden=hidden, time=_hop_time(spent))

    async def _backward(self, opened: _PassStream, request: RunBackward) -> Message:
        if request.gradient.shape != request.hidden.shape:
            raise RemoteProtocolError(
                f"a gradient of the shape {list(request.gradient.shape)} came for hidden states of "
                f"{list(request.hidden.shape)}"
            )

        async def read_work() -> tuple[PassWork, torch.Tensor]:
            work = await self._read_work(opened, request)
            size_bytes = len(request.gradient.data)
            gradient_SD = await off_loop(self._decode_rows, request.gradient, size_bytes=size_bytes)
            return work, gradient_SD.view(work.hidden_BSD.shape)

        gradients, spent = await opened.passes.run_backward(
            read_work, peer=opened.client.remote_peer
        )
        codec = self._choose_codec(
            opened, gradients.hidden_BSD, opened.request.gradient_codec, is_gradient=True
        )
        gradient, of_adapter = await off_loop(
            _encode_gradients, gradients, codec, size_bytes=gradients.hidden_BSD.nbytes
        )
        return BackwardResult(
            number=request.number,
            gradient=gradient,
            adapter_gradient=of_adapter,
            time=_hop_time(spent),
        )

    def _choose_codec(
        self, opened: _PassStream, rows_BSD: torch.Tensor, asked: str, *, is_gradient: bool = False
    ) -> str:
        to = [opened.client.remote_peer]
        return self._codecs.choose(rows_BSD.flatten(0, 1), asked, to=to, is_gradient=is_gradient)

    async def _read_work(self, opened: _PassStream, request: RunForward | RunBackward) -> PassWork:
        sequences, tokens = request.sequences, request.tokens
        if not sequences or not tokens or request.hidden.shape[:1] != (sequences * tokens,):
            raise RemoteProtocolError(
                f"hidden states of the shape {list(request.hidden.shape)} came for {sequences} "
                f"sequences of {tokens} tokens"
            )
        if sequences * tokens > self._max_tokens:
            raise _RefusedPass(
                CODE_SEQUENCE_TOO_LONG,
                f"{sequences} x {tokens} tokens came; this server takes {self._max_tokens} at once",
            )
        asked = opened.request
        trained = None
        if request.adapter is not None:
            trained = opened.adapters.find_lent(request.adapter, asked.start, asked.end)
            if trained is None:
                raise _RefusedPass(CODE_UNKNOWN_ADAPTER, "this server does not have the adapter")
        mask_BS = None
        if request.mask is not None:
            mask_BS = mask_from_wire(request.mask, sequences, tokens).to(opened.passes.span.device)
        hidden_SD = await off_loop(
            self._decode_rows, request.hidden, size_bytes=len(request.hidden.data)
        )
        return PassWork(
            hidden_BSD=hidden_SD.view(sequences, tokens, -1),
            start=asked.start,
            end=asked.end,
            mask_BS=mask_BS,
            adapters=opened.hosted,
            trained=trained,
        )

    def _decode_rows(self, rows: WireTensor) -> torch.Tensor:
        span = self._passes.span
        return from_wire(
            rows,
            hidden_size=span.config.hidden_size,
            max_tokens=self._max_tokens,
            dtype=span.dtype,
            device=span.device,
        )


def _encode_rows(output_BSD: torch.Tensor, codec: str) -> WireTensor:
    if not all_finite(output_BSD):
        raise _RefusedPass(CODE_NOT_FINITE, f"the result is not finite in {output_BSD.dtype}")
    return to_wire(output_BSD.flatten(0, 1), codec)


def _encode_gradients(gradients: PassGradients, codec: str) -> tuple[WireTensor, WireTensor | None]:
    hidden = _encode_rows(gradients.hidden_BSD, codec)
    if gradients.adapter_LE is None:
        return hidden, None
    if not all_finite(gradients.adapter_LE):
        raise _RefusedPass(CODE_NOT_FINITE, "the adapter's gradient is not finite")
    return hidden, adapter_rows(gradients.adapter_LE)


def _hop_time(spent: PassTime) -> HopTime:
    return HopTime(queue_us=int(spent.queue_s * 1e6), compute_us=int(spent.compute_s * 1e6))
