"""Servers that announce themselves, a router, and a model's ends: what a daemon's jobs need.

On the network in memory, with real blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.checkpoint import Checkpoint
from kernels.head import load_ends
from p2p.directory import Directory
from p2p.wire.control_messages import Generate, GenerateDone
from p2p.wire.message import Message
from petald.config import RouteConfig, ServeConfig
from petald.executor import Executor
from petald.generation import GenerationJob, KeptSession
from petald.job_adapter import NO_ADAPTER, JobAdapter
from petald.local_model import LocalModel, ModelIdentity
from petald.router import Router
from petald.swarm import Announcement, ServerState, directory_key
from tests.helpers.chain_world import CONFIG, CPU, MODEL, Swarm, open_swarm


class DaemonWorld:
    """A client's daemon, and some servers."""

    def __init__(self, swarm: Swarm, folder: Path) -> None:
        self.swarm = swarm
        config = swarm.checkpoint.config
        self.identity = ModelIdentity(name="tiny", folder=folder, fingerprint=MODEL, config=config)
        tokenizer: Any = SimpleNamespace(decode=lambda ids: " " * len(ids), special_ids=frozenset())
        self.model = LocalModel(
            identity=self.identity,
            tokenizer=tokenizer,
            ends=load_ends(swarm.checkpoint, dtype=torch.float32, device=CPU),
            eos_ids=frozenset(),
        )
        self.directory = Directory(swarm.client)
        self.router = Router(swarm.client, self.directory, RouteConfig())
        self.sent: list[Message] = []
        self._sequences = itertools.count(1)

    @property
    def executor(self) -> Executor:
        return self.swarm.executors[0]

    async def announce(self, adapters: Mapping[int, tuple[str, ...]] | None = None) -> None:
        """All servers announce themselves, with the adapters that they are said to host."""
        for number, network in enumerate(self.swarm.networks):
            hosted = self.swarm.hosted[number]
            announcement = Announcement(
                model=MODEL,
                start=hosted.span.start,
                end=hosted.span.end,
                state=ServerState.SERVING,
                step_ms=1.0,
                cache_tokens=hosted.arena.capacity_tokens,
                free_cache_tokens=hosted.arena.free_tokens,
                dtype="float32",
                adapters=(adapters or {}).get(number, ()),
            )
            await Directory(network).publish(
                directory_key(MODEL),
                announcement.encode(),
                ttl_s=45.0,
                sequence=next(self._sequences),
            )

    async def send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(message)

    async def generate(
        self,
        prompt: list[int],
        count: int,
        *,
        adapter: JobAdapter = NO_ADAPTER,
        kept: KeptSession | None = None,
        session: str = "",
        max_wait_s: float = 0.0,
    ) -> tuple[GenerateDone, KeptSession]:
        job = GenerationJob(
            Generate(job=1, prompt_tokens=tuple(prompt), max_new_tokens=count, session=session),
            self.model,
            router=self.router,
            executor=self.executor,
            send=self.send,
            started_at=trio.current_time(),
            max_wait_s=max_wait_s,
            adapter=adapter,
        )
        kept = await job.open_session(self.swarm.nursery, kept)
        return await job.run(kept), kept

    def expected_tokens(
        self,
        prompt: list[int],
        count: int,
        *,
        adapters: tuple[SpanAdapter, ...] = (),
        prompt_PD: torch.Tensor | None = None,
    ) -> list[int]:
        """What the whole span makes of a prompt, greedily."""
        ids = list(prompt)
        for _ in range(count):
            rows_SD = self.model.embed(ids)
            if prompt_PD is not None:
                rows_SD = torch.cat((prompt_PD, rows_SD))
            output_SD = self.swarm.whole.forward(rows_SD[None], adapters=adapters)[0]
            ids.append(int(self.model.ends.head.logits(output_SD[-1:]).argmax()))
        return ids[len(prompt) :]


@asynccontextmanager
async def open_daemon_world(
    checkpoint: Checkpoint,
    folder: Path,
    *spans: tuple[int, int],
    config: ServeConfig = CONFIG,
    hosted_adapters: Mapping[str, SpanAdapter] | None = None,
) -> AsyncIterator[DaemonWorld]:
    async with open_swarm(
        checkpoint, *spans, config=config, hosted_adapters=hosted_adapters
    ) as swarm:
        world = DaemonWorld(swarm, folder)
        await world.announce()
        yield world
