"""Batches forward and back through servers in memory, against the whole span in one go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import trio

from kernels.adapter_form import AdapterForm
from kernels.checkpoint import Checkpoint
from kernels.errors import BadAdapter
from p2p.rpc import MessageStream
from p2p.wire.message import Message
from p2p.wire.pass_messages import (
    PASS_PROTOCOL,
    BackwardResult,
    ForwardResult,
    LendAdapter,
    OpenPass,
    PassOpened,
)
from p2p.wire.session_messages import HopTime
from p2p.wire.tensor import WireTensor
from petald.batch_pass import BatchForm
from petald.config import ServeConfig
from petald.errors import BadRequest, HopFailed, MissingBlocks, NotFinite
from petald.lent_adapter import LentAdapter
from petald.session_actions import Moved, Waiting
from tests.helpers.pass_world import (
    Collected,
    PassWorld,
    make_adapter,
    open_pass_world,
    reference,
    run_backward,
    run_forward,
    wire_mask,
)
from tests.helpers.tiny_models import make_model, save_model

SEQUENCES, TOKENS, WIDTH = 24, 16, 48
LORA = AdapterForm(targets=("q_proj", "v_proj", "down_proj"), rank=3, scaling=2.0)
PREFIX = AdapterForm(prefix_tokens=3)
BOTH = AdapterForm(targets=("k_proj",), rank=2, scaling=0.5, prefix_tokens=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


def tensors(seed: int = 0, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, tokens, WIDTH)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )


def make_form(world: PassWorld, adapter: AdapterForm | None = None, **changes: Any) -> BatchForm:
    fields: dict[str, Any] = {
        "start": 0,
        "end": world.checkpoint.config.num_blocks,
        "sequences": SEQUENCES,
        "tokens": TOKENS,
        "is_kept": True,
        "adapter": None if adapter is None else make_adapter(world, adapter),
    }
    return BatchForm(**(fields | changes))


async def check(world: PassWorld, form: BatchForm, mask_BS: torch.Tensor | None = None) -> None:
    hidden_BSD, gradient_BSD = tensors()
    if mask_BS is not None:
        gradient_BSD = gradient_BSD * mask_BS[..., None]
    expected = reference(world, form, hidden_BSD, gradient_BSD, mask_BS)
    batch = world.batch(form)
    output_BSD = await run_forward(world, batch, hidden_BSD, pieces=3)
    backward_BSD, of_adapter = await run_backward(world, batch, gradient_BSD)
    batch.close()
    is_real = slice(None) if mask_BS is None else mask_BS
    torch.testing.assert_close(output_BSD[is_real], expected[0][is_real])
    torch.testing.assert_close(backward_BSD[is_real], expected[1][is_real])
    if expected[2] is not None:
        torch.testing.assert_close(of_adapter, expected[2])


@pytest.mark.parametrize("adapter", [None, LORA, PREFIX, BOTH], ids=["none", "lora", "pre", "both"])
@pytest.mark.parametrize("spans", [[(0, 4)], [(0, 1), (1, 3), (3, 4)]], ids=["1 hop", "3 hops"])
async def test_forward_and_back_equal_one_span(
    checkpoint: Checkpoint, spans: list[tuple[int, int]], adapter: AdapterForm | None
) -> None:
    async with open_pass_world(checkpoint, *spans) as world:
        await check(world, make_form(world, adapter))
        assert not world.penalised
        for passes in world.passes:
            assert passes.forward_passes > 1, "the batch came in pieces"
            assert passes.backward_passes == passes.forward_passes
        assert all(store.lent_adapters == (adapter is not None) for store in world.stores)


async def test_masks_and_some_blocks(checkpoint: Checkpoint) -> None:
    async with open_pass_world(checkpoint, (0, 2), (2, 4)) as world:
        mask_BS = torch.ones(SEQUENCES, TOKENS, dtype=torch.bool)
        mask_BS[3, 9:] = False
        mask_BS[4, :5] = False
        mask_BS[20, 1:] = False
        form = make_form(world, BOTH, start=1, end=4, mask=wire_mask(mask_BS))
        await check(world, form, mask_BS)


async def test_an_adapter_is_trained_on_top_of_one_that_servers_host(
    checkpoint: Checkpoint,
) -> None:
    async with open_pass_world(checkpoint, (0, 2), (2, 4), hosted=LORA) as world:
        await check(world, make_form(world, BOTH, hosted="poems"))
        with pytest.raises(HopFailed, match="does not host"):
            await run_forward(world, world.batch(make_form(world, hosted="songs")), tensors()[0])
        assert not world.penalised


async def test_a_server_with_little_memory_cuts_batches_up_and_computes_blocks_twice(
    checkpoint: Checkpoint,
) -> None:
    config = ServeConfig(model="tiny", pass_bytes=600_000, max_pass_tokens=5 * TOKENS)
    async with open_pass_world(checkpoint, (0, 4), config=config) as world:
        assert world.passes[0].max_sequence_tokens < 5 * TOKENS * 4
        await check(world, make_form(world, LORA))
        assert world.passes[0].backward_passes >= SEQUENCES / 5


async def test_every_piece_goes_through_the_hops_as_through_a_pipeline(
    checkpoint: Checkpoint,
) -> None:
    """With and without it the results are equal; how many pieces are under way shows it."""
    async with open_pass_world(checkpoint, (0, 2), (2, 4), latency_s=0.02) as world:
        hidden_BSD, _ = tensors()
        took = []
        for window in (1, 0):
            batch = world.batch(make_form(world, pieces_under_way=window, is_kept=False))
            began_at = trio.current_time()
            await run_forward(world, batch, hidden_BSD)
            took.append(trio.current_time() - began_at)
            batch.close()
        pieces = world.passes[0].forward_passes / 2
        assert pieces >= 3
        assert took[0] > pieces * 4 * 0.02, "one after the other, each waits for its round trips"
        assert took[1] < 0.8 * took[0]


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_server_killed_in_forward(checkpoint: Checkpoint, victim: int) -> None:
    spans = [(0, 1), (1, 3), (3, 4)]
    async with open_pass_world(checkpoint, *spans, *spans) as world:
        form = make_form(world, LORA)
        hidden_BSD, gradient_BSD = tensors()
        expected = reference(world, form, hidden_BSD, gradient_BSD)
        batch = world.batch(form)
        dying = world.passes[victim]
        run_really = dying.run_forward

        async def run_once(*args: Any, **more: Any) -> Any:
            if dying.forward_passes:
                world.hub.kill(world.peer(victim))
                await trio.sleep_forever()
            return await run_really(*args, **more)

        dying.run_forward = run_once  # type: ignore[method-assign]
        output_BSD = await run_forward(world, batch, hidden_BSD)
        torch.testing.assert_close(output_BSD, expected[0])
        assert set(world.penalised) == {world.peer(victim)}
        moved = [news for news in world.news if isinstance(news, Moved)]
        assert [(one.old, one.start, one.end) for one in moved] == [
            ((world.peer(victim),), *spans[victim])
        ]
        others = [n for n in range(3) if n != victim]
        forward = [world.passes[n].forward_passes for n in others]
        assert forward == [len(batch._pieces)] * 2, "only its own work was repeated"
        backward_BSD, of_adapter = await run_backward(world, batch, gradient_BSD)
        torch.testing.assert_close(backward_BSD, expected[1])
        torch.testing.assert_close(of_adapter, expected[2])


@pytest.mark.parametrize("when", ["between", "in backward"])
@pytest.mark.parametrize("substitute", [[(1, 3)], [(1, 2), (2, 3)], [(0, 2), (2, 4)]], ids=str)
async def test_a_server_killed_later(
    checkpoint: Checkpoint, when: str, substitute: list[tuple[int, int]]
) -> None:
    """Its blocks are run by one server, or by several, that it did not have before."""
    async with open_pass_world(checkpoint, (0, 1), (1, 3), (3, 4), *substitute) as world:
        form = make_form(world, BOTH)
        hidden_BSD, gradient_BSD = tensors()
        expected = reference(world, form, hidden_BSD, gradient_BSD)
        batch = world.batch(form)
        await run_forward(world, batch, hidden_BSD)
        if when == "between":
            world.hub.kill(world.peer(1))
        dying = world.passes[1]
        run_really = dying.run_backward

        async def run_once(*args: Any, **more: Any) -> Any:
            if dying.backward_passes:
                world.hub.kill(world.peer(1))
                await trio.sleep_forever()
            return await run_really(*args, **more)

        dying.run_backward = run_once  # type: ignore[method-assign]
        collected = Collected(gradient_BSD.shape, gradient_BSD.dtype)
        of_adapter = await batch.run_backward(world.rows(gradient_BSD), collected.take)
        torch.testing.assert_close(collected.values_BSD, expected[1])
        torch.testing.assert_close(of_adapter, expected[2])
        assert set(world.penalised) == {world.peer(1)}


async def test_a_silent_server_is_found_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petald.pass_link.SILENCE_S", 0.05)
    monkeypatch.setattr("petald.pass_link.PING_DEADLINE_S", 0.1)
    async with open_pass_world(checkpoint, (0, 4), (0, 4)) as world:
        form = make_form(world)
        hidden_BSD, gradient_BSD = tensors()
        batch = world.batch(form)
        await run_forward(world, batch, hidden_BSD)
        world.hub.freeze(world.peer(0))
        backward_BSD, _ = await run_backward(world, batch, gradient_BSD)
        torch.testing.assert_close(
            backward_BSD, reference(world, form, hidden_BSD, gradient_BSD)[1]
        )
        assert [news.code for news in world.news if isinstance(news, Moved)] == ["silent"]


async def test_a_slow_link_is_not_taken_for_a_dead_server(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter, which goes first, is on its way for longer than silence may last."""
    monkeypatch.setattr("petald.pass_link.SILENCE_S", 0.3)
    monkeypatch.setattr("petald.pass_link.PING_DEADLINE_S", 0.3)
    async with open_pass_world(checkpoint, (0, 4), bytes_per_s=40_000) as world:
        adapter = make_adapter(world, replace(LORA, rank=12))
        assert adapter.values_LE.nbytes > 2 * 40_000
        form = replace(make_form(world, sequences=1, tokens=2), adapter=adapter)
        hidden_BSD, gradient_BSD = (part[:1, :2] for part in tensors())
        batch = world.batch(form)
        await run_forward(world, batch, hidden_BSD)
        of_hidden, _ = await run_backward(world, batch, gradient_BSD)
        expected = reference(world, form, hidden_BSD, gradient_BSD)
        torch.testing.assert_close(of_hidden, expected[1])
        assert not world.news
        assert not world.penalised


async def test_a_server_that_always_refuses_is_not_asked_for_ever(checkpoint: Checkpoint) -> None:
    config = ServeConfig(model="tiny", max_passes=0)
    async with open_pass_world(checkpoint, (0, 4), config=config) as world:
        for max_wait_s in (0.0, 1.5):
            world.max_wait_s = max_wait_s
            began_at = trio.current_time()
            with pytest.raises(MissingBlocks, match="overloaded"):
                await run_forward(world, world.batch(make_form(world)), tensors()[0])
            assert trio.current_time() - began_at < max_wait_s + 5
        assert not world.penalised


async def test_a_model_in_many_parts_does_not_take_all_streams_of_a_server(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petald.pass_link.MAX_LINKS_PER_PEER", 2)
    config = ServeConfig(model="tiny", max_passes=4)  # three of them for one client
    async with open_pass_world(checkpoint, (0, 4), config=config) as world:
        hidden_BSD, _ = tensors()
        for start, end in [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (2, 4), (0, 1)]:
            form = make_form(world, start=start, end=end, is_kept=False)
            await run_forward(world, world.batch(form), hidden_BSD)
        assert not world.news
        assert world.servers[0].streams <= 3


async def test_a_pass_that_is_cancelled_ends_with_its_block(checkpoint: Checkpoint) -> None:
    async with open_pass_world(checkpoint, (0, 4)) as world:
        hidden_BSD, gradient_BSD = tensors()
        form = make_form(world)
        batch = world.batch(form)
        await run_forward(world, batch, hidden_BSD)
        with trio.move_on_after(0.02) as cut:
            await run_backward(world, batch, gradient_BSD)
        if cut.cancelled_caught:  # and it can be run again, with the same links
            of_hidden, _ = await run_backward(world, batch, gradient_BSD)
            expected = reference(world, form, hidden_BSD, gradient_BSD)
            torch.testing.assert_close(of_hidden, expected[1])
        assert not world.penalised


class Liar:
    """A server that answers as it is told."""

    def __init__(self, world: PassWorld, number: int, lie: str) -> None:
        self.lie = lie
        self.lies = 0
        world.networks[number].set_handler(PASS_PROTOCOL, self.serve)

    async def serve(self, stream: Any) -> None:
        async with MessageStream(stream) as client:
            opening = await client.receive()
            assert isinstance(opening, OpenPass)
            await client.send(PassOpened(max_tokens=4096, max_adapter_bytes=1 << 20))
            while (request := await client.receive()) is not None:
                if not isinstance(request, LendAdapter):
                    self.lies += 1
                    await client.send(self.answer(request))

    def answer(self, request: Any) -> Message:
        rows = request.hidden.shape[0]
        value = float("nan") if self.lie == "nan" else 1.0
        shape = (rows, WIDTH - (self.lie == "narrow"))
        if self.lie == "short":
            shape = (rows - 1, WIDTH)
        data = torch.full(shape, value, dtype=torch.float64).numpy().data.cast("B")
        wire = WireTensor("float64", shape, data)
        time = HopTime(queue_us=0, compute_us=0)
        if hasattr(request, "gradient"):
            of_adapter = None
            if request.adapter is not None and self.lie in ("adapter shape", "adapter nan"):
                columns = 3 if self.lie == "adapter shape" else 1080
                bad = torch.full((4, columns), torch.nan, dtype=torch.float64)
                of_adapter = WireTensor("float64", (4, columns), bad.numpy().data.cast("B"))
            return BackwardResult(
                number=request.number, gradient=wire, time=time, adapter_gradient=of_adapter
            )
        number = request.number + (1000 if self.lie == "number" else 0)
        return ForwardResult(number=number, hidden=wire, time=time)


@pytest.mark.parametrize("lie", ["nan", "narrow", "short", "number"])
async def test_lies_in_forward_are_found_and_blamed(checkpoint: Checkpoint, lie: str) -> None:
    async with open_pass_world(checkpoint, (0, 4), (0, 4)) as world:
        liar = Liar(world, 0, lie)
        form = make_form(world)
        hidden_BSD, gradient_BSD = tensors()
        output_BSD = await run_forward(world, world.batch(form), hidden_BSD)
        expected = reference(world, form, hidden_BSD, gradient_BSD)[0]
        torch.testing.assert_close(output_BSD, expected)
        assert liar.lies
        assert set(world.penalised) == {world.peer(0)}


@pytest.mark.parametrize("lie", ["nan", "narrow", "adapter none", "adapter shape", "adapter nan"])
async def test_lies_in_backward_are_found_and_blamed(checkpoint: Checkpoint, lie: str) -> None:
    async with open_pass_world(checkpoint, (0, 4), (0, 4)) as world:
        form = make_form(world, LORA)
        hidden_BSD, gradient_BSD = tensors()
        batch = world.batch(form)
        await run_forward(world, batch, hidden_BSD)
        liar = Liar(world, 0, lie)
        for link in list(world.links._links.values()):
            link.close()
        await trio.testing.wait_all_tasks_blocked()
        backward_BSD, of_adapter = await run_backward(world, batch, gradient_BSD)
        expected = reference(world, form, hidden_BSD, gradient_BSD)
        torch.testing.assert_close(backward_BSD, expected[1])
        torch.testing.assert_close(of_adapter, expected[2])
        assert liar.lies
        assert set(world.penalised) == {world.peer(0)}


async def test_numbers_not_finite_everywhere_are_the_jobs_own_fault(
    checkpoint: Checkpoint,
) -> None:
    async with open_pass_world(checkpoint, (0, 4), (0, 4)) as world:
        Liar(world, 0, "nan")
        Liar(world, 1, "nan")
        with pytest.raises(NotFinite, match="lower the learning rate"):
            await run_forward(world, world.batch(make_form(world)), tensors()[0])


async def test_numbers_not_finite_of_the_only_server_are_so_too(checkpoint: Checkpoint) -> None:
    async with open_pass_world(checkpoint, (0, 4)) as world:
        Liar(world, 0, "nan")
        with pytest.raises(NotFinite, match="lower the learning rate"):
            await run_forward(world, world.batch(make_form(world)), tensors()[0])


async def test_a_job_waits_for_a_server_and_says_so(checkpoint: Checkpoint) -> None:
    async with open_pass_world(checkpoint, (0, 4)) as world:
        form = make_form(world)
        hidden_BSD, gradient_BSD = tensors()
        passes = world.passes.pop()
        network = world.networks.pop()

        async def come_back() -> None:
            while not world.news:  # noqa: ASYNC110  # nothing tells of it
                await trio.sleep(0.01)
            world.passes.append(passes)
            world.networks.append(network)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back)
            output_BSD = await run_forward(world, world.batch(form), hidden_BSD)
        torch.testing.assert_close(output_BSD, reference(world, form, hidden_BSD, gradient_BSD)[0])
        assert isinstance(world.news[0], Waiting)
        world.passes.pop()
        world.networks.pop()
        world.max_wait_s = 0.0
        with pytest.raises(MissingBlocks):
            await run_forward(world, world.batch(form), hidden_BSD)


async def test_an_adapter_too_large_is_told_at_once(checkpoint: Checkpoint) -> None:
    config = ServeConfig(model="tiny", max_adapter_bytes=1000)
    async with open_pass_world(checkpoint, (0, 4), config=config) as world:
        with pytest.raises(BadAdapter, match="1000"):
            await run_forward(world, world.batch(make_form(world, LORA)), tensors()[0])
        assert not world.penalised


async def test_adapters_that_were_dropped_are_lent_again(checkpoint: Checkpoint) -> None:
    config = ServeConfig(model="tiny", adapter_bytes=40_000)
    async with open_pass_world(checkpoint, (0, 4), config=config) as world:
        hidden_BSD, gradient_BSD = tensors()
        forms = [
            replace(make_form(world), adapter=make_adapter(world, LORA, seed)) for seed in range(3)
        ]
        for turn in range(2):
            for form in forms:
                batch = world.batch(form)
                await run_forward(world, batch, hidden_BSD)
                of_adapter = (await run_backward(world, batch, gradient_BSD))[1]
                expected = reference(world, form, hidden_BSD, gradient_BSD)
                torch.testing.assert_close(of_adapter, expected[2])
            assert world.stores[0].lent_adapters == 3 * (turn + 1)
            assert world.stores[0].lent_bytes <= 40_000
        assert not world.penalised


async def test_a_sequence_too_long_for_every_server(checkpoint: Checkpoint) -> None:
    config = ServeConfig(model="tiny", max_pass_tokens=TOKENS - 1)
    async with open_pass_world(checkpoint, (0, 4), config=config) as world:
        with pytest.raises(HopFailed, match="shorter"):
            await run_forward(world, world.batch(make_form(world)), tensors()[0])
        assert not world.penalised


async def test_rows_that_are_no_batch(checkpoint: Checkpoint) -> None:
    async with open_pass_world(checkpoint, (0, 4)) as world:
        hidden_BSD, _ = tensors()
        broken = hidden_BSD.clone()
        broken[3, 4, 5] = torch.inf
        with pytest.raises(BadRequest, match="finite"):
            await run_forward(world, world.batch(make_form(world)), broken)
        with pytest.raises(BadRequest, match="hidden states"):
            await run_forward(world, world.batch(make_form(world)), hidden_BSD[..., :40])
        assert not world.penalised


async def test_decode_steps_go_before_a_pass(checkpoint: Checkpoint) -> None:
    """A pass that is being computed makes way between two blocks."""
    async with open_pass_world(checkpoint, (0, 4)) as world:
        form = make_form(world)
        hidden_BSD, gradient_BSD = tensors()
        batch = world.batch(form)
        await run_forward(world, batch, hidden_BSD)
        steps = 0

        async def step() -> None:
            nonlocal steps
            while True:
                await world.executors[0].run(lambda: None)
                steps += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step)
            backward_BSD, _ = await run_backward(world, batch, gradient_BSD)
            nursery.cancel_scope.cancel()
        torch.testing.assert_close(
            backward_BSD, reference(world, form, hidden_BSD, gradient_BSD)[1]
        )
        assert world.passes[0].times_made_way > 4
        assert steps > 4


async def test_gradients_are_those_of_the_function_that_is_computed(
    checkpoint: Checkpoint,
) -> None:
    """Numerically: central differences of whole forward passes, in float64."""
    async with open_pass_world(checkpoint, (0, 2), (2, 4)) as world:
        adapter = make_adapter(world, BOTH)
        form = replace(make_form(world, sequences=2, tokens=3), adapter=adapter)
        generator = torch.Generator().manual_seed(3)
        hidden_BSD, gradient_BSD, way_BSD = (
            torch.randn(2, 3, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        way_LE = torch.randn(adapter.values_LE.shape, generator=generator, dtype=torch.float64)
        batch = world.batch(form)
        await run_forward(world, batch, hidden_BSD)
        of_hidden, of_adapter = await run_backward(world, batch, gradient_BSD)
        assert of_adapter is not None

        async def value(step: float) -> float:
            moved = LentAdapter(BOTH, 0, adapter.values_LE + step * way_LE)
            passing = world.batch(replace(form, adapter=moved, is_kept=False))
            output_BSD = await run_forward(world, passing, hidden_BSD + step * way_BSD)
            return float((output_BSD * gradient_BSD).sum())

        slope = (await value(1e-6) - await value(-1e-6)) / 2e-6
        told = float((of_hidden * way_BSD).sum() + (of_adapter * way_LE).sum())
        assert told == pytest.approx(slope, rel=1e-6)
