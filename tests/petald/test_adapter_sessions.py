"""Sessions with adapters on the network in memory, with real blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from p2p.rpc import MessageStream
from p2p.wire.pass_messages import PASS_PROTOCOL, AdapterLent, PassOpened
from p2p.wire.session_messages import Wanted
from petald.chain_client import ChainSession
from petald.lent_adapter import LentAdapter
from petald.session_actions import Moved
from petald.tensors import to_wire
from tests.helpers.chain_world import CONFIG, Swarm, open_swarm
from tests.helpers.tiny_models import make_model, save_model

LORA = AdapterForm(targets=("q_proj", "v_proj", "down_proj"), rank=3, scaling=2.0)
PREFIX = AdapterForm(prefix_tokens=5)
BOTH = AdapterForm(targets=("k_proj", "gate_proj"), rank=2, scaling=0.5, prefix_tokens=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


def make_adapter(checkpoint: Checkpoint, form: AdapterForm, seed: int = 0) -> LentAdapter:
    generator = torch.Generator().manual_seed(seed)
    shape = (checkpoint.config.num_blocks, row_elements(checkpoint.config, form))
    return LentAdapter(form, 0, 0.3 * torch.randn(shape, generator=generator))


def whole(checkpoint: Checkpoint, adapter: LentAdapter) -> SpanAdapter:
    return SpanAdapter(checkpoint.config, adapter.form, 0, adapter.values_LE)


def expected(swarm: Swarm, *adapters: LentAdapter) -> torch.Tensor:
    return swarm.whole.forward(
        swarm.hidden_SD[None], adapters=[whole(swarm.checkpoint, each) for each in adapters]
    )[0]


async def run(swarm: Swarm, session: ChainSession, start: int, end: int) -> torch.Tensor:
    rows_SD = swarm.hidden_SD[start:end]
    result = await session.run_step(to_wire(rows_SD), position=start, wanted=Wanted.ALL)
    return swarm.decode(result.hidden)


def check(actual_SD: torch.Tensor, expected_SD: torch.Tensor) -> None:
    torch.testing.assert_close(actual_SD, expected_SD, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", [LORA, PREFIX, BOTH], ids=["lora", "prefix", "both"])
@pytest.mark.parametrize("spans", [[(0, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 4)]], ids=len)
async def test_steps_with_an_adapter_equal_the_whole_span(
    checkpoint: Checkpoint, spans: list[tuple[int, int]], form: AdapterForm
) -> None:
    async with open_swarm(checkpoint, *spans) as swarm:
        adapter = make_adapter(checkpoint, form)
        session = await swarm.open(adapter=adapter)
        outputs = []
        at = 0
        for size in (20, 1, 3, 1, 9):
            outputs.append(await run(swarm, session, at, at + size))
            at += size
        expected_SD = expected(swarm, adapter)
        check(torch.cat(outputs), expected_SD[:at])
        assert not torch.allclose(expected_SD, swarm.expected_SD, rtol=1e-2)
        check(await run(swarm, session, 7, 12), expected_SD[7:12])  # tokens are taken back
        assert session.times_lent == len(spans)
        assert [store.lent_adapters for store in swarm.stores] == [1] * len(spans)
        await session.close()
        await swarm.wait_free()
        again = await swarm.open(adapter=adapter)
        assert again.times_lent == 0  # they have it still
        check(await run(swarm, again, 0, 8), expected_SD[:8])


async def test_an_adapter_of_two_parts_of_a_span_is_cut_to_them(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 3), (1, 4)) as swarm:
        adapter = make_adapter(checkpoint, BOTH)
        hops = swarm.hops()
        chain = (replace(hops[0], end=2), replace(hops[1], start=2))
        session = await swarm.open(adapter=adapter, chain=chain)
        check(await run(swarm, session, 0, 20), expected(swarm, adapter)[:20])


async def test_sessions_with_different_adapters_are_batched_apart(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        adapters = [make_adapter(checkpoint, LORA, seed) for seed in (1, 2)]
        adapters.append(make_adapter(checkpoint, PREFIX))
        sessions: list[tuple[ChainSession, torch.Tensor]] = []
        for adapter in (adapters[0], adapters[0], adapters[2]):
            sessions.append((await swarm.open(adapter=adapter), expected(swarm, adapter)))
        executor = swarm.executors[0]
        gate = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def hold() -> None:
            trio.from_thread.run(gate.wait, trio_token=token)

        async def check_step(session: ChainSession, expected_SD: torch.Tensor, at: int) -> None:
            check(await run(swarm, session, at, at + 2), expected_SD[at : at + 2])

        for session, expected_SD in sessions:
            check(await run(swarm, session, 0, 4), expected_SD[:4])
        before = executor.batches, executor.batched_items
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.run, hold)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for session, expected_SD in sessions:
                nursery.start_soon(check_step, session, expected_SD, 4)
            while executor.queued < len(sessions):  # noqa: ASYNC110  # nothing tells of it
                await trio.sleep(0.001)
            gate.set()
        items = executor.batched_items - before[1]
        batches = executor.batches - before[0]
        assert (items, batches) == (1 + 3, 1 + 2)  # what held it, then two together and one alone


async def test_a_replaced_hop_is_lent_the_adapter_anew(checkpoint: Checkpoint) -> None:
    spans = [(0, 2), (2, 4)]
    async with open_swarm(checkpoint, *spans, *spans) as swarm:
        adapter = make_adapter(checkpoint, BOTH)
        expected_SD = expected(swarm, adapter)
        news: list[object] = []
        session = await swarm.open(adapter=adapter, chain=swarm.hops()[:2], on_news=news.append)
        check(await run(swarm, session, 0, 8), expected_SD[:8])
        assert session.times_lent == 2
        swarm.hub.kill(swarm.networks[1].peer)
        check(await run(swarm, session, 8, 10), expected_SD[8:10])
        moved = news[-1]
        assert isinstance(moved, Moved)
        assert moved.replayed_tokens == 8
        assert session.times_lent == 3
        assert swarm.stores[3].lent_adapters == 1


async def test_a_leaving_hop_hands_its_cache_over_without_the_prefix(
    checkpoint: Checkpoint,
) -> None:
    async with open_swarm(checkpoint, (0, 2), (2, 4), (2, 4)) as swarm:
        adapter = make_adapter(checkpoint, BOTH)
        expected_SD = expected(swarm, adapter)
        news: list[object] = []
        session = await swarm.open(
            adapter=adapter,
            chain=swarm.hops()[:2],
            on_news=news.append,
            prefers_hand_over=lambda old, new, tokens: True,
        )
        check(await run(swarm, session, 0, 30), expected_SD[:30])
        await swarm.servers[1].drain(deadline_s=10, idle_s=5)
        moved = news[-1]
        assert isinstance(moved, Moved)
        assert (moved.code, moved.handed_over_tokens, moved.replayed_tokens) == ("leaving", 30, 0)
        assert swarm.servers[2].caches_received == 1
        check(await run(swarm, session, 30, 40), expected_SD[30:])


async def test_a_prefix_takes_room_beside_the_session(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, (0, 4)) as swarm:
        session = await swarm.open(adapter=make_adapter(checkpoint, PREFIX), max_tokens=40)
        (served,) = swarm.servers[0]._sessions.values()
        assert (served.cache.length, served.cache.sequence.length) == (0, 5)
        assert served.cache.sequence.max_tokens == 45
        await run(swarm, session, 0, 20)
        assert (served.cache.length, served.cache.sequence.length) == (20, 25)


async def test_an_adapter_that_gave_way_is_lent_again(checkpoint: Checkpoint) -> None:
    first, second = (make_adapter(checkpoint, LORA, seed) for seed in (1, 2))
    size = first.values_LE.nbytes
    config = replace(CONFIG, adapter_bytes=size, max_adapter_bytes=size)
    async with open_swarm(checkpoint, (0, 4), config=config) as swarm:
        old = await swarm.open(adapter=first)
        new = await swarm.open(adapter=second)  # the first one gives way
        check(await run(swarm, old, 0, 8), expected(swarm, first)[:8])  # who has it, keeps it
        check(await run(swarm, new, 0, 8), expected(swarm, second)[:8])
        again = await swarm.open(adapter=first)
        check(await run(swarm, again, 0, 8), expected(swarm, first)[:8])
        assert [each.times_lent for each in (old, new, again)] == [1, 1, 1]
        assert (swarm.stores[0].lent_adapters, swarm.stores[0].lent_bytes) == (3, size)


async def test_a_server_that_does_not_keep_what_it_is_lent_is_left(checkpoint: Checkpoint) -> None:
    async def forget(stream: Any) -> None:
        async with MessageStream(stream) as messages:
            await messages.receive()
            await messages.send(PassOpened(max_tokens=64, max_adapter_bytes=1 << 20))
            await messages.receive()
            await messages.send(AdapterLent(number=1))

    async with open_swarm(checkpoint, (0, 4), (0, 4)) as swarm:
        swarm.networks[0].set_handler(PASS_PROTOCOL, forget)
        adapter = make_adapter(checkpoint, LORA)
        session = await swarm.open(adapter=adapter)
        assert [hop.peer for hop in session.chain] == [swarm.networks[1].peer]
        check(await run(swarm, session, 0, 8), expected(swarm, adapter)[:8])


async def test_an_adapter_too_large_for_a_server_goes_to_another(checkpoint: Checkpoint) -> None:
    config = replace(CONFIG, max_adapter_bytes=100)
    async with open_swarm(checkpoint, (0, 4), config=config) as swarm:
        text = await swarm.failure_to_open(adapter=make_adapter(checkpoint, LORA))
        assert "nobody is left" in text


async def test_a_hosted_adapter_is_part_of_the_blocks(checkpoint: Checkpoint) -> None:
    own, lent = make_adapter(checkpoint, PREFIX, 3), make_adapter(checkpoint, BOTH, 4)
    hosted = {"poet": whole(checkpoint, own)}
    async with open_swarm(checkpoint, (0, 2), (2, 4), hosted_adapters=hosted) as swarm:
        session = await swarm.open(hosted=lambda: "poet")
        check(await run(swarm, session, 0, 8), expected(swarm, own)[:8])
        both = await swarm.open(hosted=lambda: "poet", adapter=lent)
        check(await run(swarm, both, 0, 8), expected(swarm, own, lent)[:8])
        assert "nobody is left" in await swarm.failure_to_open(hosted=lambda: "painter")
