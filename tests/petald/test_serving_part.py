"""A server that serves now the one model, now the other: real blocks, in memory."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

import petald.devices
import petald.hosting
import petald.serving_part
from kernels.block import DecoderBlock
from kernels.errors import CorruptCheckpoint, OutOfDeviceMemory
from kernels.model_store import UnknownModel
from kernels.span import Span
from p2p.directory import Directory
from p2p.memory_network import MemoryHub, open_memory_hub
from p2p.wire.control_messages import Pause, Resume
from petald.config import LendConfig, RouteConfig, ServeConfig
from petald.errors import ConfigError
from petald.executor import open_executor
from petald.hosting import Hosting, SpanLoader
from petald.local_model import ModelIdentity, identify_model
from petald.message_codecs import MessageCodecs
from petald.model_choice import ChoiceSettings
from petald.move_actions import FinishMove
from petald.move_planner import MoveState
from petald.router import Router
from petald.serving import Serving
from petald.serving_part import ServingPart
from petald.speed_cache import SpeedCache
from petald.swarm import Announcement, ServerState, directory_key
from petald.throughput import BlockSpeed
from tests.helpers.tiny_models import make_model, save_model

SOON = ChoiceSettings(look_s=0.1, confirm_s=0.1, known_s=0.3, urgent_stay_s=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_model(make_model(name), tmp_path_factory.mktemp(name))
        for name in ("llama", "qwen2")
    }


class Other:
    """Another server, which only says what it is told to say."""

    def __init__(self, hub: MemoryHub, folder: Path) -> None:
        self.network = hub.make_network()
        self.directory = Directory(self.network)
        self.model: ModelIdentity = identify_model(str(folder))
        self.sequence = 0

    async def say(self, state: ServerState = ServerState.SERVING, ttl_s: float = 60.0) -> None:
        self.sequence += 1
        fingerprint = self.model.fingerprint
        said = Announcement(
            model=fingerprint,
            start=0,
            end=self.model.config.num_blocks,
            state=state,
            step_ms=1.0,
            cache_tokens=100,
            free_cache_tokens=100,
            dtype="float32",
        )
        key = directory_key(fingerprint)
        await self.directory.publish(key, said.encode(), ttl_s=ttl_s, sequence=self.sequence)


@asynccontextmanager
async def serve(
    hub: MemoryHub, folders: dict[str, Path], state_dir: Path, *, share: float = 1.0
) -> AsyncIterator[tuple[ServingPart, Router]]:
    network = hub.make_network()
    directory = Directory(network)
    router = Router(network, directory, RouteConfig())
    models = tuple(map(str, folders.values()))
    config = ServeConfig(models=models, cache_tokens=256, memory_bytes=1 << 30)
    async with open_executor(name="cpu", share=share) as executor, trio.open_nursery() as nursery:
        part = ServingPart(
            config,
            LendConfig(max_load=1.0),
            state_dir=state_dir,
            network=network,
            directory=directory,
            router=router,
            codecs=MessageCodecs(network),
            executor=executor,
            speeds=SpeedCache(state_dir),
            rng=random.Random(1),
            settings=SOON,
        )
        await nursery.start(part.run)
        yield part, router
        nursery.cancel_scope.cancel()


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not holds():  # noqa: ASYNC110  # what is waited for has no event
            await trio.sleep(0.02)


def serves(part: ServingPart, folder: Path) -> Callable[[], bool]:
    return lambda: part.serving is not None and part.serving.identity.folder == folder


async def states_of(router: Router, folder: Path, peer: str) -> list[str]:
    view = await router.read_view(identify_model(str(folder)), max_age_s=0.0)
    return [one.announcement.state for one in view.servers if one.peer == peer]


async def test_a_server_goes_to_the_model_that_lost_its_last_server(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    async with open_memory_hub() as hub:
        kept = Other(hub, folders["llama"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, router):
            assert serves(part, folders["qwen2"])()
            assert part.serving is not None
            before = weakref.ref(part.serving.hosting.span.block(0))
            peer = part.serving.make_announcement()
            assert peer.state == ServerState.SERVING
            # Somebody takes its model too, and nobody serves the other one any more.
            taker = Other(hub, folders["qwen2"])
            await taker.say()
            await kept.say(ServerState.LEAVING)
            await until(serves(part, folders["llama"]))
            await until(lambda: part.changes == 1)  # what follows a change is done too
            assert before() is None
            own = part._network.peer
            assert await states_of(router, folders["llama"], own) == [ServerState.SERVING]
            assert await states_of(router, folders["qwen2"], own) in ([], [ServerState.LEAVING])
            # and back again
            await kept.say()
            await taker.say(ServerState.LEAVING)
            await until(serves(part, folders["qwen2"]))
            await until(lambda: part.changes == 2)
            assert part.lender.decision.lends


async def test_blocks_that_are_left_by_all_others_meanwhile_are_kept(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, router):
            await taker.say()
            await kept.say(ServerState.LEAVING)
            own = part._network.peer
            server = part.serving.server if part.serving else None
            assert server is not None
            await until(lambda: not server.is_accepting)
            assert await states_of(router, folders["llama"], own) in ([], [ServerState.LOADING])
            await taker.say(ServerState.LEAVING)
            await until(lambda: server.is_accepting)
            assert serves(part, folders["qwen2"])()
            assert part.changes == 0
            assert await states_of(router, folders["qwen2"], own) == [ServerState.SERVING]
            assert await states_of(router, folders["llama"], own) in ([], [ServerState.LEAVING])


async def test_a_model_that_cannot_be_loaded_is_not_tried_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_serving, tried = petald.serving_part.load_serving, []

    async def load(config: ServeConfig, **parts: object) -> object:
        tried.append(config.model)
        if config.model == str(folders["llama"]):
            raise CorruptCheckpoint("a file is missing")
        return await load_serving(config, **parts)  # type: ignore[arg-type]

    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, _):
            monkeypatch.setattr(petald.serving_part, "load_serving", load)
            await taker.say()
            await kept.say(ServerState.LEAVING)
            await until(lambda: len(tried) == 2)
            assert tried == [str(folders["llama"]), str(folders["qwen2"])]
            await until(serves(part, folders["qwen2"]))
            await trio.sleep(1.0)  # many looks
            assert len(tried) == 2
            assert part.changes == 0
            with trio.fail_after(5):
                await part.stop(deadline_s=1.0)
            assert part.serving is not None
            assert part.serving.state == ServerState.LEAVING


async def test_a_paused_server_stays_with_its_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "pause.json").write_text('{"until": null}')
    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, _):
            await taker.say()
            await kept.say(ServerState.LEAVING)
            await trio.sleep(1.0)  # many looks
            assert part.serving is None
            assert part.changes == 0
            # What it does when it comes back is what is needed then.
            assert (await part.lender.resume(Resume(job=1))).is_loading
            await until(serves(part, folders["llama"]))


async def test_a_pause_frees_the_blocks_and_a_resume_loads_them_again(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    only = {"llama": folders["llama"]}
    async with open_memory_hub() as hub, serve(hub, only, tmp_path) as (part, router):
        own = part._network.peer
        for _ in range(2):
            assert part.serving is not None
            before = weakref.ref(part.serving.hosting.span.block(0))
            paused = await part.lender.pause(Pause(job=1))
            assert (paused.sessions, paused.left) == (0, 0)
            await until(lambda: part.serving is None)
            assert before() is None
            assert await states_of(router, only["llama"], own) == [ServerState.LEAVING]
            resumed = await part.lender.resume(Resume(job=2))
            assert (resumed.paused_why, resumed.is_loading) == ("", True)
            await until(serves(part, only["llama"]))
            assert part.serving is not None
            assert part.serving.server.is_accepting
            await part.lender.pause(Pause(job=3))  # and taken back while it frees them
            assert (await part.lender.resume(Resume(job=4))).paused_why == ""
            await until(lambda: part.serving is not None and part.serving.server.is_accepting)
        assert part.changes == 0


async def test_a_pause_while_blocks_are_loaded_ends_that(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"llama": folders["llama"]}
    load = SpanLoader.load
    loading = trio.Event()

    async def load_for_ever(*_: object, **__: object) -> Hosting:
        loading.set()
        await trio.sleep_forever()
        raise AssertionError

    async with open_memory_hub() as hub, serve(hub, only, tmp_path) as (part, router):
        own = part._network.peer
        await part.lender.pause(Pause(job=1))
        await until(lambda: part.serving is None)
        monkeypatch.setattr(SpanLoader, "load", load_for_ever)
        await part.lender.resume(Resume(job=2))
        with trio.fail_after(10):
            await loading.wait()
        assert await states_of(router, only["llama"], own) == [ServerState.LOADING]
        await part.lender.pause(Pause(job=3))
        with trio.fail_after(10):
            while await states_of(router, only["llama"], own) != [  # noqa: ASYNC110
                ServerState.LEAVING
            ]:
                await trio.sleep(0.02)
        monkeypatch.setattr(SpanLoader, "load", load)
        await trio.sleep(0.2)
        assert part.serving is None
        await part.lender.resume(Resume(job=4))
        await until(serves(part, only["llama"]))


async def test_a_start_within_a_pause_loads_nothing_but_says_what_is_wrong(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pause.json").write_text('{"until": null}')
    load_serving, failures = petald.serving_part.load_serving, [1]

    async def load(config: ServeConfig, **parts: object) -> object:
        if failures[0]:
            failures[0] -= 1
            raise OutOfDeviceMemory("others have it")
        return await load_serving(config, **parts)  # type: ignore[arg-type]

    monkeypatch.setattr(petald.serving_part, "load_serving", load)
    monkeypatch.setattr(petald.serving_part, "RETRY_S", 0.1)
    async with open_memory_hub() as hub:
        with pytest.raises(ExceptionGroup) as raised:
            async with serve(hub, {"absent": tmp_path / "absent"}, tmp_path):
                pytest.fail("it started")
        assert raised.group_contains(UnknownModel)
        async with serve(hub, {"llama": folders["llama"]}, tmp_path) as (part, _):
            assert (part.serving, failures[0]) == (None, 1)
            # What cannot be loaded when it comes back does not end the daemon.
            await part.lender.resume(Resume(job=1))
            await until(serves(part, folders["llama"]))
            assert failures[0] == 0


async def test_a_pause_while_blocks_are_read_frees_those(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"llama": folders["llama"]}
    load_span = petald.hosting.load_span
    reached, go_on = threading.Event(), threading.Event()
    blocks: list[weakref.ref[DecoderBlock]] = []
    given_back: list[int] = []

    def make_block(*args: Any, **keywords: Any) -> DecoderBlock:
        block = DecoderBlock(*args, **keywords)
        blocks.append(weakref.ref(block))
        return block

    def load_slowly(*args: Any, on_block: Callable[[int], None], **keywords: Any) -> Span:
        def wait(number: int) -> None:
            reached.set()
            assert go_on.wait(10)
            on_block(number)

        return load_span(*args, on_block=wait, **keywords)

    async with open_memory_hub() as hub, serve(hub, only, tmp_path) as (part, _):
        await part.lender.pause(Pause(job=1))
        await until(lambda: part.serving is None)
        monkeypatch.setattr("kernels.span.DecoderBlock", make_block)
        monkeypatch.setattr(petald.hosting, "load_span", load_slowly)
        monkeypatch.setattr(
            petald.devices,
            "give_back_free_memory",
            lambda: given_back.append(sum(block() is not None for block in blocks)),
        )
        await part.lender.resume(Resume(job=2))
        await trio.to_thread.run_sync(reached.wait)
        await part.lender.pause(Pause(job=3))
        go_on.set()
        await until(lambda: bool(given_back))
        assert blocks
        assert given_back == [0]


async def test_a_pause_ends_a_move_in_place(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"llama": folders["llama"]}
    load, begun = SpanLoader.load, trio.Event()

    async def load_for_ever(*_: object, **__: object) -> Hosting:
        begun.set()
        await trio.sleep_forever()
        raise AssertionError

    async with open_memory_hub() as hub, serve(hub, only, tmp_path) as (part, router):
        assert part._tenure is not None
        mover = part._tenure.started.mover
        assert mover is not None
        monkeypatch.setattr(SpanLoader, "load", load_for_ever)
        monkeypatch.setattr(mover._planner, "_state", MoveState.SWITCHING)
        monkeypatch.setattr(mover._planner, "_target", (0, 1))
        actions = [FinishMove(0, 1)]
        monkeypatch.setattr(
            mover._planner, "on_load", lambda *_: [actions.pop()] if actions else []
        )
        mover._wake.set()
        with trio.fail_after(10):
            await begun.wait()
        await part.lender.pause(Pause(job=1))
        states = await states_of(router, only["llama"], part._network.peer)
        assert states == [ServerState.LEAVING]
        await until(lambda: part.serving is None)
        monkeypatch.setattr(SpanLoader, "load", load)
        await part.lender.resume(Resume(job=2))
        await until(serves(part, only["llama"]))


async def test_blocks_that_were_lost_in_a_move_are_loaded_anew(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"llama": folders["llama"]}
    load, failures = SpanLoader.load, [2]

    async def load_or_not(*args: Any, **keywords: Any) -> Hosting:
        await trio.lowlevel.checkpoint()
        if failures[0]:
            failures[0] -= 1
            raise OutOfDeviceMemory("others have it")
        return await load(*args, **keywords)

    async with open_memory_hub() as hub, serve(hub, only, tmp_path) as (part, _):
        before = part.serving
        assert before is not None
        monkeypatch.setattr(SpanLoader, "load", load_or_not)
        with pytest.raises(OutOfDeviceMemory):
            await before.move(0, 1, None, on_changed=trio.lowlevel.checkpoint)
        await until(lambda: part.serving not in (None, before))
        assert part.serving is not None
        assert part.serving.server.is_accepting
        before.server.accept_again()
        assert before.server.is_draining


async def test_of_several_models_one_that_is_broken_is_left_out_after_a_pause_too(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pause.json").write_text('{"until": null}')
    load_serving, tried = petald.serving_part.load_serving, []

    async def load(config: ServeConfig, **parts: object) -> object:
        tried.append(config.model)
        if config.model == str(folders["llama"]):
            raise CorruptCheckpoint("a file is missing")
        return await load_serving(config, **parts)  # type: ignore[arg-type]

    monkeypatch.setattr(petald.serving_part, "load_serving", load)
    async with open_memory_hub() as hub:
        await Other(hub, folders["qwen2"]).say()  # llama is needed more
        async with serve(hub, folders, tmp_path) as (part, _):
            for _ in range(2):
                await part.lender.resume(Resume(job=1))
                await until(serves(part, folders["qwen2"]))
                await part.lender.pause(Pause(job=2))
                await until(lambda: part.serving is None)
            assert tried == [str(folders[name]) for name in ("llama", "qwen2", "qwen2")]


async def test_where_no_model_can_be_chosen_it_is_not_tried_all_the_time(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pause.json").write_text('{"until": null}')
    choose_one, tried = petald.serving_part.choose_one, []

    async def choose(config: ServeConfig, **parts: Any) -> ServeConfig:
        tried.append(trio.current_time())
        if len(tried) < 4:
            raise ConfigError("no block fits")
        return await choose_one(config, **parts)

    monkeypatch.setattr(petald.serving_part, "choose_one", choose)
    monkeypatch.setattr(petald.serving_part, "RETRY_S", 0.3)
    async with open_memory_hub() as hub, serve(hub, folders, tmp_path) as (part, _):
        await part.lender.resume(Resume(job=1))
        await until(lambda: part.serving is not None)
        assert len(tried) == 4
        assert tried[3] - tried[0] >= 0.9


async def test_a_pause_in_the_midst_of_a_change_takes_its_claim_back(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, ending, go_on = Serving.end, trio.Event(), trio.Event()

    async def end_slowly(serving: Serving, *, deadline_s: float) -> None:
        ending.set()
        await go_on.wait()
        await end(serving, deadline_s=deadline_s)

    monkeypatch.setattr(Serving, "end", end_slowly)
    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, router):
            own = part._network.peer
            await taker.say()
            await kept.say(ServerState.LEAVING)
            with trio.fail_after(20):
                await ending.wait()
            await part.lender.pause(Pause(job=1))
            go_on.set()
            await until(lambda: part.serving is None and part._change is None)
            assert await states_of(router, folders["llama"], own) == [ServerState.LEAVING]
            # Much later something else is needed.
            await kept.say()
            await taker.say(ServerState.LEAVING)
            await part.lender.resume(Resume(job=2))
            await until(lambda: part.serving is not None)
            assert serves(part, folders["qwen2"])()


async def test_what_a_server_gives_is_measured_while_it_serves(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(petald.serving_part, "MEASURE_PERIOD_S", 0.1)
    monkeypatch.setattr(petald.serving_part, "FIRST_MEASURE_S", 0.1)
    monkeypatch.setattr("petald.hosted_span.HostedSpan.take_lone_block_s", lambda _: 123.0)
    speed = BlockSpeed(step_s=0.01, token_s=0.001)
    monkeypatch.setattr(petald.hosting, "measure_speed", lambda *_: speed)
    only = {"llama": folders["llama"]}
    async with open_memory_hub() as hub, serve(hub, only, tmp_path, share=0.5) as (part, _):
        assert part.serving is not None
        assert part._tenure is not None
        first = part.serving._rate._short.value
        assert first == pytest.approx(50.0)
        await until(lambda: part.serving is not None and part.serving._rate._short.value < 49.0)
        monkeypatch.setattr(part.serving._rate, "value", 42.0)
        mover = part._tenure.started.mover
        assert mover is not None
        assert mover._capacity.block_steps_per_s == pytest.approx(50.0)
        mover._wake.set()
        await until(lambda: mover._planner._capacity.block_steps_per_s == 42.0)
        assert part.serving.make_announcement().block_steps_per_s == 42.0


async def test_a_gap_that_others_filled_meanwhile_is_left_to_them(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, router):
            await taker.say()
            await kept.say(ServerState.LEAVING)
            assert part.serving is not None
            server = part.serving.server
            await until(lambda: not server.is_accepting)
            await kept.say()
            await until(lambda: server.is_accepting)
            assert part.changes == 0
            states = await states_of(router, folders["llama"], part._network.peer)
            assert states in ([], [ServerState.LEAVING])


async def test_whoever_would_be_alone_on_the_blocks_is_asked_whether_it_lives(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, _):
            await taker.say()
            hub.cut(part._network.peer, taker.network.peer)  # its announcement lies with others too
            await kept.say(ServerState.LEAVING)
            assert part.serving is not None
            server = part.serving.server
            await until(lambda: not server.is_accepting)
            await until(lambda: server.is_accepting)
            assert part.changes == 0


async def test_a_daemon_that_stops_takes_the_claim_on_another_model_back(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.petald.test_serving_part.SOON", replace(SOON, known_s=30.0))
    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, router):
            await taker.say()
            await kept.say(ServerState.LEAVING)
            own = part._network.peer
            with trio.fail_after(20):
                while await states_of(router, folders["llama"], own) != [  # noqa: ASYNC110
                    ServerState.LOADING
                ]:
                    await trio.sleep(0.02)
            await part.stop(deadline_s=1.0)
            assert await states_of(router, folders["llama"], own) == [ServerState.LEAVING]
            assert await states_of(router, folders["qwen2"], own) == [ServerState.LEAVING]


async def test_a_server_whose_models_cannot_be_loaded_for_a_time_comes_back(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_serving, failures = petald.serving_part.load_serving, [2]

    async def load(config: ServeConfig, **parts: object) -> object:
        if failures[0]:
            failures[0] -= 1
            raise OutOfDeviceMemory("others have it")
        return await load_serving(config, **parts)  # type: ignore[arg-type]

    monkeypatch.setattr(petald.serving_part, "RETRY_S", 0.5)
    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        async with serve(hub, folders, tmp_path) as (part, _):
            monkeypatch.setattr(petald.serving_part, "load_serving", load)
            await taker.say()
            await kept.say(ServerState.LEAVING)
            await until(lambda: part.serving is None)
            # Meanwhile its owner's word is taken, and heeded when it serves again.
            paused = await part.lender.pause(Pause(job=1))
            assert (paused.sessions, paused.left) == (0, 0)
            await trio.sleep(1.5)
            assert part.serving is None
            assert (await part.lender.resume(Resume(job=2))).is_loading
            await until(lambda: part.serving is not None)
            assert part.serving is not None
            assert part.serving.server.is_accepting
            await trio.sleep(1.0)  # many looks at the models, which had all failed
            assert part.serving.server.is_accepting


async def test_a_model_that_is_not_here_does_not_keep_the_others_from_being_chosen(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    async with open_memory_hub() as hub:
        kept, taker = Other(hub, folders["llama"]), Other(hub, folders["qwen2"])
        await kept.say()
        models = {**folders, "absent": tmp_path / "absent"}
        async with serve(hub, models, tmp_path) as (part, _):
            assert serves(part, folders["qwen2"])()
            await taker.say()
            await kept.say(ServerState.LEAVING)
            await until(serves(part, folders["llama"]))
