"""Starting to serve, in memory: which model, which blocks, and what is announced on the way."""

from __future__ import annotations

import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from safetensors import safe_open
from safetensors.torch import save_file

from kernels.errors import OutOfDeviceMemory
from kernels.model_store import (
    load_folder_manifest,
    save_folder_manifest,
    store_root,
    weight_files,
)
from p2p.directory import Directory
from p2p.memory_network import MemoryHub, open_memory_hub
from petald.announcer import Announcer
from petald.config import RouteConfig, ServeConfig
from petald.errors import ConfigError
from petald.executor import open_executor
from petald.local_model import identify_model
from petald.message_codecs import MessageCodecs
from petald.router import Router
from petald.serving import Serving
from petald.speed_cache import SpeedCache
from petald.start_serving import load_serving
from petald.swarm import Announcement, ServerState, directory_key
from tests.helpers.tiny_models import make_model, save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_model(make_model(name), tmp_path_factory.mktemp(name))
        for name in ("llama", "qwen2")
    }


CONFIG = ServeConfig(cache_tokens=256, memory_bytes=1 << 30)


@asynccontextmanager
async def start(hub: MemoryHub, config: ServeConfig, folder: Path) -> AsyncIterator[Serving]:
    network = hub.make_network()
    directory = Directory(network)
    router = Router(network, directory, RouteConfig())
    async with open_executor(name="cpu") as executor, trio.open_nursery() as nursery:
        started = await load_serving(
            config,
            network=network,
            directory=directory,
            router=router,
            codecs=MessageCodecs(network),
            executor=executor,
            speeds=SpeedCache(folder),
            rng=random.Random(0),
            nursery=nursery,
        )
        await started.begin(nursery)
        yield started.serving
        nursery.cancel_scope.cancel()


async def announce(hub: MemoryHub, folder: Path) -> None:
    """Somebody serves all of a model."""
    model = identify_model(str(folder))
    said = Announcement(
        model=model.fingerprint,
        start=0,
        end=model.config.num_blocks,
        state=ServerState.SERVING,
        step_ms=1.0,
        cache_tokens=100,
        free_cache_tokens=100,
        dtype="float32",
    )
    directory = Directory(hub.make_network())
    await directory.publish(directory_key(model.fingerprint), said.encode(), ttl_s=60.0, sequence=1)


@pytest.mark.parametrize("served", ["llama", "qwen2"])
async def test_of_several_models_the_one_that_needs_it_is_taken(
    folders: dict[str, Path], tmp_path: Path, served: str
) -> None:
    (wanted,) = set(folders) - {served}
    config = replace(CONFIG, models=tuple(map(str, folders.values())))
    async with open_memory_hub() as hub:
        await announce(hub, folders[served])
        async with start(hub, config, tmp_path) as serving:
            assert serving.identity.folder == folders[wanted]
            span = serving.hosting.span
            assert (span.start, span.end) == (0, 4)  # all of it fits
            assert serving.make_announcement().state == ServerState.SERVING


async def test_where_not_a_block_fits_it_is_said_so(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = replace(CONFIG, models=tuple(map(str, folders.values())), memory_bytes=1000)
    async with open_memory_hub() as hub:
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="not one block")):
            async with start(hub, config, tmp_path):
                pass


async def test_memory_that_is_short_is_said_so_wherever_that_is_noticed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("petald.hosting.measure_speed", fail)
    config = replace(CONFIG, model=str(folders["llama"]), blocks="1:3")
    async with open_memory_hub() as hub:
        with pytest.raises(ExceptionGroup) as raised:
            async with start(hub, config, tmp_path):
                pass
        assert raised.group_contains(OutOfDeviceMemory, match="no memory for blocks 1:3")


@pytest.mark.parametrize("blocks", ["1:3", "auto"])
async def test_a_span_is_announced_as_claimed_while_it_is_loaded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: str
) -> None:
    said: list[Announcement] = []
    publish = Announcer.publish

    async def keep(announcer: Announcer) -> int:
        said.append(announcer._make())
        return await publish(announcer)

    monkeypatch.setattr(Announcer, "publish", keep)
    config = replace(CONFIG, model=str(folders["llama"]), blocks=blocks)
    async with open_memory_hub() as hub, start(hub, config, tmp_path):
        states = [one.state for one in said]
        assert states[0] == ServerState.LOADING
        assert states[-1] == ServerState.SERVING
        assert said[0].claim is not None
        if blocks == "auto":  # it was measured, so that it could choose
            assert said[0].block_steps_per_s > 0
        else:
            assert (said[0].claim.start, said[0].claim.end) == (1, 3)
        assert said[-1].claim is None
        assert said[-1].step_ms > 0
        assert said[-1].block_steps_per_s > 0
        assert said[-1].prefill_ms > 0


async def test_of_a_model_that_is_here_in_part_only_that_part_is_served(tmp_path: Path) -> None:
    folder = save_model(make_model("llama"), tmp_path / "model")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    (folder / "model.safetensors").unlink()
    is_late = {key: bool(re.search(r"layers\.[23]\.", key)) for key in tensors}
    late = {key: tensor for key, tensor in tensors.items() if is_late[key]}
    save_file(late, folder / "late.safetensors")
    early = {key: tensor for key, tensor in tensors.items() if not is_late[key]}
    save_file(early, folder / "early.safetensors")
    file_of = {
        key: "late.safetensors" if late else "early.safetensors" for key, late in is_late.items()
    }
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": file_of}))
    weights = weight_files(folder)

    def remove(name: str) -> None:
        """As where the hub told the file's hash, and it was not fetched."""
        (folder / name).unlink()
        weights[name] = replace(weights[name], mtime_ns=None)
        manifest = load_folder_manifest(folder, root=store_root())
        assert manifest is not None
        save_folder_manifest(folder, replace(manifest, weights=weights), root=store_root())

    remove("early.safetensors")
    config = replace(CONFIG, model=str(folder))
    async with open_memory_hub() as hub, start(hub, config, tmp_path) as serving:
        span = serving.hosting.span
        assert (span.start, span.end) == (2, 4)
    remove("late.safetensors")
    async with open_memory_hub() as hub:
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="no block of")):
            async with start(hub, config, tmp_path):
                pass
