"""The server of passes, asked by hand: what it refuses, and that it goes on afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import trio

from kernels.adapter_form import AdapterForm
from kernels.checkpoint import Checkpoint
from p2p.rpc import MessageStream
from p2p.wire.message import Message
from p2p.wire.pass_messages import (
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
from petald.config import ServeConfig
from petald.tensors import plain_tensor, to_wire
from tests.helpers.pass_world import MODEL, PassWorld, make_adapter, open_pass_world
from tests.helpers.tiny_models import make_model, save_model

OPEN = OpenPass(model=MODEL, start=0, end=4)
LORA = AdapterForm(targets=("q_proj",), rank=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


@asynccontextmanager
async def open_stream(world: PassWorld, request: Message = OPEN) -> AsyncIterator[MessageStream]:
    stream = await world.client.open_stream(world.peer(0), PASS_PROTOCOL)
    async with MessageStream(stream) as messages:
        await messages.send(request)
        yield messages


def rows(count: int = 6, width: int = 48, value: float = 0.5) -> WireTensor:
    return to_wire(torch.full((count, width), value, dtype=torch.float64))


FORWARD = RunForward(number=1, sequences=2, tokens=3, hidden=rows())
BACKWARD = RunBackward(number=1, sequences=2, tokens=3, hidden=rows(), gradient=rows())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": bytes(32)}, "model_mismatch"),
        ({"end": 5}, "missing_blocks"),
        ({"start": 3, "end": 3}, "missing_blocks"),
        ({"codec": "zip"}, "unknown_codec"),
        ({"hosted": "poems"}, "missing_adapter"),
    ],
)
async def test_streams_that_are_refused(
    checkpoint: Checkpoint, changes: dict[str, Any], code: str
) -> None:
    async with (
        open_pass_world(checkpoint, (0, 4)) as world,
        open_stream(world, replace(OPEN, **changes)) as messages,
    ):
        refusal = await messages.receive()
        assert isinstance(refusal, Refusal)
        assert refusal.code == code
        assert not world.servers[0].streams


async def test_one_client_does_not_get_all_streams(checkpoint: Checkpoint) -> None:
    config = ServeConfig(model="tiny", max_passes=4)
    async with (
        open_pass_world(checkpoint, (0, 4), config=config) as world,
        trio.open_nursery() as nursery,
    ):
        codes = []

        async def keep_open(*, task_status: trio.TaskStatus[None]) -> None:
            async with open_stream(world) as messages:
                answer = await messages.receive()
                codes.append(answer.code if isinstance(answer, Refusal) else "")
                task_status.started()
                await trio.sleep_forever()

        for _ in range(4):
            await nursery.start(keep_open)
        assert codes == ["", "", "", "overloaded"]
        nursery.cancel_scope.cancel()


MASK = WireTensor("uint8", (2, 3), bytes([1, 1, 1, 1, 1, 0]))


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (replace(FORWARD, hidden=rows(5)), "remote_protocol_error"),
        (replace(FORWARD, hidden=rows(6, 47)), "remote_protocol_error"),
        (replace(FORWARD, hidden=rows(value=float("nan"))), "remote_protocol_error"),
        (replace(FORWARD, hidden=replace(rows(), codec="zip")), "remote_protocol_error"),
        (replace(FORWARD, sequences=0, tokens=0), "remote_protocol_error"),
        (replace(FORWARD, sequences=2000, hidden=rows(6000)), "sequence_too_long"),
        (replace(FORWARD, mask=replace(MASK, shape=(3, 2))), "remote_protocol_error"),
        (replace(FORWARD, mask=WireTensor("uint8", (2, 2), bytes(4))), "remote_protocol_error"),
        (replace(FORWARD, adapter=bytes(32)), "unknown_adapter"),
        (replace(BACKWARD, gradient=rows(5)), "remote_protocol_error"),
        (replace(BACKWARD, gradient=rows(value=float("inf"))), "remote_protocol_error"),
        (replace(FORWARD, hidden=rows(value=1e308)), "remote_protocol_error"),
    ],
)
async def test_requests_that_fail_leave_the_stream_as_it_is(
    checkpoint: Checkpoint, request_: Any, code: str
) -> None:
    async with open_pass_world(checkpoint, (0, 4)) as world, open_stream(world) as messages:
        assert isinstance(await messages.receive(), PassOpened)
        await messages.send(request_)
        failed = await messages.receive()
        assert isinstance(failed, PassFailed)
        assert failed.code == code
        await messages.send(replace(FORWARD, number=2, mask=MASK))
        result = await messages.receive()
        assert isinstance(result, ForwardResult)
        assert result.number == 2
        await messages.send(replace(BACKWARD, number=3))
        assert isinstance(await messages.receive(), BackwardResult)


async def test_what_is_no_request_ends_the_stream(checkpoint: Checkpoint) -> None:
    async with open_pass_world(checkpoint, (0, 4)) as world, open_stream(world) as messages:
        await messages.receive()
        await messages.send(OPEN)
        assert await messages.receive() is None
        while world.servers[0].streams:  # noqa: ASYNC110  # nothing tells of it
            await trio.sleep(0.01)


async def test_adapters_that_are_not_taken(checkpoint: Checkpoint) -> None:
    async with open_pass_world(checkpoint, (0, 4)) as world, open_stream(world) as messages:
        await messages.receive()
        part = make_adapter(world, LORA).part(0, 4)
        good = LendAdapter(number=1, adapter=part.digest, form=part.form, values=part.values)
        bad_values = plain_tensor(part.values).clone()
        bad_values[0, 0] = torch.nan
        for bad, code in [
            (replace(good, adapter=bytes(32)), "remote_protocol_error"),
            (replace(good, form=replace(part.form, rank=3)), "bad_adapter"),
            (replace(good, form=replace(part.form, targets=("w",))), "bad_adapter"),
            (replace(good, form=replace(part.form, targets=("v_proj", "q_proj"))), "bad_adapter"),
            (replace(good, form=replace(part.form, targets=(), rank=0)), "bad_adapter"),
            (replace(good, values=to_wire(bad_values)), "remote_protocol_error"),
        ]:
            await messages.send(bad)
            failed = await messages.receive()
            assert isinstance(failed, PassFailed)
            assert failed.code == code
        assert not world.stores[0].lent_bytes
        await messages.send(good)
        assert isinstance(await messages.receive(), AdapterLent)
        assert world.stores[0].find_lent(part.digest, 0, 4) is not None
        assert world.stores[0].find_lent(part.digest, 0, 3) is None


async def test_a_result_that_is_not_finite_is_told(checkpoint: Checkpoint) -> None:
    large = to_wire(torch.full((6, 48), 6e4, dtype=torch.float16))
    async with (
        open_pass_world(checkpoint, (0, 4), dtype=torch.float16) as world,
        open_stream(world) as messages,
    ):
        await messages.receive()
        await messages.send(replace(BACKWARD, hidden=large, gradient=large))
        failed = await messages.receive()
        assert isinstance(failed, PassFailed)
        assert failed.code == "not_finite"
