from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from p2p.wire.control_messages import Cancel, Generate, StatusRequest
from petalctl import AsyncClient, DaemonUnreachable, JobError
from petalctl.errors import ConnectionLost
from tests.helpers.control_stand_in import (
    Conversation,
    answer_everything,
    done,
    pieces,
    refuse_everything,
    run_stand_in,
    speak_until_cancelled,
    status_report,
    swarm_report,
)


async def test_reports_and_text() -> None:
    with run_stand_in(answer_everything) as daemon:
        async with AsyncClient(daemon.path) as client:
            assert await client.status() == status_report(1)
            assert await client.swarm() == swarm_report(2)
            async with client.generate("hi") as generation:
                assert [piece async for piece in generation] == ["Hello", ", ", "world"]
                assert (await generation.result()).finish_reason == "stop"
            async with client.generate("hi") as generation:
                events = [event async for event in generation.events()]
                assert [type(event).__name__ for event in events] == [
                    "Progress",
                    "Generated",
                    "Generated",
                    "Generated",
                    "GenerateDone",
                ]
            await client.close_session("s")


async def test_many_jobs_share_a_connection() -> None:
    """All jobs run before any is answered; the answers come interleaved and backwards."""
    count = 20

    def script(conversation: Conversation) -> None:
        jobs = []
        for _ in range(count):
            request = conversation.receive()
            assert isinstance(request, Generate)
            jobs.append((request.job, request.prompt))
        for word in range(3):
            for job, prompt in reversed(jobs):
                conversation.send(*pieces(job, [f"{prompt}-{word} "]))
        for job, prompt in jobs:
            conversation.send(done(job, [f"{prompt}-{word} " for word in range(3)]))
        conversation.receive()

    texts = {}

    async def ask(client: AsyncClient, prompt: str) -> None:
        async with client.generate(prompt) as generation:
            texts[prompt] = "".join([piece async for piece in generation])

    with run_stand_in(script) as daemon, trio.fail_after(30):
        async with AsyncClient(daemon.path) as client, trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(ask, client, f"p{number}")
    assert texts == {f"p{n}": f"p{n}-0 p{n}-1 p{n}-2 " for n in range(count)}


async def test_cancelled_scope_cancels_the_job_and_no_other() -> None:
    def script(conversation: Conversation) -> None:
        first, second = conversation.receive(), conversation.receive()
        assert isinstance(first, Generate)
        assert isinstance(second, Generate)
        assert conversation.receive() == Cancel(job=first.job)
        conversation.send(*pieces(first.job, ["too late"]), *pieces(second.job, ["b"]))
        conversation.send(done(first.job, ["too late"]), done(second.job, ["b"]))
        asked = conversation.receive()
        assert isinstance(asked, StatusRequest)
        conversation.send(status_report(asked.job))

    with run_stand_in(script) as daemon, trio.fail_after(30):
        async with AsyncClient(daemon.path) as client:

            async def wait_first() -> None:
                with trio.move_on_after(0.05) as scope:
                    async with client.generate("first") as generation:
                        await generation.result()
                assert scope.cancelled_caught

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_first)
                await trio.testing.wait_all_tasks_blocked(0.01)
                async with client.generate("second") as generation:
                    assert (await generation.result()).text == "b"
            assert await client.status() == status_report(3)


async def test_leaving_a_generation_cancels_it() -> None:
    with run_stand_in(speak_until_cancelled) as daemon, trio.fail_after(30):
        async with AsyncClient(daemon.path) as client:
            for _ in range(2):
                async with client.generate("hi", session="s") as generation:
                    async for _piece in generation:
                        break
                with pytest.raises(JobError, match="was closed"):
                    await generation.result()
        assert daemon.wait_received(Cancel) == Cancel(job=1)


async def test_errors_come_as_plain_classes(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="no petald socket"):
        async with AsyncClient(tmp_path / "nowhere"):
            pass
    with run_stand_in(refuse_everything) as daemon:
        async with AsyncClient(daemon.path) as client:
            with pytest.raises(JobError) as caught:
                await client.swarm()
            assert caught.value.code == "missing_blocks"


async def test_lost_connection_ends_every_waiting_job() -> None:
    def script(conversation: Conversation) -> None:
        for _ in range(3):
            conversation.receive()

    with run_stand_in(script) as daemon, trio.fail_after(30):
        async with AsyncClient(daemon.path) as client:
            lost = 0

            async def ask() -> None:
                nonlocal lost
                with pytest.raises(ConnectionLost):
                    await client.status()
                lost += 1

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(ask)
            assert lost == 3


async def test_client_outside_its_block_is_a_mistake_that_is_named() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await AsyncClient("/nowhere").status()
