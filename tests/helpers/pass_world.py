"""Servers of passes on the network in memory, with real blocks, and a client of them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from kernels.span import Span, load_span
from p2p.memory_network import MemoryHub, MemoryNetwork, open_memory_hub
from p2p.wire.tensor import WireTensor
from petald.adapter_store import AdapterStore
from petald.batch_pass import BatchForm, BatchPass
from petald.batch_rows import IncomingRows
from petald.config import ServeConfig
from petald.errors import MissingBlocks
from petald.executor import Executor, open_executor
from petald.history import HistoryStore
from petald.hosted_passes import HostedPasses
from petald.lanes import LaneKeeper
from petald.lent_adapter import LentAdapter
from petald.message_codecs import MessageCodecs
from petald.parallel_routing import ChainShare
from petald.pass_link import PassLinks
from petald.pass_server import PassServer
from petald.routing import Hop
from petald.session_actions import Moved, Waiting
from petald.tensors import plain_tensor, to_wire

CPU = torch.device("cpu")
MODEL = bytes(range(32))


class PassWorld:
    """Some servers in memory, and what a client needs to use them."""

    def __init__(
        self, hub: MemoryHub, checkpoint: Checkpoint, dtype: torch.dtype, config: ServeConfig
    ) -> None:
        self.hub = hub
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.config = config
        self.whole: Span = self.load(0, checkpoint.config.num_blocks)
        self.client = hub.make_network("client")
        self.links = PassLinks(self.client)
        self.histories = HistoryStore(limit_bytes=1 << 24)
        self.networks: list[MemoryNetwork] = []
        self.servers: list[PassServer] = []
        self.passes: list[HostedPasses] = []
        self.stores: list[AdapterStore] = []
        self.executors: list[Executor] = []
        self.penalised: list[str] = []
        self.news: list[Moved | Waiting] = []
        self.hosted: dict[str, LentAdapter] = {}
        self.max_wait_s = 5.0

    def load(self, start: int, end: int) -> Span:
        return load_span(self.checkpoint, start, end, dtype=self.dtype, device=CPU)

    async def add_server(self, start: int, end: int, stack: AsyncExitStack) -> None:
        executor = await stack.enter_async_context(open_executor(name=f"{start}"))
        span = self.load(start, end)
        network = self.hub.make_network(f"server {len(self.servers)}")
        store = AdapterStore(
            span,
            hosted={
                name: SpanAdapter(span.config, lent.form, 0, lent.values_LE)
                for name, lent in self.hosted.items()
            },
            limit_bytes=self.config.adapter_bytes,
            max_adapter_bytes=self.config.max_adapter_bytes,
        )
        passes = HostedPasses(span, executor, pass_bytes=self.config.pass_bytes)
        server = PassServer(network, passes, adapters=store, fingerprint=MODEL, config=self.config)
        server.start()
        self.executors.append(executor)
        self.networks.append(network)
        self.servers.append(server)
        self.passes.append(passes)
        self.stores.append(store)

    def peer(self, number: int) -> str:
        return self.networks[number].peer

    async def choose_lanes(
        self, *, start: int, end: int, max_lanes: int, excluded: frozenset[str], is_retry: bool
    ) -> Sequence[ChainShare]:
        """The first servers that fit; those that were penalised come last."""
        await trio.lowlevel.checkpoint()
        spans = [
            (network.peer, passes.span.start, passes.span.end)
            for network, passes in zip(self.networks, self.passes, strict=True)
            if network.peer not in excluded
        ]
        spans.sort(key=lambda span: self.penalised.count(span[0]))
        hops: list[Hop] = []
        block = start
        while block < end:
            fitting = [span for span in spans if span[1] <= block < span[2]]
            if not fitting:
                raise MissingBlocks(f"nobody has block {block}", ranges=((block, end),))
            peer, _, until = fitting[0]
            hops.append(Hop(peer=peer, addresses=(), start=block, end=min(until, end)))
            block = hops[-1].end
        return [ChainShare(hops=tuple(hops), tokens_per_s=1.0)]

    def penalise(self, peer: str) -> None:
        self.penalised.append(peer)

    def batch(
        self, form: BatchForm, *, codec: str = "raw", gradient_codec: str = "raw"
    ) -> BatchPass:
        model: Any = SimpleNamespace(fingerprint=MODEL, config=self.checkpoint.config)
        return BatchPass(
            form,
            model,
            keeper=LaneKeeper(self, self.max_wait_s, self.news.append),
            links=self.links,
            histories=self.histories,
            codecs=MessageCodecs(self.client),
            codec=codec,
            gradient_codec=gradient_codec,
        )

    def rows(self, values_BSD: torch.Tensor, pieces: int = 1) -> IncomingRows:
        """Rows that have all come."""
        rows_SD = values_BSD.flatten(0, 1)
        incoming = IncomingRows(self.histories.open(), rows_SD.shape[0])
        at = 0
        for part in rows_SD.chunk(pieces):
            incoming.take(at, to_wire(part))
            at += part.shape[0]
        return incoming


class Collected:
    """Rows that came back, put together."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.values_BSD = torch.full(shape, torch.nan, dtype=dtype)

    async def take(self, row: int, rows: WireTensor) -> None:
        self.values_BSD.flatten(0, 1)[row : row + rows.shape[0]] = plain_tensor(rows)


async def run_forward(
    world: PassWorld, batch: BatchPass, hidden_BSD: torch.Tensor, *, pieces: int = 1
) -> torch.Tensor:
    collected = Collected(hidden_BSD.shape, hidden_BSD.dtype)
    await batch.run_forward(world.rows(hidden_BSD, pieces), collected.take)
    return collected.values_BSD


async def run_backward(
    world: PassWorld, batch: BatchPass, gradient_BSD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    collected = Collected(gradient_BSD.shape, gradient_BSD.dtype)
    of_adapter = await batch.run_backward(world.rows(gradient_BSD), collected.take)
    return collected.values_BSD, of_adapter


def reference(
    world: PassWorld,
    form: BatchForm,
    hidden_BSD: torch.Tensor,
    gradient_BSD: torch.Tensor,
    mask_BS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output, gradient of the input, and of the adapter, by the whole span in one go."""
    hidden_BSD = hidden_BSD.clone().requires_grad_()
    config = world.checkpoint.config
    adapters, leaves = [], [hidden_BSD]
    if form.hosted is not None:
        hosted = world.hosted[form.hosted]
        adapters.append(SpanAdapter(config, hosted.form, 0, hosted.values_LE))
    if form.adapter is not None:
        values_LE = form.adapter.values_LE.clone().requires_grad_()
        adapters.append(SpanAdapter(config, form.adapter.form, 0, values_LE))
        leaves.append(values_LE)
    output_BSD = world.whole.forward(
        hidden_BSD, start=form.start, end=form.end, mask_BS=mask_BS, adapters=adapters
    )
    gradients = torch.autograd.grad(output_BSD, leaves, gradient_BSD)
    of_adapter = gradients[1][form.start : form.end] if form.adapter is not None else None
    return output_BSD.detach(), gradients[0], of_adapter


def wire_mask(mask_BS: torch.Tensor) -> WireTensor:
    data = mask_BS.to(torch.uint8).contiguous().numpy().data.cast("B")
    return WireTensor("uint8", tuple(mask_BS.shape), data)


def make_adapter(world: PassWorld, form: AdapterForm, seed: int = 0) -> LentAdapter:
    config = world.checkpoint.config
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_blocks, row_elements(config, form))
    values_LE = 0.1 * torch.randn(shape, generator=generator, dtype=world.dtype)
    return LentAdapter(form, 0, values_LE)


@asynccontextmanager
async def open_pass_world(
    checkpoint: Checkpoint,
    *spans: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    config: ServeConfig | None = None,
    latency_s: float = 0.0,
    bytes_per_s: float = math.inf,
    hosted: AdapterForm | None = None,
) -> AsyncIterator[PassWorld]:
    async with (
        AsyncExitStack() as stack,
        open_memory_hub(latency_s=latency_s, bytes_per_s=bytes_per_s) as hub,
        trio.open_nursery() as nursery,
    ):
        world = PassWorld(hub, checkpoint, dtype, config or ServeConfig(model="tiny"))
        if hosted is not None:
            world.hosted["poems"] = make_adapter(world, hosted, seed=9)
        for start, end in spans:
            await world.add_server(start, end, stack)
        await nursery.start(world.links.run)
        with trio.fail_after(60):
            yield world
        nursery.cancel_scope.cancel()
