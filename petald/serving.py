"""Bringing up the serving part of a daemon: which span, its weights, its cache, its speed."""

from __future__ import annotations

import importlib.metadata
import random
import threading
import time
from dataclasses import dataclass, field
from functools import partial

import trio

from kernels.checkpoint import Checkpoint
from kernels.kv_cache import CacheArena
from kernels.layer_loader import block_bytes
from kernels.span import Span, load_span
from kernels.step_graphs import CudaRecorder
from p2p.network import Network
from petald.adapter_store import AdapterStore
from petald.codec_choice import AUTO
from petald.config import ServeConfig
from petald.devices import dtype_name, free_memory_bytes, parse_device, parse_dtype
from petald.errors import ConfigError
from petald.executor import Executor
from petald.hosted_adapters import place_adapters, read_adapters
from petald.hosted_passes import HostedPasses
from petald.hosted_span import HostedSpan
from petald.local_model import ModelIdentity, identify_model
from petald.log import get_logger
from petald.message_codecs import MessageCodecs
from petald.notify import notify_status
from petald.pass_server import PassServer
from petald.placement import MEMORY_SHARE, choose_span, count_fitting_blocks, parse_blocks
from petald.router import Router
from petald.server import Server
from petald.swarm import Announcement, RoundTripTo, ServerState, choose_next_hops, peer_digest
from petald.throughput import measure_step_ms

log = get_logger(__name__)

VERSION = importlib.metadata.version("petald")


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """The serving part of a daemon.

    Attributes:
        step_ms: of a decode step through the span, measured at the start; announced until real
            steps tell better.
        next_hops: the peers to which round trips are announced.
        quant: the weight format.
        codec: in which outputs are written where a job leaves it to this server.
        adapter_names: full names of the adapters that are hosted.
    """

    identity: ModelIdentity
    hosted: HostedSpan
    server: Server
    pass_server: PassServer
    network: Network
    step_ms: float
    quant: str = "none"
    codec: str = AUTO
    next_hops: list[str] = field(default_factory=list)
    adapter_names: tuple[str, ...] = ()

    @property
    def codecs(self) -> MessageCodecs:
        """Encode what is sent from here."""
        return self.server.codecs

    @property
    def adapters(self) -> AdapterStore:
        """What sessions and passes here can be run with."""
        return self.server.adapters

    def make_announcement(self) -> Announcement:
        """What this server says of itself now."""
        span, arena = self.hosted.span, self.hosted.arena
        step_s = self.hosted.step_s
        step_ms = self.step_ms if step_s is None else step_s * 1e3
        state = ServerState.LEAVING if self.server.is_draining else ServerState.SERVING
        return Announcement(
            model=self.identity.fingerprint,
            start=span.start,
            end=span.end,
            state=state,
            step_ms=round(step_ms, 2),
            prefill_ms=round((self.hosted.token_s or 0.0) * 1e3, 3),
            queue_ms=round(self.hosted.mean_queue_s * 1e3, 1),
            round_trips=self._round_trips(),
            cache_tokens=arena.capacity_tokens,
            free_cache_tokens=arena.free_tokens,
            dtype=dtype_name(span.dtype),
            quant=self.quant,
            codec=self.codec,
            version=VERSION,
            addresses=self.network.addresses[:16],
            adapters=self.adapter_names,
        )

    async def drain(self, *, deadline_s: float) -> None:
        """Lets sessions move and passes end; see `Server.drain`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(self.pass_server.drain, deadline_s=deadline_s))
            await self.server.drain(deadline_s=deadline_s)

    async def measure_next_hops(self, router: Router, rng: random.Random) -> None:
        """Measures the way to those servers that a session here is likely to go on to."""
        view = await router.read_view(self.identity)
        chosen = choose_next_hops(view, self.hosted.span.end, own=self.network.peer, rng=rng)
        await router.ping_all(chosen)
        self.next_hops[:] = chosen

    def _round_trips(self) -> tuple[RoundTripTo, ...]:
        measured = [(peer, self.network.round_trip_s(peer)) for peer in self.next_hops]
        return tuple(
            RoundTripTo(peer=peer_digest(peer), ms=round(seconds * 1e3, 2))
            for peer, seconds in measured
            if seconds is not None
        )


async def load_serving(
    config: ServeConfig,
    *,
    network: Network,
    router: Router,
    codecs: MessageCodecs,
    executor: Executor,
    rng: random.Random,
) -> Serving:
    """Chooses the span, loads it, measures it, and takes sessions from then on.

    Raises:
        ConfigError: the configured span is not in the model, not one block fits, or an adapter
            that is to be hosted cannot be.
        KernelError: the model cannot be read.

    Cancellation: loading ends after the block that is being read.
    """
    identity = await trio.to_thread.run_sync(identify_model, config.model)
    own = await trio.to_thread.run_sync(read_adapters, config.adapters, identity.config)
    start, end = await _choose_blocks(config, identity, router, rng)
    started_at = time.perf_counter()
    notify_status(f"loading blocks {start}:{end} of {identity.name}")
    hosted, step_ms = await _load(config, identity, executor, start, end)
    log.info(
        "span loaded",
        model=identity.name,
        blocks=f"{start}:{end}",
        dtype=dtype_name(hosted.span.dtype),
        mib=hosted.span.weight_bytes >> 20,
        seconds=round(time.perf_counter() - started_at, 2),
        step_ms=round(step_ms, 2),
    )
    notify_status(f"serving blocks {start}:{end} of {identity.name}")
    store = AdapterStore(
        hosted.span,
        hosted=await executor.run(place_adapters, own, hosted.span),
        limit_bytes=config.adapter_bytes,
        max_adapter_bytes=config.max_adapter_bytes,
    )
    server = Server(
        network,
        hosted,
        fingerprint=identity.fingerprint,
        config=config,
        adapters=store,
        codecs=codecs,
    )
    server.start()
    pass_server = PassServer(
        network,
        HostedPasses(hosted.span, executor, pass_bytes=config.pass_bytes),
        adapters=store,
        fingerprint=identity.fingerprint,
        config=config,
        is_draining=lambda: server.is_draining,
        codecs=codecs,
    )
    pass_server.start()
    return Serving(
        identity=identity,
        hosted=hosted,
        server=server,
        pass_server=pass_server,
        network=network,
        step_ms=step_ms,
        quant=config.quant,
        codec=config.codec,
        adapter_names=tuple(adapter.full_name for adapter in own),
    )


async def _load(
    config: ServeConfig, identity: ModelIdentity, executor: Executor, start: int, end: int
) -> tuple[HostedSpan, float]:
    device = parse_device(config.device)
    is_cancelled = threading.Event()

    def on_block(_: int) -> None:
        if is_cancelled.is_set():
            raise InterruptedError

    def load() -> tuple[Span, CacheArena, float]:
        span = load_span(
            Checkpoint(identity.folder),
            start,
            end,
            dtype=parse_dtype(config.dtype, device, quant=config.quant),
            device=device,
            quant=config.quant,
            on_block=on_block,
        )
        arena = CacheArena(
            span.config,
            blocks=end - start,
            capacity_tokens=config.cache_tokens,
            dtype=span.dtype,
            device=device,
        )
        if device.type == "cuda":
            span.record_steps(CudaRecorder(device))
        step_ms = measure_step_ms(span, arena)
        if span.graphs_failure:
            log.warning("decode steps are not recorded", reason=span.graphs_failure)
        return span, arena, step_ms

    async def set_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            is_cancelled.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(set_when_cancelled)
        try:
            span, arena, step_ms = await executor.run(load)
        except InterruptedError:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise
        nursery.cancel_scope.cancel()
    return HostedSpan(span, arena, executor), step_ms


async def _choose_blocks(
    config: ServeConfig, identity: ModelIdentity, router: Router, rng: random.Random
) -> tuple[int, int]:
    num_blocks = identity.config.num_blocks
    if config.blocks != "auto":
        start, end = parse_blocks(config.blocks)
        if end > num_blocks:
            raise ConfigError(
                f"blocks {start}:{end} were configured, "
                f"but {identity.name} has blocks 0:{num_blocks}"
            )
        return start, end
    device = parse_device(config.device)
    dtype = parse_dtype(config.dtype, device, quant=config.quant)
    memory_bytes = config.memory_bytes or int(free_memory_bytes(device) * MEMORY_SHARE)
    cache_bytes = CacheArena.bytes_per_block(
        identity.config, capacity_tokens=config.cache_tokens, dtype=dtype
    )
    fitting = count_fitting_blocks(
        [
            block_bytes(identity.config, block, dtype=dtype, quant=config.quant)
            for block in range(num_blocks)
        ],
        cache_bytes_per_block=cache_bytes,
        memory_bytes=memory_bytes,
    )
    if not fitting:
        raise ConfigError(
            f"not one block of {identity.name} fits into {memory_bytes >> 20} MiB; "
            "set [serve] memory_bytes higher, or cache_tokens lower"
        )
    view = await router.read_view(identity)
    others = [server for server in view.servers if server.is_serving]
    log.debug("choosing a span", fitting=fitting, servers=len(others))
    return choose_span(view.coverage(), length=fitting, rng=rng)
