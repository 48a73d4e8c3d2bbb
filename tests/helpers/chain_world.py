"""Servers and a client on the network in memory, with real blocks, and a chooser of chains."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.checkpoint import Checkpoint
from kernels.kv_cache import CacheArena
from kernels.span import load_span
from p2p.memory_network import MemoryHub, MemoryNetwork, open_memory_hub
from p2p.wire.session_messages import PUSH_PROTOCOL
from p2p.wire.tensor import WireTensor
from petald.adapter_store import AdapterStore
from petald.chain_client import ChainModel, ChainSession
from petald.config import ServeConfig
from petald.errors import MissingBlocks
from petald.executor import Executor, open_executor
from petald.history import HistoryStore
from petald.hosted_passes import HostedPasses
from petald.hosted_span import HostedSpan
from petald.message_codecs import MessageCodecs
from petald.pass_server import PassServer
from petald.routing import Hop
from petald.server import Server
from petald.session_actions import NeedChain
from petald.tensors import from_wire

CPU = torch.device("cpu")
MODEL = bytes(range(32))
CONFIG = ServeConfig(model="tiny", cache_tokens=512, max_sessions=4, max_step_tokens=32)


class FixedChooser:
    """Gives a chain, or else for each question the first servers that fit."""

    def __init__(self, swarm: Swarm, chain: tuple[Hop, ...] | None) -> None:
        self.swarm = swarm
        self.chain = chain

    async def choose(self, need: NeedChain) -> Sequence[Hop]:
        await trio.lowlevel.checkpoint()
        if self.chain is not None and not need.excluded:
            return self.chain
        hops: list[Hop] = []
        at = need.start
        while at < need.end:
            fitting = [
                hop
                for hop in self.swarm.hops()
                if hop.start <= at < hop.end and hop.peer not in need.excluded
            ]
            if not fitting:
                raise MissingBlocks("nobody is left", ranges=((at, need.end),))
            hop = fitting[0]
            end = min(hop.end, need.end)
            hops.append(Hop(peer=hop.peer, addresses=(), start=at, end=end))
            at = end
        return hops

    async def find_better(self, chain: Sequence[Hop], **_: int) -> None:
        return None

    def penalise(self, peer: str) -> None:
        self.swarm.penalised.append(peer)


class Swarm:
    """Some servers in memory, and what a client needs to use them."""

    def __init__(self, hub: MemoryHub, checkpoint: Checkpoint, nursery: trio.Nursery) -> None:
        self.hub = hub
        self.checkpoint = checkpoint
        self.nursery = nursery
        self.client = hub.make_network("client")
        self.networks: list[MemoryNetwork] = []
        self.servers: list[Server] = []
        self.pass_servers: list[PassServer] = []
        self.codecs: list[MessageCodecs] = []
        self.hosted: list[HostedSpan] = []
        self.stores: list[AdapterStore] = []
        self.executors: list[Executor] = []
        self.histories = HistoryStore(limit_bytes=1 << 20)
        self.pushes = 0
        self.penalised: list[str] = []
        self.whole = whole = load_span(checkpoint, 0, 4, dtype=torch.float32, device=CPU)
        self.hidden_SD = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
        self.expected_SD = whole.forward(self.hidden_SD[None])[0]

    async def add_server(
        self,
        start: int,
        end: int,
        stack: AsyncExitStack,
        config: ServeConfig = CONFIG,
        hosted_adapters: Mapping[str, SpanAdapter] | None = None,
    ) -> None:
        executor = await stack.enter_async_context(open_executor(name=f"{start}"))
        span = load_span(self.checkpoint, start, end, dtype=torch.float32, device=CPU)
        arena = CacheArena(
            span.config,
            blocks=end - start,
            capacity_tokens=config.cache_tokens,
            dtype=torch.float32,
            device=CPU,
        )
        network = self.hub.make_network(f"server {len(self.servers)}")
        hosted = HostedSpan(span, arena, executor)
        store = AdapterStore(
            span,
            hosted={
                name: SpanAdapter(span.config, whole.form, start, whole.values_LE[start:end])
                for name, whole in (hosted_adapters or {}).items()
            },
            limit_bytes=config.adapter_bytes,
            max_adapter_bytes=config.max_adapter_bytes,
        )
        codecs = MessageCodecs(network, preferred=config.codec)
        server = Server(
            network, hosted, fingerprint=MODEL, config=config, adapters=store, codecs=codecs
        )
        server.start()
        pass_server = PassServer(
            network,
            HostedPasses(span, executor, pass_bytes=config.pass_bytes),
            adapters=store,
            fingerprint=MODEL,
            config=config,
            is_draining=lambda: server.is_draining,
        )
        pass_server.start()
        serve_push = network.handlers[PUSH_PROTOCOL]

        async def count(stream) -> None:  # type: ignore[no-untyped-def]
            self.pushes += 1
            await serve_push(stream)

        network.set_handler(PUSH_PROTOCOL, count)
        self.networks.append(network)
        self.servers.append(server)
        self.pass_servers.append(pass_server)
        self.codecs.append(codecs)
        self.hosted.append(hosted)
        self.stores.append(store)
        self.executors.append(executor)

    def hops(self) -> tuple[Hop, ...]:
        return tuple(
            Hop(peer=network.peer, addresses=(), start=hosted.span.start, end=hosted.span.end)
            for network, hosted in zip(self.networks, self.hosted, strict=True)
        )

    async def open(self, **changes: Any) -> ChainSession:
        session = self.make_session(**changes)
        failure = await self.nursery.start(session.run)
        assert failure is None, str(failure)
        return session

    def make_session(
        self,
        *,
        max_tokens: int = 64,
        model: bytes = MODEL,
        chain: tuple[Hop, ...] | None = None,
        **changes: Any,
    ) -> ChainSession:
        return ChainSession(
            self.client,
            model=ChainModel(fingerprint=model, num_blocks=4, hidden_size=48),
            chooser=FixedChooser(self, chain),
            histories=self.histories,
            max_tokens=max_tokens,
            **changes,
        )

    async def failure_to_open(self, **changes: Any) -> str:
        failure = await self.nursery.start(self.make_session(**changes).run)
        assert failure is not None
        return str(failure)

    def is_free(self) -> bool:
        arenas = [hosted.arena for hosted in self.hosted]
        return not any(server.sessions for server in self.servers) and all(
            arena.free_tokens == arena.capacity_tokens for arena in arenas
        )

    async def wait_free(self) -> None:
        with trio.fail_after(10):
            while not self.is_free():  # noqa: ASYNC110  # nothing tells of it
                await trio.sleep(0.005)

    def decode(self, wire: WireTensor | None) -> torch.Tensor:
        assert wire is not None
        return from_wire(wire, hidden_size=48, max_tokens=64, dtype=torch.float32, device=CPU)


@asynccontextmanager
async def open_swarm(
    checkpoint: Checkpoint,
    *spans: tuple[int, int],
    config: ServeConfig = CONFIG,
    hosted_adapters: Mapping[str, SpanAdapter] | None = None,
) -> AsyncIterator[Swarm]:
    async with (
        AsyncExitStack() as stack,
        open_memory_hub() as hub,
        trio.open_nursery() as nursery,
    ):
        swarm = Swarm(hub, checkpoint, nursery)
        for start, end in spans:
            await swarm.add_server(start, end, stack, config, hosted_adapters)
        with trio.fail_after(60):
            yield swarm
        nursery.cancel_scope.cancel()
