"""One session at a server, driven message by message: races, floods, circles and silence.

The spans are fakes, whose rows tell all that was computed before them, and time is trio's virtual
one where it matters.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from trio.testing import wait_all_tasks_blocked

import p2p.memory_network
import p2p.pipe
from kernels.checkpoint import Checkpoint
from kernels.errors import KernelError, NotFinite
from kernels.kv_cache import CacheArena
from kernels.span import load_span
from p2p.errors import P2PError, StreamBroken
from p2p.memory_network import MemoryHub, MemoryNetwork, open_memory_hub
from p2p.rpc import MessageStream
from p2p.wire.message import Message, encode_message
from p2p.wire.replies import Ok, Refusal
from p2p.wire.session_messages import (
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    AttachCache,
    AttachPush,
    CacheRows,
    HandOver,
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
from petald.cache_transfer import TRANSFER_DEADLINE_S
from petald.config import ServeConfig
from petald.executor import Timed, open_executor
from petald.hosted_span import MAX_DECODE_TOKENS, HostedSpan
from petald.hosting import Hosting
from petald.served_session import CODE_HAND_OVER_FAILED, INBOX_STEPS, SEND_DEADLINE_S
from petald.server import Server
from petald.serving import Serving
from petald.tensors import from_wire, to_wire
from petald.throughput import BlockSpeed
from tests.helpers.fake_span import (
    HIDDEN,
    FakeArena,
    FakeCache,
    FakeHostedSpan,
    to_rows,
    to_values,
)
from tests.helpers.tiny_models import make_model, save_model

MODEL = bytes(range(32))
BLOCKS = 4
BLOCK_S = 0.001
CACHE_TOKENS = 512
SESSION_TOKENS = 64
CPU = torch.device("cpu")


class WatchedSpan(FakeHostedSpan):
    """Remembers which steps were run; its steps wait for a gate, and its cache is slow to open."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__(start, end, num_blocks=BLOCKS, block_s=BLOCK_S, capacity=CACHE_TOKENS)
        self.ran: list[int] = []
        self.gate = trio.Event()
        self.gate.set()
        self.opening_s = 0.0
        self.truncating_s = 0.0

    async def open_cache(self, max_tokens: int, adapters: Sequence[Any] = ()) -> FakeCache:
        with trio.CancelScope(shield=True):
            await trio.sleep(self.opening_s)
            return await super().open_cache(max_tokens, adapters)

    async def truncate_cache(self, cache: FakeCache, length: int) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(self.truncating_s)
            await super().truncate_cache(cache, length)

    async def run_step(
        self, cache: FakeCache, hidden_SD: torch.Tensor, *, position: int, **options: Any
    ) -> Timed:
        self.ran.append(position)
        await self.gate.wait()
        return await super().run_step(cache, hidden_SD, position=position, **options)


class Host:
    """A server in memory."""

    def __init__(
        self, hub: MemoryHub, name: str, start: int = 0, end: int = BLOCKS, max_sessions: int = 8
    ) -> None:
        self.network = hub.make_network(name)
        self.peer = self.network.peer
        self.hosted = WatchedSpan(start, end)
        config = ServeConfig(
            model="fake", cache_tokens=CACHE_TOKENS, max_sessions=max_sessions, max_step_tokens=64
        )
        hosted: Any = self.hosted
        self.server = Server(self.network, hosted, fingerprint=MODEL, config=config)
        self.server.start()

    @property
    def free_tokens(self) -> int:
        return self.hosted.arena.free_tokens

    def cached_tokens(self, session: bytes) -> tuple[int, int]:
        """In the cache, and as the session counts them."""
        served = self.server._sessions[session]
        return served.cache.length, served.state.length


class World:
    """A server, its client, and another hop."""

    def __init__(self, hub: MemoryHub, host: Host) -> None:
        self.hub = hub
        self.host = host
        self.client = hub.make_network("client")
        self.other = hub.make_network("other hop")

    async def open(self, host: Host | None = None, **changes: Any) -> Opened:
        """A session, which must not be refused."""
        opened = await ask_to_open(self.client, host or self.host, **changes)
        assert isinstance(await opened.stream.receive(), SessionOpened)
        return opened

    async def attach(self, message: AttachPush | AttachCache, hop: MemoryNetwork) -> MessageStream:
        """A stream on which a hop pushes steps, or hands a cache over."""
        messages = MessageStream(await hop.open_stream(self.host.peer, PUSH_PROTOCOL))
        await messages.send(message)
        return messages

    async def push_from(self, hop: MemoryNetwork, session: bytes) -> MessageStream:
        messages = await self.attach(AttachPush(session=session), hop)
        assert isinstance(await messages.receive(), Ok)
        return messages

    async def hand_over_from(
        self, hop: MemoryNetwork, session: bytes, tokens: int
    ) -> MessageStream:
        messages = await self.attach(AttachCache(session=session, tokens=tokens), hop)
        assert isinstance(await messages.receive(), Ok)
        return messages


@asynccontextmanager
async def open_world(*, start: int = 0, end: int = BLOCKS, **link: float) -> AsyncIterator[World]:
    async with open_memory_hub(**link) as hub:
        yield World(hub, Host(hub, "server", start, end))


class Opened:
    """The client's end of a session."""

    def __init__(self, session: bytes, stream: MessageStream) -> None:
        self.session = session
        self.stream = stream
        self.send = stream.send

    async def wait_result(self, number: int) -> list[int]:
        """The rows of one step's result; what else comes before it is passed over."""
        while True:
            message = await self.stream.receive()
            assert message is not None
            if isinstance(message, StepResult) and message.number == number:
                assert message.hidden is not None
                return decode(message.hidden)

    async def receive_for(self, seconds: float) -> list[Message]:
        """All that comes within a time."""
        messages: list[Message] = []
        with trio.move_on_after(seconds):
            while (message := await self.stream.receive()) is not None:
                messages.append(message)
        return messages


async def ask_to_open(
    network: MemoryNetwork, host: Host, *, session: bytes = b"", **changes: Any
) -> Opened:
    stream = MessageStream(await network.open_stream(host.peer, SESSION_PROTOCOL))
    request = OpenSession(
        session=session or os.urandom(16),
        model=MODEL,
        start=host.hosted.span.start,
        end=host.hosted.span.end,
        max_tokens=SESSION_TOKENS,
        **changes,
    )
    await stream.send(request)
    return Opened(request.session, stream)


def make_step(number: int, position: int, values: Sequence[int]) -> Step:
    hidden = to_wire(to_rows(list(values)))
    return Step(number=number, position=position, hidden=hidden, wanted=Wanted.ALL)


def decode(hidden: WireTensor) -> list[int]:
    rows_SD = from_wire(hidden, hidden_size=HIDDEN, max_tokens=64, dtype=torch.float32, device=CPU)
    return to_values(rows_SD)


def cache_piece(block: int, tokens: int) -> CacheRows:
    shape = (1, tokens, HIDDEN)
    rows = WireTensor("float32", shape, bytes(4 * tokens * HIDDEN))
    return CacheRows(block=block, position=0, keys=rows, values=rows)


async def expected_rows(values: Sequence[int], start: int = 0, end: int = BLOCKS) -> list[int]:
    """What an undisturbed span makes of some rows."""
    span = FakeHostedSpan(start, end, num_blocks=BLOCKS, block_s=0.0)
    cache = await span.open_cache(len(values))
    timed = await span.run_step(cache, to_rows(list(values)), position=0, start=start, end=end)
    return to_values(timed.value)


async def wait_end_of(stream: MessageStream) -> Message | None:
    """What the other end says last, or nothing."""
    with contextlib.suppress(StreamBroken):
        return await stream.receive()
    return None


@pytest.fixture
def narrow_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of little room, so that what is not read is soon felt."""
    monkeypatch.setattr(p2p.pipe, "WINDOW_BYTES", 1024)
    monkeypatch.setattr(p2p.memory_network, "PIECES_UNDER_WAY", 2)


async def test_a_step_whose_output_cannot_be_written_was_not_done(autojump_clock):
    async with open_world() as world:
        codecs = world.host.server.codecs
        encode = codecs.encode
        opened = await world.open()
        await opened.send(make_step(1, 0, [1, 2]))
        first = await opened.wait_result(1)

        async def fail(*_: Any, **__: Any) -> WireTensor:
            raise NotFinite("a number is too large for the codec")

        codecs.encode = fail  # type: ignore[method-assign]
        await opened.send(make_step(2, 2, [3]))
        failed = await opened.stream.receive()
        assert isinstance(failed, StepFailed)
        assert (failed.number, failed.code) == (2, NotFinite.code)
        codecs.encode = encode  # type: ignore[method-assign]
        await opened.send(make_step(2, 2, [3]))
        with trio.fail_after(5):
            assert first + await opened.wait_result(2) == await expected_rows([1, 2, 3])
        assert world.host.cached_tokens(opened.session) == (3, 3)


# A cache that is handed over.


@pytest.mark.parametrize("failed_before", [0, 1])
async def test_a_step_ends_the_reception_of_a_cache(
    autojump_clock: Any, failed_before: int
) -> None:
    async with open_world() as world:
        values = list(range(100, 117))
        opened = await world.open(cache_from=world.other.peer)
        for _ in range(failed_before):
            failed = await world.hand_over_from(world.other, opened.session, 16)
            await failed.abort()
            await trio.sleep(1)
        leaver = await world.hand_over_from(world.other, opened.session, 16)
        await leaver.send(cache_piece(0, 16))
        await trio.sleep(1)
        world.host.hosted.truncating_s = 0.1  # as on a device that is busy
        await opened.send(make_step(1, 0, values[:16]))
        rows = await opened.wait_result(1)
        with trio.fail_after(5):
            assert await wait_end_of(leaver) is None  # it was not taken
        await trio.sleep(1)
        assert world.host.cached_tokens(opened.session) == (16, 16)
        await opened.send(make_step(2, 16, values[16:]))
        rows += await opened.wait_result(2)
        assert rows == await expected_rows(values)
        assert world.host.server.caches_received == 0


async def test_a_second_reception_beside_the_first_is_refused(autojump_clock: Any) -> None:
    async with open_world() as world:
        opened = await world.open(cache_from=world.other.peer)
        first = await world.hand_over_from(world.other, opened.session, 3)
        second = await world.attach(AttachCache(session=opened.session, tokens=5), world.other)
        assert isinstance(await second.receive(), Refusal)
        for block in range(BLOCKS):
            await first.send(cache_piece(block, 3))
        assert isinstance(await first.receive(), Ok)
        assert world.host.cached_tokens(opened.session) == (3, 3)
        assert world.host.server.caches_received == 1


async def test_a_cache_that_comes_after_the_first_step_is_refused(autojump_clock: Any) -> None:
    async with open_world() as world:
        opened = await world.open(cache_from=world.other.peer)
        world.host.hosted.gate = trio.Event()
        await opened.send(make_step(1, 0, [5]))
        await wait_all_tasks_blocked()  # the step is being computed, and nothing is cached yet
        late = await world.attach(AttachCache(session=opened.session, tokens=5), world.other)
        assert isinstance(await late.receive(), Refusal)
        world.host.hosted.gate.set()
        assert await opened.wait_result(1) == await expected_rows([5])
        assert world.host.cached_tokens(opened.session) == (1, 1)


async def test_the_reception_of_a_cache_ends_with_its_session(autojump_clock: Any) -> None:
    async with open_world() as world:
        opened = await world.open(cache_from=world.other.peer)
        leaver = await world.hand_over_from(world.other, opened.session, 8)
        await opened.stream.abort()
        with trio.fail_after(5):
            assert await wait_end_of(leaver) is None
        assert world.host.server.sessions == 0
        assert world.host.free_tokens == CACHE_TOKENS


async def test_no_reception_begins_while_a_session_ends(autojump_clock: Any) -> None:
    async with open_world() as world:
        opened = await world.open(cache_from=world.other.peer)
        served = world.host.server._sessions[opened.session]
        await opened.stream.abort()
        await trio.sleep(1)
        near, far = p2p.pipe.make_pipe(world.other.peer, world.host.peer)
        attach = AttachCache(session=opened.session, tokens=3)
        with trio.fail_after(5):  # as where it was found a moment before
            assert not await served.receive_cache(attach, MessageStream(far))
        assert isinstance(await MessageStream(near).receive(), Refusal)


async def test_the_reception_of_a_cache_ends_in_time(autojump_clock: Any) -> None:
    async with open_world() as world:
        opened = await world.open(cache_from=world.other.peer)
        leaver = await world.hand_over_from(world.other, opened.session, 8)
        await leaver.send(cache_piece(0, 8))
        with trio.fail_after(TRANSFER_DEADLINE_S + 5):
            assert await wait_end_of(leaver) is None
        assert world.host.cached_tokens(opened.session) == (0, 0)
        await opened.send(make_step(1, 0, [5, 6]))
        assert await opened.wait_result(1) == await expected_rows([5, 6])


# Opening and leaving.


async def test_two_sessions_of_one_name_do_not_open_at_once(autojump_clock: Any) -> None:
    async with open_memory_hub() as hub:
        host = Host(hub, "server", max_sessions=2)
        host.hosted.opening_s = 0.5
        client = hub.make_network("client")
        name = os.urandom(16)
        twins = [await ask_to_open(client, host, session=name) for _ in range(2)]
        replies = [await twin.stream.receive() for twin in twins]
        assert [type(reply) for reply in replies] == [SessionOpened, Refusal]
        assert (host.server.sessions, host.free_tokens) == (1, CACHE_TOKENS - SESSION_TOKENS)
        second = await ask_to_open(client, host)
        assert isinstance(await second.stream.receive(), SessionOpened)
        third = await ask_to_open(client, host)
        assert isinstance(await third.stream.receive(), Refusal)
        assert (host.server.sessions, host.free_tokens) == (2, CACHE_TOKENS - 2 * SESSION_TOKENS)
        await twins[0].stream.abort()
        await trio.sleep(1)
        assert (host.server.sessions, host.free_tokens) == (1, CACHE_TOKENS - SESSION_TOKENS)
        again = await ask_to_open(client, host, session=name)
        assert isinstance(await again.stream.receive(), SessionOpened)


async def test_a_drain_waits_for_a_hand_over_under_way(autojump_clock: Any) -> None:
    async with open_world(latency_s=0.02) as world:
        replacement = Host(world.hub, "replacement")
        world.hub.link(world.host.peer, replacement.peer).bytes_per_s = 1000
        values = list(range(60))
        old = await world.open()
        await old.send(make_step(1, 0, values))
        await old.wait_result(1)
        new = await world.open(replacement, cache_from=world.host.peer)
        await trio.sleep(5)  # the person reads
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain_wholly, world.host, replacement)
            assert isinstance(await old.stream.receive(), Leaving)
            await old.send(
                HandOver(request=9, peer=replacement.peer, session=new.session, tokens=60)
            )
            assert await old.stream.receive() == LinkDone(request=9)
        await new.send(make_step(1, 60, [7]))
        assert await new.wait_result(1) == (await expected_rows([*values, 7]))[-1:]


async def drain_wholly(host: Host, replacement: Host) -> None:
    began_at = trio.current_time()
    await host.server.drain(deadline_s=600)
    assert replacement.server.caches_received == 1
    assert trio.current_time() - began_at < 60  # the session, which is open, is not waited for


async def test_a_session_that_opens_while_a_drain_begins_is_refused(autojump_clock: Any) -> None:
    async with open_world() as world:
        world.host.hosted.opening_s = 0.5
        opened = await ask_to_open(world.client, world.host)
        await trio.sleep(0.1)
        await world.host.server.drain(deadline_s=20)
        reply = await opened.stream.receive()
        assert isinstance(reply, Refusal)
        assert reply.code == "draining"
        assert (world.host.server.sessions, world.host.free_tokens) == (0, CACHE_TOKENS)


# Floods and silence.


async def test_many_hand_overs_at_once_make_no_pile_of_tasks(
    mock_clock: Any, narrow_streams: None
) -> None:
    count = 500
    async with open_world() as world:
        opened = await world.open()
        world.hub.cut(world.host.peer, world.other.peer)  # the first one hangs

        async def flood() -> None:
            for request in range(count):
                await opened.send(
                    HandOver(request=request, peer=world.other.peer, session=bytes(16), tokens=0)
                )

        before = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await wait_all_tasks_blocked()
            assert trio.lowlevel.current_statistics().tasks_living <= before + 2
            for request in range(1, count):
                reply = await opened.stream.receive()
                assert isinstance(reply, LinkFailed)
                assert (reply.request, reply.code) == (request, CODE_HAND_OVER_FAILED)
        await wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living <= before + 1
        await opened.send(Probe(request=7))
        assert isinstance(await opened.stream.receive(), ProbeReply)


async def test_a_client_that_reads_nothing_loses_its_session(
    autojump_clock: Any, narrow_streams: None
) -> None:
    async with open_world() as world:
        opened = await world.open()

        async def flood() -> None:
            with contextlib.suppress(P2PError):
                for number in range(1, 1 << 30):
                    await opened.send(make_step(number, 0, [number]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await trio.sleep(SEND_DEADLINE_S / 2)
            assert world.host.server.sessions == 1
            await trio.sleep(SEND_DEADLINE_S)
            assert world.host.server.sessions == 0
            assert world.host.free_tokens == CACHE_TOKENS


async def test_what_a_client_began_again_is_not_computed(autojump_clock: Any) -> None:
    async with open_world() as world:
        opened = await world.open()
        world.host.hosted.gate = trio.Event()
        await opened.send(make_step(1, 0, [1, 2, 3, 4]))
        for position in range(4, 9):
            await opened.send(make_step(position - 2, position, [position]))
        await opened.send(make_step(7, 0, [11, 12, 13]))
        await opened.send(Probe(request=3))
        assert await opened.stream.receive() == ProbeReply(request=3, received=7)
        world.host.hosted.gate.set()
        results = await opened.receive_for(60)
        assert [each.number for each in results if isinstance(each, StepResult)] == [1, 7]
        assert len(results) == 2
        last = results[-1]
        assert isinstance(last, StepResult)
        assert last.hidden is not None
        assert decode(last.hidden) == await expected_rows([11, 12, 13])
        assert world.host.hosted.ran == [0, 0]
        assert world.host.cached_tokens(opened.session) == (3, 3)


# Links.


async def test_a_session_that_is_linked_to_itself_runs_a_step_once(autojump_clock: Any) -> None:
    async with open_world(end=2, latency_s=0.01) as world:
        opened = await world.open(previous=world.host.peer)
        await opened.send(LinkNext(request=1, peer=world.host.peer, session=opened.session))
        assert await opened.stream.receive() == LinkDone(request=1)
        await opened.send(make_step(1, 0, [5]))
        outputs = await opened.receive_for(60)
        assert 1 <= len(outputs) <= 2  # it may be sent again once
        for output in outputs:
            assert isinstance(output, StepOutput)
            assert decode(output.hidden) == await expected_rows([5], end=2)
        assert world.host.hosted.ran == [0]
        await opened.send(make_step(2, 1, [6]))
        assert await opened.receive_for(60)
        assert world.host.hosted.ran == [0, 1]


@pytest.mark.parametrize(
    ("steps", "is_blocked"),
    [(1, False), (1, True), (2, True), (3 * INBOX_STEPS, True)],
    ids=["done", "running", "waiting", "flood"],
)
async def test_what_a_hop_before_counted_dies_with_its_link(
    autojump_clock: Any, steps: int, is_blocked: bool
) -> None:
    async with open_world(start=2) as world:
        honest = world.hub.make_network("honest hop")
        opened = await world.open(previous=world.other.peer)
        if is_blocked:
            world.host.hosted.gate = trio.Event()
        pushes = await world.push_from(world.other, opened.session)
        numbers = range(2**53 - steps + 1, 2**53 + 1)
        frames = [encode_message(make_step(number, 0, [number % 1000])) for number in numbers]
        await pushes._stream.send_all(b"".join(frames))  # at once: they are read at once, too
        await trio.sleep(1)
        await opened.send(LinkPrevious(request=1, peer=honest.peer))
        await opened.send(Probe(request=2))
        heard = await opened.receive_for(1)
        assert heard[-2:] == [LinkDone(request=1), ProbeReply(request=2, received=0)]
        honest_pushes = await world.push_from(honest, opened.session)
        await honest_pushes.send(make_step(7, 0, [5, 6]))
        await trio.sleep(1)
        world.host.hosted.gate.set()
        with trio.fail_after(60):
            assert await opened.wait_result(7) == await expected_rows([5, 6], 2)
        assert len(world.host.hosted.ran) == 2  # the one that ran already, and the honest one
        await opened.send(Probe(request=3))
        assert await opened.stream.receive() == ProbeReply(request=3, received=7)


async def test_links_that_were_overtaken_do_not_stay_open(autojump_clock: Any) -> None:
    async with open_world(end=2) as world:
        attached: list[bytes] = []
        ended: list[bytes] = []

        async def take_pushes(stream: Any) -> None:
            messages = MessageStream(stream)
            attach = await messages.receive()
            assert isinstance(attach, AttachPush)
            attached.append(attach.session)
            await messages.send(Ok())
            try:
                await messages.receive()
            finally:
                ended.append(attach.session)

        world.other.set_handler(PUSH_PROTOCOL, take_pushes)
        opened = await world.open()
        world.host.hosted.gate = trio.Event()
        await opened.send(make_step(1, 0, [5]))
        names = [bytes([i] * 16) for i in range(3)]
        for request, name in enumerate(names):
            await opened.send(LinkNext(request=request, peer=world.other.peer, session=name))
        await wait_all_tasks_blocked()
        world.host.hosted.gate.set()
        heard = await opened.receive_for(60)
        assert heard[-1] == LinkDone(request=2)
        assert attached == names
        assert ended == names[:2]
        await opened.stream.abort()
        await trio.sleep(1)
        assert ended == names


async def test_a_link_that_is_cut_as_its_greeting_goes_out_gives_way(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(end=2) as world:
        opened = await world.open()
        following = Host(world.hub, "following", 2)
        next_hop = await world.open(following, previous=world.host.peer)
        open_stream = world.host.network.open_stream

        async def open_slow(peer: str, protocol: str, **options: Any) -> Any:
            stream: Any = await open_stream(peer, protocol, **options)
            send_all = stream.send_all

            async def send_slowly(data: bytes) -> None:
                await send_all(data)
                with trio.CancelScope(shield=True):  # it was done when the cancellation came
                    await trio.sleep(0.5)

            stream.send_all = send_slowly
            return stream

        monkeypatch.setattr(world.host.network, "open_stream", open_slow)
        for request in (1, 2):
            await opened.send(
                LinkNext(request=request, peer=following.peer, session=next_hop.session)
            )
            await trio.sleep(0.1)
        failed, done = await opened.receive_for(10)
        assert isinstance(failed, LinkFailed)
        assert (failed.request, done) == (1, LinkDone(request=2))
        await opened.send(make_step(1, 0, [5]))
        assert await next_hop.wait_result(1) == await expected_rows([5])


# The span, and what is announced of it.


async def test_a_step_beyond_what_is_cached_is_refused_by_the_span(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(make_model("llama"), tmp_path))
    span = load_span(checkpoint, 0, 2, dtype=torch.float32, device=CPU)
    arena = CacheArena(span.config, blocks=2, capacity_tokens=64, dtype=torch.float32, device=CPU)
    hidden_SD = torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    expected_SD = span.forward(hidden_SD[None])[0]
    async with open_executor(name="tiny") as executor:
        hosted = HostedSpan(span, arena, executor)
        cache = await hosted.open_cache(16)

        async def run(start: int, end: int) -> torch.Tensor:
            timed = await hosted.run_step(
                cache, hidden_SD[start:end], position=start, start=0, end=2
            )
            assert isinstance(timed.value, torch.Tensor)
            return timed.value

        await run(0, 5)
        for position in (6, 8):
            with pytest.raises(KernelError, match="5 tokens are cached"):
                await run(position, 9)
            assert cache.length == 5
        torch.testing.assert_close(await run(5, 9), expected_SD[5:], rtol=1e-4, atol=1e-3)
        await hosted.close_cache(cache)


async def test_a_gpu_that_cannot_record_steps_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def record(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    checkpoint = Checkpoint(save_model(make_model("llama"), tmp_path))
    span = load_span(checkpoint, 0, 2, dtype=torch.float32, device=CPU)
    arena = CacheArena(span.config, blocks=2, capacity_tokens=64, dtype=torch.float32, device=CPU)
    span.record_steps(record)
    async with open_executor(name="tiny") as executor:
        hosted = HostedSpan(span, arena, executor)
        cache = await hosted.open_cache(16)
        for position in range(3):
            row_SD = torch.zeros(1, 48)
            await hosted.run_step(cache, row_SD, position=position, start=0, end=2)
        await hosted.close_cache(cache)
    assert caplog.text.count("decode steps are not recorded") == 1


class TimedExecutor:
    """Steps take as long as it is told."""

    mean_queue_s = 0.0

    def __init__(self) -> None:
        self.compute_s = 0.0
        self.items = 1

    async def run_batched(self, *_: Any, **__: Any) -> Timed:
        await trio.lowlevel.checkpoint()
        return Timed(None, 0.0, self.compute_s, self.items)


def serve_timed(network: MemoryNetwork, executor: TimedExecutor, *, share: float = 1.0) -> Serving:
    """Four blocks, whose step was measured as 77 ms."""
    model = SimpleNamespace(hidden_size=4)
    stub: Any = SimpleNamespace(
        start=4, end=8, dtype=torch.float32, config=model, graphs_failure=""
    )
    hosted = HostedSpan(stub, FakeArena(CACHE_TOKENS), executor)  # type: ignore[arg-type]
    config = ServeConfig(model="fake")
    return Serving(
        identity=SimpleNamespace(fingerprint=MODEL),  # type: ignore[arg-type]
        config=config,
        loader=None,  # type: ignore[arg-type]
        hosting=Hosting(
            hosted=hosted,
            passes=None,  # type: ignore[arg-type]
            adapters=None,  # type: ignore[arg-type]
            speed=BlockSpeed(step_s=0.077 / 4, token_s=0.001),
            share=share,
        ),
        server=Server(network, hosted, fingerprint=MODEL, config=config),
        pass_server=None,  # type: ignore[arg-type]
        network=network,
    )


async def test_what_is_given_to_the_swarm_is_told_when_it_changed_for_good(
    autojump_clock: Any,
) -> None:
    executor = TimedExecutor()
    cache: Any = SimpleNamespace(adapters=())
    async with open_memory_hub() as hub:
        serving = serve_timed(hub.make_network("server"), executor, share=0.5)
        hosted = serving.hosting.hosted
        measured = pytest.approx(0.5 * 4 / 0.077, rel=0.01)

        async def pass_minute(*compute_s: float, tokens: int = 1, items: int = 1) -> float:
            executor.items = items
            for executor.compute_s in compute_s:
                await hosted.run_step(cache, torch.zeros(tokens, 4), position=0, start=4, end=8)
            await trio.sleep(60)
            serving.note_speed()
            return serving.make_announcement().block_steps_per_s

        assert await pass_minute() == measured
        for _ in range(20):
            assert await pass_minute(0.07, 0.077, 9.0) == measured  # one of them stalled
            assert await pass_minute(0.5, items=8) == measured  # of eight sessions at once
            assert await pass_minute(0.5, tokens=2) == measured
        assert await pass_minute(0.15) == measured
        told = [await pass_minute(0.2) for _ in range(60)]
        assert told[-1] == pytest.approx(0.5 * 4 / 0.2, rel=0.07)
        assert told[50:] == told[-1:] * 10
        for _ in range(60):  # nothing to do
            assert await pass_minute() == told[-1]
        assert await pass_minute(0.05) == told[-1]  # one minute is not an hour


async def test_the_announced_step_time_follows_the_decode_steps() -> None:
    executor = TimedExecutor()
    cache: Any = SimpleNamespace(adapters=())
    async with open_memory_hub() as hub:
        serving = serve_timed(hub.make_network("server"), executor)
        hosted = serving.hosting.hosted

        async def run(compute_s: float, *, tokens: int = 1, end: int = 8, times: int = 1) -> float:
            executor.compute_s = compute_s
            for _ in range(times):
                await hosted.run_step(
                    cache,
                    torch.zeros(tokens, 4),
                    position=0,
                    start=4,
                    end=end,
                )
            announced = serving.make_announcement().step_ms
            if hosted.step_s is not None:
                assert announced == pytest.approx(hosted.step_s * 1e3, abs=0.01)
            return announced

        assert hosted.step_s is None
        assert await run(9.0, tokens=MAX_DECODE_TOKENS + 1) == 77.0  # no decode step yet
        assert await run(0.010) == pytest.approx(10.0)
        assert await run(0.005, end=6, times=50) == pytest.approx(10.0)  # half of the blocks
        assert 10.0 < await run(0.030) < 11.0  # one alone says little
        assert await run(0.030, times=500) == pytest.approx(30.0, abs=0.1)
        assert await run(9.0, tokens=MAX_DECODE_TOKENS + 1) == pytest.approx(30.0, abs=0.1)
