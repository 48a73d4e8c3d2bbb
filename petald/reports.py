"""What the daemon tells of itself and of the swarm, on the control socket."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections import Counter

import trio

from p2p.network import Network
from p2p.wire.control_messages import (
    CodecCount,
    ModelSwarm,
    PauseStatus,
    PeerStatus,
    ServerStatus,
    SpanStatus,
    StatusReport,
    SwarmReport,
    SwarmRequest,
)
from petald.config import Config
from petald.control import Jobs
from petald.devices import dtype_name
from petald.local_model import LocalModels, ModelIdentity
from petald.router import Router
from petald.serving import Serving
from petald.serving_part import ServingPart
from petald.swarm import Server, ServerState

VERSION = importlib.metadata.version("petald")

MAX_RATE = 1 << 50
"""Bytes a second that are told at most: a loopback's answers may come at one moment."""


class Reporter:
    """Answers the status and swarm jobs.

    Attributes:
        jobs: set once the control socket's jobs are made; their number is reported.
    """

    jobs: Jobs | None = None

    def __init__(
        self,
        config: Config,
        *,
        network: Network,
        router: Router,
        models: LocalModels,
        part: ServingPart | None,
    ) -> None:
        self._config = config
        self._network = network
        self._router = router
        self._models = models
        self._part = part
        self._started_at = trio.current_time()

    @property
    def roles(self) -> tuple[str, ...]:
        """Which of the three things this daemon does."""
        roles = []
        if self._part is not None:
            roles.append("serve")
        if self._config.route.models:
            roles.append("route")
        return tuple(roles) or ("anchor",)

    async def report_status(self, job: int) -> StatusReport:
        """The daemon, its span, its peers."""
        return StatusReport(
            job=job,
            version=VERSION,
            peer=self._network.peer,
            addresses=self._network.addresses[:16],
            pid=os.getpid(),
            uptime_s=trio.current_time() - self._started_at,
            roles=self.roles,
            models=self._models.loaded_names,
            peers=tuple(
                PeerStatus(
                    peer=peer.peer,
                    addresses=peer.addresses[:16],
                    round_trip_s=self._network.round_trip_s(peer.peer),
                    bytes_per_s=_whole(self._network.bytes_per_s(peer.peer)),
                )
                for peer in self._network.connected_peers()[:4096]
            ),
            jobs=self.jobs.running if self.jobs else 0,
            span=self._span_status(),
            pause=self._pause_status(),
            sent=self._sent(),
        )

    def _span_status(self) -> SpanStatus | None:
        if self._part is None or self._part.serving is None:
            return None
        status = _span_status(self._part.serving)
        is_paused = not self._part.lender.decision.lends
        return dataclasses.replace(status, state="paused") if is_paused else status

    def _pause_status(self) -> PauseStatus | None:
        if self._part is None or self._part.lender.decision.lends:
            return None
        decision = self._part.lender.decision
        return PauseStatus(why=decision.text, ends_in_s=decision.ends_in_s)

    def _sent(self) -> tuple[CodecCount, ...]:
        sent = Counter(self._router.codecs.sent)
        if self._part is not None:
            sent += self._part.codecs.sent
        return tuple(CodecCount(codec=codec, messages=count) for codec, count in sent.most_common())

    async def report_swarm(self, request: SwarmRequest) -> SwarmReport:
        """The swarm view of one model, or of all that are known here.

        Raises:
            UnknownModel, KernelError: the one asked for is not here.
        """
        if request.model:
            identities = [await self._models.identify(request.model)]
        else:
            serve = self._config.serve
            served = (serve.model,) if serve.model else serve.models
            identities = await self._models.known(*served)
        models = [await self._report_model(identity) for identity in identities[:256]]
        return SwarmReport(job=request.job, models=tuple(models))

    async def _report_model(self, identity: ModelIdentity) -> ModelSwarm:
        await self._router.measure_round_trips(identity)
        own = view = await self._router.read_view(identity, max_age_s=0.0)
        if own.share < 1:
            view = await self._router.read_view(identity, max_age_s=0.0, whole=True)
        servers = sorted(view.servers, key=lambda server: (server.start, server.end, server.peer))
        return ModelSwarm(
            model=identity.name,
            fingerprint=identity.fingerprint.hex(),
            blocks=view.num_blocks,
            coverage=view.coverage(),
            servers=tuple(_server_status(server) for server in servers[:65536]),
            share=own.share,
        )


def _server_status(server: Server) -> ServerStatus:
    said = server.announcement
    return ServerStatus(
        peer=server.peer,
        start=said.start,
        end=said.end,
        state=said.state,
        dtype=said.dtype,
        quant=said.quant,
        codec=said.codec,
        steps_per_s=1e3 / server.step_ms if server.step_ms > 0 else 0.0,
        free_cache_tokens=said.free_cache_tokens,
        cache_tokens=said.cache_tokens,
        round_trip_s=server.round_trip_s,
        adapters=said.adapters,
    )


def _whole(rate: float | None) -> int | None:
    return None if rate is None else min(round(rate), MAX_RATE)


_STATES = {
    ServerState.LOADING: "moving",
    ServerState.SERVING: "serving",
    ServerState.LEAVING: "draining",
}


def _span_status(serving: Serving) -> SpanStatus:
    hosted = serving.hosting.hosted
    span, arena = hosted.span, hosted.arena
    return SpanStatus(
        model=serving.identity.name,
        fingerprint=serving.identity.fingerprint.hex(),
        start=span.start,
        end=span.end,
        state=_STATES[serving.state],
        quant=serving.quant,
        dtype=dtype_name(span.dtype),
        device=str(span.device),
        weight_bytes=span.weight_bytes,
        cache_tokens=arena.capacity_tokens,
        free_cache_tokens=arena.free_tokens,
        sessions=serving.server.sessions,
        decode_steps=hosted.decode_steps,
        prefill_steps=hosted.prefill_steps,
    )
