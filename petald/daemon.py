"""The daemon: its parts, put together in one nursery, and its life from start to SIGTERM.

Nothing is decided here but the order in which parts come up and go down. Up: network, span, its
announcement, the control socket, readiness. Down: the server drains and says that it leaves, then
everything is cancelled, the network and the threads that compute last.
"""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import torch
import trio

from p2p.directory import Directory
from p2p.identity import load_or_create_identity
from p2p.libp2p_network import open_libp2p_network
from p2p.wire.control_messages import Generate, Pause, Paused, Resume, Resumed
from petald.codec_choice import CodecCost
from petald.config import Config
from petald.control import Jobs, Send, open_control_socket, serve_control
from petald.devices import parse_device, parse_dtype
from petald.errors import BadRequest
from petald.executor import Executor, open_executor
from petald.generation import GenerationJob
from petald.hidden_sessions import HiddenSessions
from petald.job_adapter import AdapterFolders
from petald.local_model import LocalModels
from petald.log import get_logger
from petald.message_codecs import MessageCodecs
from petald.notify import notify_ready, notify_stopping
from petald.pass_link import PassLinks
from petald.reports import Reporter
from petald.router import Router
from petald.serving_part import ServingPart
from petald.speed_cache import SpeedCache
from petald.throughput import measure_codecs
from petald.training_jobs import TrainingJobs

log = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def run_daemon(config: Config) -> None:
    """Runs a daemon until SIGTERM or SIGINT; a second signal ends it without draining.

    Raises:
        PetaldError, P2PError, KernelError: it could not start; the text says why.
    """
    stop, ready = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, ready, stop, nursery.cancel_scope)
        await _live(config, ready, stop)
        nursery.cancel_scope.cancel()
    log.info("stopped")


def _measure_codecs(config: Config) -> dict[str, dict[str, CodecCost]]:
    """What codecs cost where this daemon has hidden states, by the kind of device."""
    devices = {"cpu"}
    if config.serve.is_wanted:
        devices.add(parse_device(config.serve.device).type)
    return {name: measure_codecs(torch.device(name)) for name in devices}


async def _live(config: Config, ready: trio.Event, stop: trio.Event) -> None:
    identity = load_or_create_identity(config.daemon.state_dir / "identity.key")
    async with (
        # Outlives the network, whose handlers give the caches of their sessions back on it.
        _open_executors(config) as (device_executor, local_executor),
        open_libp2p_network(
            identity,
            listen=config.network.listen,
            bootstrap=config.network.bootstrap,
            announce=config.network.announce,
        ) as network,
        open_control_socket(config.daemon) as listener,
        trio.open_nursery() as nursery,
    ):
        directory = Directory(network)
        costs = await trio.to_thread.run_sync(_measure_codecs, config)
        router = Router(network, directory, config.route, codecs=MessageCodecs(network, costs))
        models = LocalModels(
            config.route.models,
            dtype=parse_dtype(config.route.dtype, parse_device("cpu")),
            executor=local_executor,
        )
        part: ServingPart | None = None
        if config.serve.is_wanted:
            part = ServingPart(
                config.serve,
                config.lend,
                state_dir=config.daemon.state_dir,
                network=network,
                directory=directory,
                router=router,
                codecs=MessageCodecs(network, costs, preferred=config.serve.codec),
                executor=device_executor,
                speeds=SpeedCache(config.daemon.state_dir),
                rng=random.Random(),
            )
            await nursery.start(part.run)
        for name in config.route.models:
            await models.load(name)
            nursery.start_soon(router.keep_fresh, await models.identify(name))
        reporter = Reporter(config, network=network, router=router, models=models, part=part)

        folders = AdapterFolders()

        async def make_generation(request: Generate, send: Send) -> GenerationJob:
            started_at = trio.current_time()
            model = await models.load(request.model)
            adapter = await folders.find(request.adapter, model.identity)
            return GenerationJob(
                request,
                model,
                router=router,
                executor=local_executor,
                send=send,
                started_at=started_at,
                max_wait_s=(
                    config.route.max_wait_s if request.max_wait_s is None else request.max_wait_s
                ),
                adapter=adapter,
            )

        async def pause_or_resume(request: Pause | Resume) -> Paused | Resumed:
            if part is None:
                raise BadRequest("this daemon serves no blocks; there is nothing to pause")
            if isinstance(request, Pause):
                return await part.lender.pause(request)
            return await part.lender.resume(request)

        links = PassLinks(network)
        await nursery.start(links.run)
        jobs = Jobs(
            hidden=HiddenSessions(models, router, max_wait_s=config.route.max_wait_s),
            training=TrainingJobs(models, router, links, max_wait_s=config.route.max_wait_s),
            pause_or_resume=pause_or_resume,
            report_status=reporter.report_status,
            report_swarm=reporter.report_swarm,
            make_generation=make_generation,
        )
        reporter.jobs = jobs
        nursery.start_soon(serve_control, listener, jobs)
        # What start-up made stays for good: the collector need not walk it, which takes it tens
        # of milliseconds in the middle of a step.
        gc.collect()
        gc.freeze()
        ready.set()
        notify_ready()
        log.info(
            "ready",
            peer=network.peer,
            roles=",".join(reporter.roles),
            listen=",".join(network.addresses),
            socket=str(config.daemon.socket),
        )
        await stop.wait()
        notify_stopping()
        log.info("stopping")
        if part is not None:
            await part.stop(deadline_s=config.daemon.stop_timeout_s)
        nursery.cancel_scope.cancel()


async def _watch_signals(
    ready: trio.Event,
    stop: trio.Event,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(*SIGNALS) as signals:
        task_status.started()
        async for _ in signals:
            if stop.is_set() or not ready.is_set():
                scope.cancel()
            stop.set()


@asynccontextmanager
async def _open_executors(config: Config) -> AsyncIterator[tuple[Executor, Executor]]:
    """The serving device's executor and that of the local CPU work; one, where both are the CPU."""
    import torch

    threads = config.serve.threads or config.route.threads
    device = parse_device(config.serve.device)
    # On a CPU, what is launched has been done; a GPU goes on by itself.
    synchronise = partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing
    async with open_executor(
        name=device.type, share=config.lend.device_share, synchronise=synchronise
    ) as device_executor:
        if threads:
            await device_executor.run(torch.set_num_threads, threads)
        if device.type == "cpu":
            yield device_executor, device_executor
            return
        async with open_executor(name="cpu") as local_executor:
            yield device_executor, local_executor


def _nothing() -> None:
    pass
