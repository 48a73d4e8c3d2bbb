"""Servers and a client on the network in memory, with real blocks: pushes, failures, refusals."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing

from kernels.checkpoint import Checkpoint
from p2p.errors import Refused, StreamBroken
from p2p.memory_network import MemoryNetwork
from p2p.rpc import MessageStream
from p2p.wire.message import Message
from p2p.wire.replies import Ok, Refusal
from p2p.wire.session_messages import (
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    AttachCache,
    AttachPush,
    CacheRows,
    OpenSession,
    SessionOpened,
    Wanted,
)
from p2p.wire.tensor import WireTensor
from petald.errors import BadRequest, SessionLost
from petald.executor import Timed
from petald.history import HistoryStore
from petald.routing import Hop
from petald.session_actions import Moved
from petald.session_settings import Replay
from petald.tensors import to_wire
from tests.helpers.chain_world import CONFIG, MODEL, Swarm, open_swarm
from tests.helpers.tiny_models import make_model, save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize(
    "spans", [[(0, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]], ids=len
)
async def test_steps_through_a_chain_equal_the_whole_span(
    checkpoint: Checkpoint, spans: list[tuple[int, int]]
) -> None:
    async with open_swarm(checkpoint, *spans) as swarm:
        session = await swarm.open()
        outputs = []
        at = 0
        for size in (32, 1, 3, 1, 1, 2):
            rows_SD = swarm.hidden_SD[at : at + size]
            result = await session.run_step(to_wire(rows_SD), position=at, wanted=Wanted.ALL)
            outputs.append(swarm.decode(result.hidden))
            assert len(result.times) == len(spans)
            at += size
        torch.testing.assert_close(torch.cat(outputs), swarm.expected_SD, rtol=1e-4, atol=1e-3)
        assert swarm.pushes == len(spans) - 1  # data went from server to server
        await session.close()
        await swarm.wait_free()


async def test_steps_under_way_at_once_keep_their_order(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 2), (2, 4)) as swarm:
        session = await swarm.open()
        outputs: dict[int, torch.Tensor] = {}

        async def run(at: int) -> None:
            rows_SD = swarm.hidden_SD[at : at + 10]
            result = await session.run_step(to_wire(rows_SD), position=at, wanted=Wanted.ALL)
            outputs[at] = swarm.decode(result.hidden)

        async with trio.open_nursery() as nursery:
            for at in (0, 10, 20, 30):
                nursery.start_soon(run, at)
                await trio.testing.wait_all_tasks_blocked()
        whole_SD = torch.cat([outputs[at] for at in (0, 10, 20, 30)])
        torch.testing.assert_close(whole_SD, swarm.expected_SD, rtol=1e-4, atol=1e-3)


async def test_tokens_are_taken_back_by_a_lower_position(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 2), (2, 4)) as swarm:
        session = await swarm.open()
        wrong_SD = torch.randn(30, 48)
        wrong_SD[:10] = swarm.hidden_SD[:10]
        await session.run_step(to_wire(wrong_SD), position=0, wanted=Wanted.NONE)
        rest_SD = swarm.hidden_SD[10:]
        result = await session.run_step(to_wire(rest_SD), position=10, wanted=Wanted.LAST)
        torch.testing.assert_close(
            swarm.decode(result.hidden), swarm.expected_SD[-1:], rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("dead", [0, 1, 2])
async def test_a_dead_hop_is_replaced_and_nothing_is_lost(
    checkpoint: Checkpoint, dead: int
) -> None:
    spans = [(0, 1), (1, 3), (3, 4)]
    async with open_swarm(checkpoint, *spans, (0, 2), (2, 4)) as swarm:
        news: list[object] = []
        session = await swarm.open(chain=swarm.hops()[:3], on_news=news.append)
        await session.run_step(to_wire(swarm.hidden_SD[:8]), position=0, wanted=Wanted.LAST)
        swarm.hub.kill(swarm.networks[dead].peer)
        result = await session.run_step(
            to_wire(swarm.hidden_SD[8:9]), position=8, wanted=Wanted.LAST
        )
        torch.testing.assert_close(
            swarm.decode(result.hidden), swarm.expected_SD[8:9], rtol=1e-4, atol=1e-3
        )
        moved = news[-1]
        assert isinstance(moved, Moved)
        assert (moved.start, moved.end) == spans[dead]
        assert moved.old == (swarm.networks[dead].peer,)
        assert moved.replayed_tokens == 8
        await session.close()
        await swarm.wait_free()
        assert swarm.histories.memory_bytes == 0


@pytest.mark.parametrize("dead", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
async def test_an_exact_replay_gives_the_same_bits(
    checkpoint: Checkpoint, dead: tuple[int, ...]
) -> None:
    spans = [(0, 1), (1, 3), (3, 4)]

    async def run(kill_at: int) -> tuple[list[bytes], list[int]]:
        async with open_swarm(checkpoint, *spans, *spans) as swarm:
            session = await swarm.open(
                chain=swarm.hops()[:3], codec="int8", replay=Replay.EXACT, max_tokens=40
            )
            outputs = []
            at = 0
            for size in (13, 7, *[1] * 20):
                if at == kill_at:
                    for hop in dead:
                        swarm.hub.kill(swarm.networks[hop].peer)
                rows_SD = swarm.hidden_SD[at : at + size]
                result = await session.run_step(
                    to_wire(rows_SD, "int8"), position=at, wanted=Wanted.LAST
                )
                assert result.hidden is not None
                outputs.append(bytes(result.hidden.data))
                at += size
            spares = [swarm.hosted[len(spans) + hop] for hop in dead]
            return outputs, [spare.prefill_steps for spare in spares]

    undisturbed, _ = await run(kill_at=-1)
    disturbed, prefills = await run(kill_at=30)
    assert disturbed == undisturbed
    assert prefills == [2] * len(dead)  # as they were; what was decoded is decoded again


@pytest.mark.parametrize("hop", [0, 1])
@pytest.mark.parametrize("tokens", [1, 8])
async def test_a_hop_that_gives_no_numbers_is_replaced(
    checkpoint: Checkpoint, hop: int, tokens: int
) -> None:
    spans = [(0, 2), (2, 4)]
    async with open_swarm(checkpoint, *spans, *spans) as swarm:
        session = await swarm.open(chain=swarm.hops()[:2])
        await session.run_step(to_wire(swarm.hidden_SD[:8]), position=0, wanted=Wanted.LAST)
        bad = swarm.hosted[hop]
        run_step = bad.run_step

        async def run_badly(*args: Any, **options: Any) -> Timed:
            timed = await run_step(*args, **options)
            return replace(timed, value=timed.value * math.nan)

        bad.run_step = run_badly  # type: ignore[method-assign]
        result = await session.run_step(
            to_wire(swarm.hidden_SD[8 : 8 + tokens]), position=8, wanted=Wanted.ALL
        )
        torch.testing.assert_close(
            swarm.decode(result.hidden), swarm.expected_SD[8 : 8 + tokens], rtol=1e-4, atol=1e-3
        )
        assert swarm.penalised == [swarm.networks[hop].peer]
        assert session.chain[hop].peer == swarm.networks[2 + hop].peer


async def test_a_hop_that_changes_how_it_writes_its_outputs_is_replaced(
    checkpoint: Checkpoint,
) -> None:
    spans = [(0, 2), (2, 4)]
    async with open_swarm(checkpoint, *spans, *spans) as swarm:
        session = await swarm.open(chain=swarm.hops()[:2])
        outputs = []
        bad = swarm.hosted[0]
        run_step = bad.run_step

        async def run_in_another_dtype(*args: Any, **options: Any) -> Timed:
            timed = await run_step(*args, **options)
            return replace(timed, value=timed.value.to(torch.bfloat16))

        at = 0
        for size in (8, 2, 4, 1):
            rows_SD = swarm.hidden_SD[at : at + size]
            result = await session.run_step(to_wire(rows_SD), position=at, wanted=Wanted.ALL)
            outputs.append(swarm.decode(result.hidden))
            at += size
            if at == 10:
                bad.run_step = run_in_another_dtype  # type: ignore[method-assign]
        torch.testing.assert_close(torch.cat(outputs), swarm.expected_SD[:at], rtol=1e-4, atol=1e-3)
        assert swarm.penalised == [swarm.networks[0].peer]
        assert session.chain[0].peer == swarm.networks[2].peer
        assert session.is_open


@pytest.mark.parametrize(("limit_bytes", "what"), [(1000, "input"), (2000, "copy")])
async def test_a_history_that_cannot_be_written_ends_its_session_alone(
    checkpoint: Checkpoint, limit_bytes: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    async with open_swarm(checkpoint, (0, 2), (2, 4)) as swarm:
        swarm.histories = HistoryStore(limit_bytes=limit_bytes)
        lost, other = await swarm.open(), await swarm.open()
        await other.run_step(to_wire(swarm.hidden_SD[:1]), position=0, wanted=Wanted.LAST)
        with pytest.raises(SessionLost, match="No space left"):  # 8 rows of its input take 1,536 B
            await lost.run_step(to_wire(swarm.hidden_SD[:8]), position=0, wanted=Wanted.LAST)
        assert not lost.is_open
        with pytest.raises(SessionLost):
            await lost.run_step(to_wire(swarm.hidden_SD[:1]), position=0, wanted=Wanted.LAST)
        result = await other.run_step(to_wire(swarm.hidden_SD[1:2]), position=1, wanted=Wanted.LAST)
        torch.testing.assert_close(
            swarm.decode(result.hidden), swarm.expected_SD[1:2], rtol=1e-4, atol=1e-3
        )
        assert other.is_open
        assert swarm.penalised == []  # no hop is to blame
        await lost.close()
        await other.close()
        await swarm.wait_free()
        assert (swarm.histories.memory_bytes, swarm.histories.spilled_bytes) == (0, 0)


async def test_a_leaving_hop_hands_its_cache_over(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 2), (2, 4), (2, 4)) as swarm:
        news: list[object] = []
        session = await swarm.open(
            chain=swarm.hops()[:2],
            on_news=news.append,
            prefers_hand_over=lambda old, new, tokens: True,
        )
        await session.run_step(to_wire(swarm.hidden_SD[:30]), position=0, wanted=Wanted.LAST)
        await swarm.servers[1].drain(deadline_s=10, idle_s=5)
        moved = news[-1]
        assert isinstance(moved, Moved)
        assert (moved.code, moved.handed_over_tokens, moved.replayed_tokens) == ("leaving", 30, 0)
        assert swarm.servers[2].caches_received == 1
        assert swarm.servers[1].sessions == 0
        result = await session.run_step(
            to_wire(swarm.hidden_SD[30:]), position=30, wanted=Wanted.ALL
        )
        torch.testing.assert_close(
            swarm.decode(result.hidden), swarm.expected_SD[30:], rtol=1e-4, atol=1e-3
        )


async def test_a_step_with_bad_numbers_fails_alone(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        good, bad = await swarm.open(), await swarm.open()
        nan_SD = torch.full((1, 48), float("nan"))
        with pytest.raises(BadRequest, match="finite"):
            await bad.run_step(await bad.encode(nan_SD), position=0, wanted=Wanted.LAST)
        await good.run_step(to_wire(swarm.hidden_SD[:1]), position=0, wanted=Wanted.LAST)
        assert good.is_open


async def test_a_step_that_does_not_follow_is_refused(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        session = await swarm.open()
        with pytest.raises(BadRequest, match="does not follow"):
            await session.run_step(to_wire(torch.zeros(1, 48)), position=5, wanted=Wanted.LAST)
        with pytest.raises(BadRequest, match="opened for 64"):
            await session.run_step(to_wire(torch.zeros(65, 48)), position=0, wanted=Wanted.LAST)
        await session.run_step(to_wire(swarm.hidden_SD[:1]), position=0, wanted=Wanted.LAST)


async def test_what_cannot_be_opened_is_refused(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        assert "nobody is left" in await swarm.failure_to_open(model=bytes(32))
        assert "nobody is left" in await swarm.failure_to_open(max_tokens=513)
        nobody = (Hop(peer="nobody", addresses=(), start=0, end=4),)
        await (await swarm.open(chain=nobody)).close()  # it goes around
        for _ in range(CONFIG.max_sessions - 1):
            await swarm.open()
        assert "nobody is left" in await swarm.failure_to_open()


async def test_a_cancelled_step_leaves_the_session_usable(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 2), (2, 4)) as swarm:
        session = await swarm.open()
        for _ in range(20):
            with trio.move_on_after(0.0005):
                await session.run_step(
                    to_wire(swarm.hidden_SD[:20]), position=0, wanted=Wanted.LAST
                )
        result = await session.run_step(
            to_wire(swarm.hidden_SD[:20]), position=0, wanted=Wanted.LAST
        )
        torch.testing.assert_close(
            swarm.decode(result.hidden), swarm.expected_SD[19:20], rtol=1e-4, atol=1e-3
        )


async def test_a_closed_session_says_so(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        session = await swarm.open()
        await session.close()
        with pytest.raises(SessionLost):
            await session.run_step(to_wire(swarm.hidden_SD[:1]), position=0, wanted=Wanted.LAST)
        await swarm.wait_free()


async def test_pushes_of_a_stranger_are_refused(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 2), (2, 4)) as swarm:
        session = await swarm.open()
        stranger = swarm.hub.make_network("stranger")
        stream = await stranger.open_stream(swarm.networks[1].peer, PUSH_PROTOCOL)
        async with MessageStream(stream) as messages:
            await messages.send(AttachPush(session=[*session._lines.values()][1].session))
            assert isinstance(await messages.receive(), Refusal)
        await session.run_step(to_wire(swarm.hidden_SD[:1]), position=0, wanted=Wanted.LAST)


async def test_a_server_drains_when_its_sessions_are_idle(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        session = await swarm.open()
        await session.run_step(to_wire(swarm.hidden_SD[:1]), position=0, wanted=Wanted.LAST)
        swarm.servers[0].stop_accepting()
        with trio.fail_after(10):
            await swarm.servers[0].drain(deadline_s=60, idle_s=0.05)
        assert session.is_open


async def test_one_peer_does_not_get_every_session(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        for _ in range(CONFIG.max_sessions - CONFIG.max_sessions // 4):
            await swarm.open()
        with pytest.raises(Refused, match="for others"):
            await open_raw(swarm, swarm.client)
        other = swarm.hub.make_network("other client")
        assert isinstance(await open_raw(swarm, other), SessionOpened)
        with pytest.raises(Refused, match="sessions of this server are taken") as caught:
            await open_raw(swarm, swarm.hub.make_network("third client"))
        assert caught.value.remote_code == "overloaded"
        assert caught.value.retry_after_s > 0


async def test_a_cache_is_taken_only_from_the_peer_that_was_named(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        session = await swarm.open()
        (line,) = session._lines.values()
        stranger = swarm.hub.make_network("stranger")
        stream = await stranger.open_stream(swarm.networks[0].peer, PUSH_PROTOCOL)
        async with MessageStream(stream) as messages:
            await messages.send(AttachCache(session=line.session, tokens=3))
            assert isinstance(await messages.receive(), Refusal)


@pytest.mark.parametrize(
    "damage",
    ["order", "shape", "dtype", "nan", "cut"],
)
async def test_a_damaged_cache_is_not_taken(checkpoint: Checkpoint, damage: str) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        leaver = swarm.hub.make_network("leaver")
        session = os.urandom(16)
        stream = await swarm.client.open_stream(swarm.networks[0].peer, SESSION_PROTOCOL)
        client = MessageStream(stream)
        await client.send(
            OpenSession(
                session=session, model=MODEL, start=0, end=4, max_tokens=9, cache_from=leaver.peer
            )
        )
        assert isinstance(await client.receive(), SessionOpened)
        served = swarm.servers[0]._sessions[session]
        heads, head_size = served.cache.shape
        rows_KTH = torch.zeros(heads, 3, head_size)
        if damage == "nan":
            rows_KTH[0, 1, 0] = float("nan")
        dtype = torch.bfloat16 if damage == "dtype" else torch.float32
        data = bytes(rows_KTH.to(dtype).view(torch.uint8).numpy())
        shape = (heads, 3, head_size) if damage != "shape" else (heads * 3, 1, head_size)
        tensor = WireTensor(str(dtype).removeprefix("torch."), shape, data)
        rows = CacheRows(block=int(damage == "order"), position=0, keys=tensor, values=tensor)
        push = await leaver.open_stream(swarm.networks[0].peer, PUSH_PROTOCOL)
        messages = MessageStream(push)
        await messages.send(AttachCache(session=session, tokens=3))
        assert isinstance(await messages.receive(), Ok)
        if damage != "cut":
            await messages.send(rows)
            with pytest.raises(StreamBroken):
                await messages.receive()
        await messages.abort()
        with trio.fail_after(10):
            while served.cache.length:  # noqa: ASYNC110  # nothing tells of it
                await trio.sleep(0.005)
        assert served.state.length == 0
        await client.abort()
        await swarm.wait_free()


async def open_raw(swarm: Swarm, network: MemoryNetwork) -> Message:
    """Opens a session at the first server, by hand, and leaves it open."""
    stream = await network.open_stream(swarm.networks[0].peer, SESSION_PROTOCOL)
    messages = MessageStream(stream)
    await messages.send(
        OpenSession(session=os.urandom(16), model=MODEL, start=0, end=4, max_tokens=9)
    )
    reply = await messages.receive()
    assert reply is not None
    if isinstance(reply, Refusal):
        raise Refused(messages.remote_peer, reply.code, reply.text, reply.retry_after_s)
    return reply
