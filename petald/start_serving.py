"""The start of serving: which span, its claim, its weights, its announcement, and what moves it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import trio

from kernels.errors import KernelError
from p2p.directory import Directory
from p2p.network import Network
from petald.announcer import Announcer
from petald.block_load import Capacity
from petald.config import ANY_BLOCKS, ServeConfig
from petald.errors import ConfigError
from petald.executor import Executor
from petald.hosted_adapters import HostedAdapter, read_adapters
from petald.hosting import Hosting, SpanLoader
from petald.joining import Joining, choose_first_span, read_place
from petald.local_model import ModelIdentity, identify_model
from petald.log import get_logger
from petald.message_codecs import MessageCodecs
from petald.move_actions import MoveSettings
from petald.mover import Mover
from petald.notify import notify_status
from petald.pass_server import PassServer
from petald.placement import parse_blocks
from petald.router import Router
from petald.server import Server
from petald.serving import VERSION, Serving
from petald.span_choice import ModelOffer, choose_model
from petald.speed_cache import SpeedCache

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A server that is ready.

    Attributes:
        serving: the server.
        announcer: of it.
        mover: moves it where the swarm needs it; none where its blocks were configured.
    """

    serving: Serving
    announcer: Announcer
    mover: Mover | None

    async def begin(self, nursery: trio.Nursery) -> None:
        """Announces it as what it is from now on, and lets it move."""
        self.announcer.speak_for(self.serving.make_announcement)
        if self.mover is not None:
            nursery.start_soon(self.mover.run)
        await self.announcer.publish()
        if self.serving.server.is_accepting:
            notify_status(self.serving.description)


async def load_serving(
    config: ServeConfig,
    *,
    network: Network,
    directory: Directory,
    router: Router,
    codecs: MessageCodecs,
    executor: Executor,
    speeds: SpeedCache,
    rng: random.Random,
    nursery: trio.Nursery,
) -> Started:
    """Chooses the span, loads it, measures it, and takes sessions from then on.

    While it is being loaded, it is announced as a claim, and so until `Started.begin`.

    Args:
        config: what to serve, and how.
        network: to be served on.
        directory: where the server is announced.
        router: reads the swarm's view.
        codecs: encode what is sent.
        executor: the device's thread.
        speeds: that were measured before.
        rng: of choices among equals, and of delays.
        nursery: holds what goes on for as long as the server lives.

    Raises:
        ConfigError: the configured span is not in the model, not one block fits, or an adapter
            that is to be hosted cannot be.
        KernelError: the model cannot be read.

    Cancellation: loading ends after the block that is being read.
    """
    config = await choose_one(
        config, peer=network.peer, router=router, executor=executor, speeds=speeds, rng=rng
    )
    identity = await trio.to_thread.run_sync(identify_model, config.model)
    own = await trio.to_thread.run_sync(read_adapters, config.adapters, identity.config)
    loader = SpanLoader(config, identity, executor, adapters=own, speeds=speeds)
    await trio.to_thread.run_sync(loader.warn_if_slow)
    capacity: Capacity | None = None
    if config.blocks == ANY_BLOCKS:
        capacity = await loader.measure_capacity()
    joining = Joining(loader.describe(VERSION, network.addresses[:16], capacity))
    announcer = Announcer(directory, joining.make_announcement, rng=rng)
    async with _take_back_if_failed(joining, announcer):
        if capacity is not None:
            start, end = await choose_first_span(
                joining,
                capacity,
                peer=network.peer,
                read_view=partial(router.read_view, identity, max_age_s=0.0),
                announce=announcer.publish,
                rng=rng,
            )
        else:
            start, end = _configured_span(config, identity)
            joining.claim_span(start, end)
        await nursery.start(announcer.run)
        hosting = await loader.load(start, end)
    serving = _begin(config, identity, loader, hosting, network, codecs, own)
    del hosting  # it is to be freed when the server moves
    mover = None
    if capacity is not None:
        mover = Mover(
            serving,
            capacity,
            router=router,
            announcer=announcer,
            network=network,
            settings=MoveSettings(),
            rng=rng,
        )
    return Started(serving=serving, announcer=announcer, mover=mover)


async def choose_one(
    config: ServeConfig,
    *,
    peer: str,
    router: Router,
    executor: Executor,
    speeds: SpeedCache,
    rng: random.Random,
) -> ServeConfig:
    """The configuration with one model: that of several which most needs this server.

    Args:
        config: names one, or several.
        peer: this server.
        router: reads views.
        executor: the device's thread.
        speeds: that were measured before.
        rng: of choices among equals.

    Raises:
        ConfigError, KernelError, P2PError, PetaldError: see `read_candidates`.
    """
    if not config.models:
        return config
    found = await read_candidates(
        config, peer=peer, router=router, executor=executor, speeds=speeds
    )
    offers = {name: candidate.offer for name, candidate in found.items()}
    model = choose_model(offers, rng=rng)
    log.info("model chosen", model=model, of=",".join(offers))
    return replace(config, model=model, models=())


async def check_can_serve(config: ServeConfig, executor: Executor, speeds: SpeedCache) -> None:
    """Looks at what is configured as far as that takes no weights: for a start that is put off.

    Args:
        config: names the models, and says how one would be served.
        executor: the device's thread.
        speeds: that were measured before.

    Raises:
        ConfigError, KernelError: nothing of it can be served; see `load_serving`.
    """
    refusal: ConfigError | KernelError | None = None
    for name in config.models or (config.model,):
        try:
            identity = await trio.to_thread.run_sync(identify_model, name)
            await trio.to_thread.run_sync(read_adapters, config.adapters, identity.config)
            SpanLoader(config, identity, executor, speeds=speeds).check_here()
            if config.blocks != ANY_BLOCKS:
                _configured_span(config, identity)
        except (ConfigError, KernelError) as error:
            refusal = error
        else:
            return
    assert refusal is not None
    raise refusal


@asynccontextmanager
async def _take_back_if_failed(joining: Joining, announcer: Announcer) -> AsyncIterator[None]:
    """Whoever fails to load what it claimed, or is told not to, does not keep others from it."""
    try:
        yield
    except BaseException:
        if joining.claim is not None:
            joining.give_up()
            with trio.CancelScope(shield=True):
                await announcer.withdraw()  # soon given up where it does not succeed
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A model that this server could host.

    Attributes:
        identity: of the model.
        loader: loads spans of it.
        offer: how its swarm does, and what this server could do for it.
    """

    identity: ModelIdentity
    loader: SpanLoader
    offer: ModelOffer


async def read_candidates(
    config: ServeConfig,
    *,
    peer: str,
    router: Router,
    executor: Executor,
    speeds: SpeedCache,
    freed_bytes: int = 0,
) -> dict[str, Candidate]:
    """Judges the models of ``[serve] models``, those left out that cannot be hosted.

    Args:
        config: names the models, and says how one would be hosted.
        peer: this server, which is in none of their loads.
        router: reads their views.
        executor: the device's thread; measures a block of each, where that was never done.
        speeds: that were measured before.
        freed_bytes: of the device's memory, beyond what is free now, when one of them is loaded.

    Raises:
        ConfigError, KernelError: none of them can be hosted; why the last one cannot.
        P2PError, PetaldError: a view cannot be read.
    """
    found: dict[str, Candidate] = {}
    refusal: ConfigError | KernelError | None = None
    for name in config.models:
        try:
            identity = await trio.to_thread.run_sync(identify_model, name)
            await trio.to_thread.run_sync(read_adapters, config.adapters, identity.config)
            loader = SpanLoader(config, identity, executor, speeds=speeds)
            capacity = await loader.measure_capacity(freed_bytes=freed_bytes)
        except (ConfigError, KernelError) as error:
            log.info("model passed over", model=name, reason=str(error))
            refusal = error
            continue
        read_view = partial(router.read_view, identity, max_age_s=0.0)
        offer = ModelOffer(load=await read_place(read_view, peer), capacity=capacity)
        found[name] = Candidate(identity=identity, loader=loader, offer=offer)
    if not found:
        raise refusal or ConfigError("no model is worth a try")
    return found


def _begin(
    config: ServeConfig,
    identity: ModelIdentity,
    loader: SpanLoader,
    hosting: Hosting,
    network: Network,
    codecs: MessageCodecs,
    adapters: Sequence[HostedAdapter],
) -> Serving:
    """Takes sessions and passes on a span from now on."""
    server = Server(
        network,
        hosting.hosted,
        fingerprint=identity.fingerprint,
        config=config,
        adapters=hosting.adapters,
        codecs=codecs,
    )
    server.start()
    pass_server = PassServer(
        network,
        hosting.passes,
        adapters=hosting.adapters,
        fingerprint=identity.fingerprint,
        config=config,
        is_draining=lambda: not server.is_accepting,
        codecs=codecs,
    )
    pass_server.start()
    return Serving(
        identity=identity,
        config=config,
        loader=loader,
        hosting=hosting,
        server=server,
        pass_server=pass_server,
        network=network,
        adapter_names=tuple(adapter.full_name for adapter in adapters),
    )


def _configured_span(config: ServeConfig, identity: ModelIdentity) -> tuple[int, int]:
    start, end = parse_blocks(config.blocks)
    num_blocks = identity.config.num_blocks
    if end > num_blocks:
        raise ConfigError(
            f"blocks {start}:{end} were configured, but {identity.name} has blocks 0:{num_blocks}"
        )
    return start, end
