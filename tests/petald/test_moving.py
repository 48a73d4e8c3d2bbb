"""A server that moves to other blocks, with what runs on it: real blocks, in memory."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import petald.hosting
from kernels.checkpoint import Checkpoint
from kernels.errors import CorruptCheckpoint, OutOfDeviceMemory
from kernels.span import Span, load_span
from p2p.errors import P2PError, StreamBroken
from p2p.rpc import MessageStream
from p2p.wire.pass_messages import PASS_PROTOCOL, OpenPass, PassOpened
from p2p.wire.replies import Refusal
from p2p.wire.session_messages import (
    SESSION_PROTOCOL,
    Leaving,
    OpenSession,
    SessionOpened,
    Wanted,
)
from petald.chain_client import ChainSession
from petald.config import ServeConfig
from petald.errors import PetaldError
from petald.executor import open_executor
from petald.hosting import Hosting, SpanLoader
from petald.local_model import ModelIdentity
from petald.pass_server import PassServer
from petald.routing import Hop
from petald.served_session import ServedSession
from petald.server import Server
from petald.serving import Serving
from petald.speed_cache import SpeedCache
from petald.swarm import Announcement, Claim, ServerState
from tests.helpers.chain_world import MODEL, Swarm, open_swarm
from tests.helpers.tiny_models import make_model, save_model

NOWHERE = Path("/nonexistent")
CONFIG = ServeConfig(model="tiny", cache_tokens=512, max_sessions=4, max_step_tokens=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


class Mover:
    """A server as the daemon has it, beside those of a swarm; what it announced is kept."""

    def __init__(self, serving: Serving, peer: str) -> None:
        self.serving = serving
        self.peer = peer
        self.announced: list[Announcement] = []

    async def announce(self) -> None:
        await trio.lowlevel.checkpoint()
        self.announced.append(self.serving.make_announcement())

    async def move(self, start: int, end: int, *, deadline_s: float = 20.0) -> None:
        prepared = await self.serving.prepare(start, end)
        await self.serving.move(
            start, end, prepared, on_changed=self.announce, deadline_s=deadline_s
        )

    def hop(self) -> Hop:
        span = self.serving.hosting.span
        return Hop(peer=self.peer, addresses=(), start=span.start, end=span.end)


@asynccontextmanager
async def open_mover(
    swarm: Swarm, start: int, end: int, folder: Path = NOWHERE
) -> AsyncIterator[Mover]:
    network = swarm.hub.make_network("mover")
    identity = ModelIdentity(
        name="tiny",
        folder=swarm.checkpoint.folder,
        fingerprint=MODEL,
        config=swarm.checkpoint.config,
    )
    async with open_executor(name="mover") as executor:
        loader = SpanLoader(CONFIG, identity, executor, speeds=SpeedCache(folder))
        hosting = await loader.load(start, end)
        server = Server(
            network,
            hosting.hosted,
            fingerprint=MODEL,
            config=CONFIG,
            adapters=hosting.adapters,
        )
        server.start()
        pass_server = PassServer(
            network,
            hosting.passes,
            adapters=hosting.adapters,
            fingerprint=MODEL,
            config=CONFIG,
            is_draining=lambda: not server.is_accepting,
        )
        pass_server.start()
        serving = Serving(
            identity=identity,
            config=CONFIG,
            loader=loader,
            hosting=hosting,
            server=server,
            pass_server=pass_server,
            network=network,
        )
        del hosting  # or it would outlive the move
        yield Mover(serving, network.peer)


async def run_steps(swarm: Swarm, session: ChainSession, first: int, last: int) -> torch.Tensor:
    """Decode steps with the swarm's rows; gives what came out."""
    outputs = []
    for at in range(first, last):
        hidden = await session.encode(swarm.hidden_SD[at : at + 1])
        result = await session.run_step(hidden, position=at, wanted=Wanted.LAST)
        outputs.append(swarm.decode(result.hidden))
    return torch.cat(outputs)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_session_goes_on_elsewhere_and_the_new_blocks_are_served(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    monkeypatch.setattr(SpanLoader, "has_room", lambda *_, **__: has_room)
    async with open_swarm(checkpoint, (0, 2), (2, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        session = await swarm.open(chain=(mover.hop(), swarm.hops()[1]))
        outputs = [await run_steps(swarm, session, 0, 10)]
        gone = weakref.ref(mover.serving.hosting.span.block(0))
        arena = weakref.ref(mover.serving.hosting.hosted.arena)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mover.move, 2, 4)
            outputs.append(await run_steps(swarm, session, 10, 30))
        assert [hop.peer for hop in session.chain] == [hop.peer for hop in swarm.hops()]
        near(torch.cat(outputs), swarm.expected_SD[:30])
        states = [one.state for one in mover.announced]
        assert states == [ServerState.SERVING] if has_room else [ServerState.LOADING, "serving"]
        assert (mover.announced[-1].start, mover.announced[-1].end) == (2, 4)
        gc.collect()
        assert gone() is None
        assert arena() is None
        again = await swarm.open(chain=(swarm.hops()[0], mover.hop()))
        near(await run_steps(swarm, again, 0, 8), swarm.expected_SD[:8])
        assert mover.serving.hosting.hosted.decode_steps == 8


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_shift_reads_the_new_blocks_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    read: list[int] = []

    def count_blocks(*args: Any, on_block: Any, **options: Any) -> Any:
        def count(number: int) -> None:
            read.append(number)
            on_block(number)

        return load_span(*args, on_block=count, **options)

    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 3) as mover:
        monkeypatch.setattr(petald.hosting, "load_span", count_blocks)
        monkeypatch.setattr(SpanLoader, "has_room", lambda *_, **__: has_room)
        shared = mover.serving.hosting.span.block(2)
        await mover.move(1, 4)
        assert read == [3]
        assert mover.serving.hosting.span.block(2) is shared
        first = Hop(peer=swarm.hops()[0].peer, addresses=(), start=0, end=1)
        session = await swarm.open(chain=(first, mover.hop()))
        near(await run_steps(swarm, session, 0, 8), swarm.expected_SD[:8])


@pytest.mark.parametrize("has_room", [True, False])
async def test_where_blocks_cannot_be_loaded_the_old_ones_are_served_on(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    def fail(checkpoint: Checkpoint, start: int, end: int, **options: Any) -> Any:
        if start == 2:
            raise CorruptCheckpoint("a file is missing")
        return load_span(checkpoint, start, end, **options)

    async with open_swarm(checkpoint, (0, 2), (2, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        monkeypatch.setattr(petald.hosting, "load_span", fail)
        monkeypatch.setattr(SpanLoader, "has_room", lambda *_, **__: has_room)
        with pytest.raises(CorruptCheckpoint):
            await mover.move(2, 4)
        assert mover.serving.make_announcement().state == ServerState.SERVING
        session = await swarm.open(chain=(mover.hop(), swarm.hops()[1]))
        near(await run_steps(swarm, session, 0, 8), swarm.expected_SD[:8])


async def test_a_session_that_cannot_move_is_ended_in_the_end(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (2, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        session = await swarm.open(chain=(mover.hop(), swarm.hops()[0]), max_wait_s=5.0)
        await run_steps(swarm, session, 0, 5)
        gone = weakref.ref(mover.serving.hosting.span.block(0))

        async def keep_stepping() -> None:
            at = 5
            with contextlib.suppress(PetaldError):
                while True:
                    await run_steps(swarm, session, at, at + 1)
                    at += at < 39

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_stepping)
            with trio.fail_after(20):
                await mover.move(2, 4, deadline_s=0.3)
            nursery.cancel_scope.cancel()
        assert not mover.serving.server.sessions
        gc.collect()
        assert gone() is None


async def test_streams_of_passes_end_and_can_be_opened_for_the_new_blocks(
    checkpoint: Checkpoint,
) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:

        async def ask(start: int, end: int) -> MessageStream:
            stream = MessageStream(await swarm.client.open_stream(mover.peer, PASS_PROTOCOL))
            await stream.send(OpenPass(model=MODEL, start=start, end=end))
            return stream

        before = await ask(0, 2)
        assert isinstance(await before.receive(), PassOpened)
        gone = weakref.ref(mover.serving.hosting.span.block(0))
        await mover.move(2, 4)
        assert await before.receive() is None
        gc.collect()
        assert gone() is None
        after = await ask(2, 4)
        assert isinstance(await after.receive(), PassOpened)
        await after.abort()


async def test_who_opens_an_ended_session_again_at_once_does_not_hold_up_the_move(
    checkpoint: Checkpoint,
) -> None:
    request = OpenSession(session=bytes(16), model=MODEL, start=1, end=2, max_tokens=8)
    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        has_opened = trio.Event()

        async def keep_open() -> None:
            while True:
                stream = await swarm.client.open_stream(mover.peer, SESSION_PROTOCOL)
                async with MessageStream(stream) as messages:
                    with contextlib.suppress(P2PError):
                        await messages.send(request)
                        while isinstance(await messages.receive(), SessionOpened | Leaving):
                            has_opened.set()

        swarm.nursery.start_soon(keep_open)
        await has_opened.wait()
        with trio.fail_after(10):
            await mover.move(1, 3, deadline_s=0.2)
            while not mover.serving.server.sessions:  # noqa: ASYNC110  # it opens one again
                await trio.sleep(0.01)


async def test_a_session_whose_client_went_before_it_began_does_not_hold_up_the_move(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        server = mover.serving.server
        is_telling = trio.Event()

        async def hang(self: ServedSession, message: object) -> None:
            is_telling.set()
            await trio.sleep(0.5)
            raise StreamBroken("the client is gone")

        monkeypatch.setattr(ServedSession, "_tell", hang)
        request = OpenSession(session=bytes(16), model=MODEL, start=0, end=2, max_tokens=8)
        stream = MessageStream(await swarm.client.open_stream(mover.peer, SESSION_PROTOCOL))
        await stream.send(request)
        await is_telling.wait()
        with trio.fail_after(10):
            await mover.move(2, 4, deadline_s=20.0)
        assert not server.sessions


async def test_a_drain_that_begins_during_a_move_is_not_taken_back(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpanLoader, "has_room", lambda *_, **__: False)
    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        server = mover.serving.server
        load = SpanLoader.load

        async def load_while_the_daemon_stops(*args: Any, **options: Any) -> Hosting:
            server.stop_accepting()
            return await load(*args, **options)

        monkeypatch.setattr(SpanLoader, "load", load_while_the_daemon_stops)
        await mover.move(2, 4)
        assert server.is_draining
        assert mover.serving.state == ServerState.LEAVING


async def test_taking_back_a_drain_during_a_move_takes_no_sessions_on_what_is_given_up(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpanLoader, "has_room", lambda *_, **__: False)
    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        server = mover.serving.server
        load = SpanLoader.load
        answers: list[object] = []

        async def load_while_a_client_comes(*args: Any, **options: Any) -> Hosting:
            server.accept_again()
            request = OpenSession(session=bytes(16), model=MODEL, start=1, end=2, max_tokens=8)
            stream = await swarm.client.open_stream(mover.peer, SESSION_PROTOCOL)
            async with MessageStream(stream) as messages:
                await messages.send(request)
                answers.append(await messages.receive())
            return await load(*args, **options)

        monkeypatch.setattr(SpanLoader, "load", load_while_a_client_comes)
        await mover.move(1, 3)
        assert [type(answer) for answer in answers] == [Refusal]
        assert server.is_accepting


async def test_where_nothing_can_be_loaded_any_more_no_sessions_are_taken(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpanLoader, "has_room", lambda *_, **__: False)
    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:

        def fail(*_: Any, **__: Any) -> Any:
            raise CorruptCheckpoint("the disk is gone")

        monkeypatch.setattr(petald.hosting, "load_span", fail)
        with pytest.raises(CorruptCheckpoint):
            await mover.move(2, 4)
        assert not mover.serving.server.is_accepting
        assert mover.serving.state == ServerState.LEAVING


async def test_half_of_the_new_blocks_are_not_held_while_the_old_ones_are_loaded_again(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Span]] = []
    is_held: list[bool] = []

    def fail(checkpoint: Checkpoint, start: int, end: int, **options: Any) -> Any:
        if start != 2:
            gc.collect()
            is_held.extend(span() is not None for span in held)
            return load_span(checkpoint, start, end, **options)
        span = load_span(checkpoint, start, end, **options)
        held.append(weakref.ref(span))
        try:
            raise torch.OutOfMemoryError("no room")
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory("no room") from error

    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        monkeypatch.setattr(petald.hosting, "load_span", fail)
        monkeypatch.setattr(SpanLoader, "has_room", lambda *_, **__: False)
        with pytest.raises(OutOfDeviceMemory):
            await mover.move(2, 4)
        assert is_held == [False]
        assert mover.announced[-1].state == ServerState.SERVING


async def test_no_room_for_the_cache_is_told_as_no_room_for_blocks_is(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:

        def fail(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(petald.hosting, "CacheArena", fail)
        monkeypatch.setattr(SpanLoader, "has_room", lambda *_, **__: True)
        with pytest.raises(OutOfDeviceMemory, match="cache_tokens"):
            await mover.move(2, 4)


async def test_a_claim_is_announced(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        assert mover.serving.make_announcement().claim is None
        mover.serving.claim = Claim(start=1, end=3, made_at_ms=7)
        announced = Announcement.decode(mover.serving.make_announcement().encode())
        assert announced.claim == Claim(start=1, end=3, made_at_ms=7)


async def test_how_long_an_output_takes_to_leave_is_announced_by_the_middle_link(
    checkpoint: Checkpoint,
) -> None:
    async with open_swarm(checkpoint, (0, 2), (2, 4)) as swarm, open_mover(swarm, 0, 2) as mover:
        assert mover.serving.make_announcement().send_ms == 0.0
        session = await swarm.open(chain=(mover.hop(), swarm.hops()[1]))
        near(await run_steps(swarm, session, 0, 3), swarm.expected_SD[:3])
        for number, rate in enumerate([1e3, 1e6, math.inf]):
            peer = [*(network.peer for network in swarm.networks), swarm.client.peer][number]
            swarm.hub.link(mover.peer, peer).bytes_per_s = rate
        row_bytes = swarm.hidden_SD.shape[1] * 4
        assert mover.serving.make_announcement().send_ms == round(row_bytes / 1e6 * 1e3, 2)
        await session.close()
