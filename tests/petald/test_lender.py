"""A server that makes way for its owner and comes back: real blocks, a network in memory."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from kernels.checkpoint import Checkpoint
from p2p.directory import Directory
from p2p.wire.control_messages import Generated, Pause, Resume
from p2p.wire.message import Message
from petald.announcer import Announcer
from petald.config import LendConfig
from petald.errors import BadRequest
from petald.hosting import Hosting
from petald.lender import PAUSE_FILE, Lender, load_pause
from petald.lending import Why
from petald.serving import Serving
from petald.swarm import ServerState
from petald.throughput import BlockSpeed
from tests.helpers.chain_world import CONFIG
from tests.helpers.daemon_world import DaemonWorld, open_daemon_world
from tests.helpers.tiny_models import make_model, save_model

PROMPT = [5, 17, 3, 88, 42, 9]
TOKENS = 400


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


class Load:
    """A meter whose needle is set by hand."""

    def __init__(self, share: float = 0.0) -> None:
        self.share = share

    async def read(self) -> float | None:
        await trio.lowlevel.checkpoint()
        return self.share


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return time.time() + self.ahead_s


@asynccontextmanager
async def run_lender(
    world: DaemonWorld,
    number: int,
    config: LendConfig,
    folder: Path,
    *,
    freed: list[Why | None] | None = None,
    **changes: Any,
) -> AsyncIterator[Lender]:
    """A lender for one server of the world, which it announces.

    Its memory is not freed, but that this is asked for is noted: why nothing was lent then.
    """
    swarm = world.swarm
    serving = Serving(
        identity=world.identity,
        config=CONFIG,
        loader=None,  # type: ignore[arg-type]
        hosting=Hosting(
            hosted=swarm.hosted[number],
            passes=None,  # type: ignore[arg-type]
            adapters=swarm.stores[number],
            speed=BlockSpeed(step_s=0.001, token_s=0.001),
        ),
        server=swarm.servers[number],
        pass_server=swarm.pass_servers[number],
        network=swarm.networks[number],
    )
    announcer = Announcer(
        Directory(swarm.networks[number]), serving.make_announcement, rng=random.Random(0)
    )
    lender = Lender(config, **{"meter": None, "state_dir": folder, **changes})

    async def free_and_load() -> None:
        while True:
            await lender.wait_to_free()
            if freed is not None:
                freed.append(lender.decision.why)
            lender.detach()
            await lender.wait_lends()
            serving.server.accept_again()
            lender.attach(serving, announcer)
            announcer.announce_soon()

    async with trio.open_nursery() as nursery:
        await nursery.start(lender.run)
        lender.attach(serving, announcer)
        nursery.start_soon(free_and_load)
        await nursery.start(announcer.run)
        yield lender
        lender.end()
        nursery.cancel_scope.cancel()


def make_folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


async def states(world: DaemonWorld) -> list[ServerState]:
    """As the client's daemon sees the servers."""
    view = await world.router.read_view(world.identity, max_age_s=0.0)
    peers = [network.peer for network in world.swarm.networks]
    said = {server.peer: server.announcement.state for server in view.servers}
    return [said[peer] for peer in peers]


async def wait_until(is_so: Any) -> None:
    with trio.fail_after(20):
        while not is_so():  # noqa: ASYNC110  # nothing tells of it
            await trio.sleep(0.005)


def count_tokens(sent: list[Message]) -> int:
    return sum(len(message.tokens) for message in sent if isinstance(message, Generated))


async def test_a_pause_moves_a_generation_and_a_resume_brings_the_server_back(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4), (0, 4)) as world,
        run_lender(world, 0, LendConfig(), make_folder(tmp_path, "0")) as first,
        run_lender(world, 1, LendConfig(), make_folder(tmp_path, "1")) as second,
    ):
        results: list[Any] = []

        async def generate() -> None:
            results.append((await world.generate(PROMPT, TOKENS))[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate)
            await wait_until(lambda: count_tokens(world.sent) > 5)
            leaver = [server.sessions for server in world.swarm.servers].index(1)
            lender = (first, second)[leaver]
            paused = await lender.pause(Pause(job=3))
            assert (paused.job, paused.sessions, paused.left) == (3, 1, 0)
            assert world.swarm.servers[leaver].sessions == 0
            assert not results
        assert list(results[0].tokens) == world.expected_tokens(PROMPT, TOKENS)
        assert "leaving" in [move.reason for move in results[0].moves]
        assert (lender.decision.why, lender.times_left) == (Why.OWNER, 1)
        assert (await states(world))[leaver] == ServerState.LEAVING
        resumed = await lender.resume(Resume(job=4))
        assert (resumed.job, resumed.paused_why, lender.times_returned) == (4, "", 1)
        with trio.fail_after(10):
            while await states(world) != [ServerState.SERVING] * 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert not world.swarm.servers[leaver].is_draining


async def test_what_nobody_else_can_run_goes_on_until_the_time_is_over_and_then_waits(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The session is ended for the owner's sake, and its answer is whole all the same."""
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4), (0, 4)) as world,
        run_lender(world, 0, LendConfig(), make_folder(tmp_path, "0")) as first,
        run_lender(world, 1, LendConfig(), make_folder(tmp_path, "1")) as second,
    ):
        results: list[Any] = []

        async def generate() -> None:
            results.append((await world.generate(PROMPT, TOKENS, max_wait_s=30.0))[0])

        await second.pause(Pause(job=1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate)
            await wait_until(lambda: count_tokens(world.sent) > 5)
            paused = await first.pause(Pause(job=1, within_s=0.1))
            assert (paused.sessions, paused.left) == (1, 1)
            await wait_until(lambda: world.swarm.servers[0].sessions == 0)
            made = count_tokens(world.sent)
            assert 5 < made < TOKENS
            await trio.sleep(0.1)
            assert count_tokens(world.sent) <= made + 1
            await second.resume(Resume(job=2))
        assert list(results[0].tokens) == world.expected_tokens(PROMPT, TOKENS)


async def test_a_load_makes_the_server_yield_and_its_end_brings_it_back(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Load(1.0)
    config = LendConfig(max_load=0.5, busy_s=1.0, idle_s=1.0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        async with (
            open_daemon_world(checkpoint, tmp_path, (0, 4)) as world,
            run_lender(world, 0, config, tmp_path, meter=load) as lender,
        ):
            assert lender.decision.lends
            await wait_until(lambda: not lender.decision.lends)
            assert lender.decision.why is Why.LOAD
            assert world.swarm.servers[0].is_draining
            load.share = 0.0
            await wait_until(lambda: lender.decision.lends)
            assert not world.swarm.servers[0].is_draining
            load.share = 1.0
            await wait_until(lambda: not lender.decision.lends)
            # The owner's word does not bring it back while others are busy, and it says so.
            await lender.pause(Pause(job=1, for_s=600))
            assert lender.decision.why is Why.OWNER
            resumed = await lender.resume(Resume(job=2))
            assert "more than 50%" in resumed.paused_why
            load.share = 0.0
            await wait_until(lambda: lender.decision.lends)
            assert not world.swarm.servers[0].is_draining
            assert (lender.times_left, lender.times_returned) == (2, 2)
        said = [manager.recv(4096).decode() for _ in range(4)]
    assert said[0].startswith("STATUS=paused: others use more than 50%")
    assert said[1] == "STATUS=serving blocks 0:4 of tiny"
    assert said[2] == said[0]
    assert said[3] == "STATUS=paused: its owner paused it"


async def test_a_pause_ends_in_time_and_outlives_the_daemon(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    clock = Clock()
    async with open_daemon_world(checkpoint, tmp_path, (0, 4)) as world:
        async with run_lender(world, 0, LendConfig(), tmp_path, wall_clock=clock) as lender:
            await lender.pause(Pause(job=1, for_s=600))
            assert lender.decision.ends_in_s == pytest.approx(600, abs=5)
        async with run_lender(world, 0, LendConfig(), tmp_path, wall_clock=clock) as lender:
            assert lender.decision.why is Why.OWNER
            assert world.swarm.servers[0].is_draining
            assert await states(world) == [ServerState.LEAVING]
            clock.ahead_s = 600
            await lender.pause(Pause(job=1, for_s=0.3))
            await wait_until(lambda: lender.decision.lends)
            assert not world.swarm.servers[0].is_draining
        assert load_pause(tmp_path / PAUSE_FILE, clock()) is None
        async with run_lender(world, 0, LendConfig(), tmp_path) as lender:
            await lender.pause(Pause(job=1))
            await lender.resume(Resume(job=2))
            await lender.resume(Resume(job=3))
            assert lender.decision.lends
        assert not (tmp_path / PAUSE_FILE).exists()


async def test_a_resume_in_the_midst_of_a_pause_leaves_the_server_serving(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4)) as world,
        run_lender(world, 0, LendConfig(), tmp_path) as lender,
    ):
        for pauses in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lender.pause, Pause(job=1))
                for _ in range(pauses):
                    await trio.lowlevel.checkpoint()
                if lender.decision.lends:
                    await wait_until(lambda: not lender.decision.lends)
                await lender.resume(Resume(job=2))
            assert lender.decision.lends
            await wait_until(lambda: not world.swarm.servers[0].is_draining)


async def test_it_decides_now_and_then_only_and_not_while_the_daemon_stops(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    clock = Clock()
    config = LendConfig(busy_s=10.0)
    async with open_daemon_world(checkpoint, tmp_path, (0, 4)) as world:
        changes = {"wall_clock": clock, "meter": Load()}
        async with run_lender(world, 0, config, tmp_path, **changes) as lender:
            await trio.sleep(0.5)
            assert clock.looks <= 3
            lender.end()
            with pytest.raises(BadRequest, match="stopping"):
                await lender.pause(Pause(job=1))
            world.swarm.servers[0].stop_accepting()
            await lender.resume(Resume(job=2))
            assert world.swarm.servers[0].is_draining


async def test_the_memory_is_the_owners_at_once_but_after_a_while_for_a_load(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    load = Load(1.0)
    freed: list[Why | None] = []
    config = LendConfig(max_load=0.5, busy_s=1.0, idle_s=1.0, free_after_s=1.5)
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4)) as world,
        run_lender(world, 0, config, tmp_path, meter=load, freed=freed) as lender,
    ):
        await wait_until(lambda: lender.decision.why is Why.LOAD)
        load.share = 0.0
        await wait_until(lambda: lender.decision.lends)
        await trio.sleep(1.5)
        assert freed == []  # it came back in time
        load.share = 1.0
        await wait_until(lambda: lender.decision.why is Why.LOAD)
        await trio.sleep(0.5)
        assert freed == []
        await wait_until(lambda: freed == [Why.LOAD])
        load.share = 0.0
        await wait_until(lambda: lender.decision.lends and not world.swarm.servers[0].is_draining)
        load.share = 1.0
        await wait_until(lambda: lender.decision.why is Why.LOAD)
        await lender.pause(Pause(job=1))
        with trio.fail_after(0.5):
            while freed != [Why.LOAD, Why.OWNER]:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_what_is_used_is_not_freed_before_its_time_is_over(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    freed: list[Why | None] = []
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4)) as world,
        run_lender(world, 0, LendConfig(), tmp_path, freed=freed) as lender,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(world.generate, PROMPT, TOKENS, max_wait_s=0.0))
            await wait_until(lambda: count_tokens(world.sent) > 5)
            nursery.start_soon(lender.pause, Pause(job=1, within_s=2.0))
            await wait_until(lambda: not lender.decision.lends)
            await trio.sleep(0.5)
            assert (world.swarm.servers[0].sessions, freed) == (1, [])
            await wait_until(lambda: freed == [Why.OWNER])
            nursery.cancel_scope.cancel()
        assert world.swarm.servers[0].sessions == 0


async def test_loading_ends_with_a_pause_and_waits_for_its_end(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4)) as world,
        run_lender(world, 0, LendConfig(), tmp_path) as lender,
    ):
        lender.detach()
        async with trio.open_nursery() as nursery:
            with trio.fail_after(5), lender.while_lending() as scope:
                await lender.wait_lends()
                nursery.start_soon(lender.pause, Pause(job=1))
                await trio.sleep_forever()
        assert scope.cancelled_caught
        with trio.fail_after(5), lender.while_lending() as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught
        with trio.move_on_after(0.1):
            await lender.wait_lends()
            pytest.fail("it lends")
        assert (await lender.resume(Resume(job=2))).is_loading
        with trio.fail_after(5):
            await lender.wait_lends()


class EmptyServing:
    """A server without sessions, whose drain ends without a point at which to be cancelled."""

    description = ""

    def __init__(self) -> None:
        self.server = SimpleNamespace(
            sessions=0,
            is_leaving_for_good=False,
            stop_accepting=lambda: None,
            accept_again=lambda: None,
        )
        self.is_in_use = False
        self.ended = 0

    async def drain(self, *, deadline_s: float) -> None:
        async with trio.open_nursery():
            await trio.lowlevel.checkpoint()

    def end_all(self) -> int:
        self.ended += 1
        return 0


class QuietAnnouncer:
    async def withdraw(self) -> None:
        await trio.lowlevel.checkpoint()

    def announce_soon(self) -> None:
        """Nobody listens."""


async def test_whoever_is_told_that_sessions_are_taken_again_keeps_the_server(
    tmp_path: Path,
) -> None:
    kept = 0
    for steps in [*range(12)] * 20:  # tasks that are ready run in a random order
        lender = Lender(LendConfig(), meter=None, state_dir=tmp_path)
        serving: Any = EmptyServing()
        announcer: Any = QuietAnnouncer()
        async with trio.open_nursery() as nursery:
            await nursery.start(lender.run)
            lender.attach(serving, announcer)
            nursery.start_soon(lender.pause, Pause(job=1))
            while lender.decision.lends:
                await trio.lowlevel.checkpoint()
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            resumed = await lender.resume(Resume(job=2))
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            assert lender._to_free.is_set() is resumed.is_loading
            kept += not resumed.is_loading
            assert serving.ended == resumed.is_loading
            nursery.cancel_scope.cancel()
    assert 0 < kept < 240


async def test_a_server_that_comes_into_a_pause_makes_way(tmp_path: Path) -> None:
    lender = Lender(LendConfig(), meter=None, state_dir=tmp_path)
    serving: Any = EmptyServing()
    announcer: Any = QuietAnnouncer()
    async with trio.open_nursery() as nursery:
        await nursery.start(lender.run)
        await lender.pause(Pause(job=1))
        lender.attach(serving, announcer)
        with trio.fail_after(5):
            await lender.wait_to_free()
        nursery.cancel_scope.cancel()
    with pytest.raises(BadRequest, match="stopping"):
        await lender.pause(Pause(job=2))


async def test_what_is_loaded_is_not_taken_for_the_owners_use(tmp_path: Path) -> None:
    config = LendConfig(busy_s=1.0, idle_s=1.0)
    lender = Lender(config, meter=Load(1.0), state_dir=tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(lender.run)
        with lender.while_lending() as scope:
            await trio.sleep(2.0)
        assert not scope.cancelled_caught
        await wait_until(lambda: lender.decision.why is Why.LOAD)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("text", ["", "[]", '{"until": "soon"}', "{}", "\0"])
def test_a_pause_that_cannot_be_read_is_one_without_an_end(tmp_path: Path, text: str) -> None:
    (tmp_path / PAUSE_FILE).write_text(text)
    pause = load_pause(tmp_path / PAUSE_FILE, time.time())
    assert pause is not None
    assert pause.until is None


async def test_a_pause_that_cannot_be_kept_is_one_all_the_same(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4)) as world,
        run_lender(world, 0, LendConfig(), tmp_path / "missing") as lender,
    ):
        await lender.pause(Pause(job=1))
        assert not lender.decision.lends
