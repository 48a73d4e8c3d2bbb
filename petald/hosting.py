"""A span as it is hosted: its blocks, its cache, its adapters; and the loading of it.

The next span is loaded in a thread of its own while the one before still serves, and shares the
blocks that both have. Invariant: a `Hosting` that nobody uses any more frees all its memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import trio

from kernels.checkpoint import Checkpoint
from kernels.errors import OutOfDeviceMemory
from kernels.kv_cache import CacheArena
from kernels.layer_loader import block_bytes
from kernels.memory import is_short_of_memory
from kernels.quant.formats import why_slow
from kernels.span import Span, load_span
from kernels.step_graphs import CudaRecorder
from petald.adapter_store import AdapterStore
from petald.block_load import Capacity
from petald.config import ServeConfig
from petald.devices import dtype_name, free_memory_bytes, parse_device, parse_dtype
from petald.errors import ConfigError, raise_alone
from petald.executor import Executor
from petald.hosted_adapters import HostedAdapter, place_adapters
from petald.hosted_passes import HostedPasses
from petald.hosted_span import HostedSpan
from petald.local_model import ModelIdentity
from petald.log import get_logger
from petald.notify import notify_status
from petald.placement import MEMORY_SHARE, count_fitting_blocks
from petald.speed_cache import SpeedCache, speed_key
from petald.swarm import Announcement, ServerState
from petald.throughput import BlockSpeed, measure_speed

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hosting:
    """One span, ready to serve.

    Attributes:
        hosted: runs steps.
        passes: runs forward and backward passes.
        adapters: what sessions and passes can be run with.
        speed: of its blocks, measured when it was loaded.
        share: of the device's time that peers get.
    """

    hosted: HostedSpan
    passes: HostedPasses
    adapters: AdapterStore
    speed: BlockSpeed
    share: float = 1.0

    @property
    def span(self) -> Span:
        """The blocks."""
        return self.hosted.span


class SpanLoader:
    """Loads spans of one model, for one device.

    Args:
        config: how they are to be held.
        identity: of the model.
        executor: the device's thread.
        adapters: that are hosted.
        speeds: where what is measured is kept.
    """

    def __init__(
        self,
        config: ServeConfig,
        identity: ModelIdentity,
        executor: Executor,
        *,
        adapters: Sequence[HostedAdapter] = (),
        speeds: SpeedCache,
    ) -> None:
        self._config = config
        self._identity = identity
        self._executor = executor
        self._adapters = tuple(adapters)
        self._device = parse_device(config.device)
        self._dtype = parse_dtype(config.dtype, self._device, quant=config.quant)
        checkpoint = Checkpoint(identity.folder)
        self._stored = checkpoint.stored
        self._missing = checkpoint.missing_blocks()
        self._speeds = speeds
        self._speed: BlockSpeed | None = None
        self._key = speed_key(
            identity.config,
            device=self._device,
            dtype=self._dtype,
            quant=config.quant,
            threads=config.threads,
        )

    def describe(
        self, version: str, addresses: tuple[str, ...], capacity: Capacity | None = None
    ) -> Announcement:
        """What a server says of itself that loads a span of this model.

        Args:
            version: of petald.
            addresses: where it listens.
            capacity: what it can do, where that is known.
        """
        return Announcement(
            model=self._identity.fingerprint,
            start=0,
            end=1,
            state=ServerState.LOADING,
            step_ms=0.0,
            cache_tokens=self._config.cache_tokens,
            free_cache_tokens=0,
            dtype=dtype_name(self._dtype),
            quant=self._config.quant,
            codec=self._config.codec,
            version=version,
            addresses=addresses,
            block_steps_per_s=0.0 if capacity is None else capacity.block_steps_per_s,
        )

    def warn_if_slow(self) -> None:
        """Tells the log where the weight format is slow on this device, and what is better."""
        sentence = why_slow(self._config.quant, self._dtype, self._device)
        if sentence:
            log.warning("slow weight format", quant=self._config.quant, reason=sentence)

    def block_bytes(self, block: int) -> int:
        """The memory that a block's weights, and its part of the cache, will take."""
        config = self._identity.config
        weights = block_bytes(
            config, block, dtype=self._dtype, quant=self._config.quant, stored=self._stored
        )
        return weights + CacheArena.bytes_per_block(
            config, capacity_tokens=self._config.cache_tokens, dtype=self._dtype
        )

    def check_here(self) -> None:
        """Whether there is a block to serve.

        Raises:
            ConfigError: none is here.
        """
        name, num_blocks = self._identity.name, self._identity.config.num_blocks
        if len(self._missing) == num_blocks:
            raise ConfigError(f"no block of {name} is here; fetch some with petalctl model pull")

    async def find_speed(self) -> BlockSpeed:
        """How fast this device is with one block: as measured before, or else with one block now.

        Raises:
            KernelError: the block cannot be loaded.
        """
        known = await trio.to_thread.run_sync(self._speeds.get, self._key)
        if known is not None:
            return known
        log.info("measuring one block", model=self._identity.name)
        notify_status(f"measuring one block of {self._identity.name}")
        block = min(set(range(self._identity.config.num_blocks)) - self._missing)
        return (await self.load(block, block + 1)).speed

    async def measure_capacity(self, *, freed_bytes: int = 0) -> Capacity:
        """What this server can do for the model.

        Args:
            freed_bytes: so much more of the device's memory will be free than is now.

        Raises:
            ConfigError: not one block fits, or is here.
            KernelError: a block cannot be loaded, to be measured.
        """
        self.check_here()
        fit = self._count_fitting(freed_bytes)
        speed = await self.find_speed()
        rate = self._executor.share / speed.step_s
        return Capacity(fit=fit, block_steps_per_s=rate, missing=self._missing)

    def _count_fitting(self, freed_bytes: int) -> int:
        memory_bytes = self._config.memory_bytes
        if not memory_bytes:
            free_bytes = free_memory_bytes(self._device) + freed_bytes
            memory_bytes = int(free_bytes * MEMORY_SHARE)
        fitting = count_fitting_blocks(
            [self.block_bytes(block) for block in range(self._identity.config.num_blocks)],
            memory_bytes=memory_bytes,
        )
        if not fitting:
            raise ConfigError(
                f"not one block of {self._identity.name} fits into {memory_bytes >> 20} MiB; "
                "set [serve] memory_bytes higher, or cache_tokens lower"
            )
        return fitting

    def has_room(self, start: int, end: int, *, beside: Hosting) -> bool:
        """Whether another span fits beside one that still serves, into what is free to be lent.

        That is what the configuration leaves beside the old span; or else, as at the start, a part
        of what is free: the machine has an owner.
        """
        old = beside.span
        config, cache_tokens = self._identity.config, self._config.cache_tokens
        cache = CacheArena.bytes_per_block(config, capacity_tokens=cache_tokens, dtype=self._dtype)
        new_bytes = sum(
            cache if old.start <= block < old.end else self.block_bytes(block)
            for block in range(start, end)
        )
        free_bytes = int(free_memory_bytes(self._device) * MEMORY_SHARE)
        if self._config.memory_bytes:
            taken_bytes = sum(self.block_bytes(block) for block in range(old.start, old.end))
            free_bytes = min(free_bytes, self._config.memory_bytes - taken_bytes)
        return new_bytes <= free_bytes

    async def load(self, start: int, end: int, *, beside: Span | None = None) -> Hosting:
        """Loads the blocks ``[start, end)``.

        Args:
            start: first block.
            end: the block after the last one.
            beside: a span that is loaded already, whose blocks are shared.

        Raises:
            KernelError: the blocks cannot be read, or the device has no room for them.

        Cancellation: loading ends after the block that is being read.
        """
        with self._memory_guard(start, end):
            return await self._load(start, end, beside)

    @contextmanager
    def _memory_guard(self, start: int, end: int) -> Iterator[None]:
        """Says so where the device has no memory left, wherever that is noticed."""
        try:
            yield
        except RuntimeError as error:
            if not is_short_of_memory(error):
                raise
            raise OutOfDeviceMemory(
                f"{self._device} has no memory for blocks {start}:{end}"
            ) from error

    async def _load(self, start: int, end: int, beside: Span | None) -> Hosting:
        name = self._identity.name
        started_at = time.perf_counter()
        notify_status(f"loading blocks {start}:{end} of {name}")
        span, arena = await self._load_in_thread(start, end, beside)
        speed = self._speed
        if speed is None or beside is None:  # else measuring would hold up who is served meanwhile
            self._speed = speed = await self._executor.run(measure_speed, span, arena)
            await trio.to_thread.run_sync(self._speeds.put, self._key, speed)
        adapters = AdapterStore(
            span,
            hosted=await self._executor.run(place_adapters, self._adapters, span),
            limit_bytes=self._config.adapter_bytes,
            max_adapter_bytes=self._config.max_adapter_bytes,
        )
        log.info(
            "span loaded",
            model=name,
            blocks=f"{start}:{end}",
            dtype=dtype_name(span.dtype),
            quant=self._config.quant,
            mib=span.weight_bytes >> 20,
            seconds=round(time.perf_counter() - started_at, 2),
            step_ms=round(speed.step_s * 1e3 * (end - start), 2),
        )
        return Hosting(
            hosted=HostedSpan(span, arena, self._executor),
            passes=HostedPasses(span, self._executor, pass_bytes=self._config.pass_bytes),
            adapters=adapters,
            speed=speed,
            share=self._executor.share,
        )

    async def shed(self, hosting: Hosting, start: int, end: int) -> None:
        """Frees all that another span does not share, when nothing runs on this one any more."""

        def free() -> None:
            hosting.span.shed(start, end)
            hosting.hosted.arena.release()

        await self._executor.run(free)

    async def _load_in_thread(
        self, start: int, end: int, beside: Span | None
    ) -> tuple[Span, CacheArena]:
        is_cancelled = threading.Event()

        def on_block(_: int) -> None:
            if is_cancelled.is_set():
                raise InterruptedError

        def load() -> tuple[Span, CacheArena]:
            span = load_span(
                Checkpoint(self._identity.folder),
                start,
                end,
                dtype=self._dtype,
                device=self._device,
                quant=self._config.quant,
                beside=beside,
                on_block=on_block,
            )
            if self._device.type == "cuda":
                span.record_steps(CudaRecorder(self._device))
            try:
                arena = CacheArena(
                    span.config,
                    blocks=end - start,
                    capacity_tokens=self._config.cache_tokens,
                    dtype=span.dtype,
                    device=self._device,
                )
            except torch.OutOfMemoryError as error:
                raise OutOfDeviceMemory(
                    f"{self._device} has no memory for the cache of {end - start} blocks; "
                    "set [serve] cache_tokens lower"
                ) from error
            return span, arena

        async def set_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                is_cancelled.set()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(set_when_cancelled)
                loaded = await trio.to_thread.run_sync(load)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            await trio.lowlevel.checkpoint_if_cancelled()  # where loading was interrupted by it
            raise_alone(group)
        return loaded
