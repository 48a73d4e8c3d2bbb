"""The serving part of a daemon: from the choice of a model to its end, and to the next choice.

What it does for one model is one *tenure*: a span is loaded and served, moved by the swarm's need,
lent by its owner's, until the daemon stops or another model of `[serve] models` needs the server
more. Then it leaves the one swarm as for good, and joins the other. Invariant: of two tenures the
first has freed its blocks before the next one loads any.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import trio

from kernels.errors import KernelError
from p2p.directory import Directory
from p2p.errors import P2PError
from p2p.network import Network
from petald.announcer import Announcer
from petald.config import LendConfig, ServeConfig
from petald.devices import parse_device
from petald.errors import ConfigError, PetaldError
from petald.executor import Executor
from petald.joining import Joining
from petald.lender import Lender
from petald.lending import NEVER
from petald.log import get_logger
from petald.message_codecs import MessageCodecs
from petald.model_choice import ChoiceSettings, ModelChoice, can_leave
from petald.owner_load import open_meter
from petald.router import MEASURE_PERIOD_S, Router
from petald.serving import VERSION, Serving
from petald.span_choice import choose_span
from petald.speed_cache import SpeedCache
from petald.start_serving import Candidate, Started, load_serving, read_candidates

log = get_logger(__name__)

FIRST_MEASURE_S = 5.0
"""A server's first round, by chance within this: those that start together know each other then."""

CHANGE_DEADLINE_S = 120.0
"""For sessions to move when the model is changed: see `petald.serving.MOVE_DEADLINE_S`."""


class ServingPart:
    """Serves, until cancelled; see the module.

    Args:
        serve: what to serve, and how.
        lend: when.
        state_dir: where the owner's pause is kept.
        network: to be served on.
        directory: where the server is announced.
        router: reads the swarms' views.
        codecs: of its answers.
        executor: the device's thread.
        speeds: that were measured before.
        rng: of choices among equals, and of delays.
        settings: how other models are weighed.

    Attributes:
        codecs: encode what is sent.
        serving: what is served now; none between two models.
        lender: of it.
        changes: how often another model was taken.
    """

    def __init__(
        self,
        serve: ServeConfig,
        lend: LendConfig,
        *,
        state_dir: Path,
        network: Network,
        directory: Directory,
        router: Router,
        codecs: MessageCodecs,
        executor: Executor,
        speeds: SpeedCache,
        rng: random.Random,
        settings: ChoiceSettings | None = None,
    ) -> None:
        self._config = serve
        self._lend = lend
        self._state_dir = state_dir
        self._network = network
        self._directory = directory
        self._router = router
        self.codecs = codecs
        self._executor = executor
        self._speeds = speeds
        self._rng = rng
        self._settings = settings or ChoiceSettings()
        self._started: Started | None = None
        self._serves = trio.Event()
        self._is_stopping = False
        self._model = ""
        self._broken: set[str] = set()
        self.serving: Serving | None = None
        self.lender: Lender | None = None
        self.changes = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves for ever; started when sessions are taken.

        Raises:
            ConfigError, KernelError: nothing can be served; see `load_serving`.
        """
        model = await self._serve(self._config, task_status.started)
        while True:
            config = replace(self._config, model=model, models=())
            model = await self._serve(config, lambda: None)

    async def wait_lender(self) -> Lender:
        """The lender, as soon as there is one: not between two models."""
        while self.lender is None:
            await self._serves.wait()
        return self.lender

    async def _serve(self, config: ServeConfig, on_serving: Callable[[], None]) -> str:
        """Serves one model; gives the next one, when this is left or cannot be loaded."""
        async with trio.open_nursery() as nursery:
            try:
                started = await load_serving(
                    config,
                    network=self._network,
                    directory=self._directory,
                    router=self._router,
                    codecs=self.codecs,
                    executor=self._executor,
                    speeds=self._speeds,
                    rng=self._rng,
                    nursery=nursery,
                )
            except (ConfigError, KernelError) as error:
                if self._model in ("", config.model):
                    raise
                log.warning("model not changed", model=config.model, reason=str(error))
                self._broken.add(config.model)
                nursery.cancel_scope.cancel()
                return self._model
            lender = self._make_lender(started)
            await nursery.start(lender.run)
            await started.begin(nursery)
            nursery.start_soon(self._keep_measuring_next_hops, started)
            self._started, self.serving, self.lender = started, started.serving, lender
            self.changes += self._model not in ("", self.serving.identity.name)
            self._model = self.serving.identity.name
            self._serves.set()
            on_serving()
            model = await self._wait_for_change(started, lender)
            lender.end()
            self.serving = self.lender = None
            self._serves = trio.Event()
            await started.serving.end(deadline_s=CHANGE_DEADLINE_S)
            self._started = None
            nursery.cancel_scope.cancel()
        return model

    async def stop(self, *, deadline_s: float) -> None:
        """Leaves the swarm: refuses sessions, says so, and waits for those there are to move."""
        self._is_stopping = True
        if self._started is None:
            return
        if self.lender is not None:
            self.lender.end()
        self._started.serving.server.stop_accepting()
        await self._started.announcer.withdraw()
        await self._started.serving.drain(deadline_s=deadline_s)

    def _make_lender(self, started: Started) -> Lender:
        lend = self._lend
        device = parse_device(self._config.device)
        meter = None
        if lend.max_load < NEVER:
            meter = open_meter(device, read_own_s=lambda: self._executor.computed_s)
        return Lender(
            lend,
            started.serving,
            started.announcer,
            meter=meter,
            state_dir=self._state_dir,
        )

    async def _keep_measuring_next_hops(self, started: Started) -> None:
        await trio.sleep(self._rng.uniform(0, FIRST_MEASURE_S))
        while True:
            await started.serving.measure_next_hops(self._router, self._rng)
            started.announcer.announce_soon()
            await trio.sleep(MEASURE_PERIOD_S * self._rng.uniform(0.8, 1.2))

    # Another model.

    async def _wait_for_change(self, started: Started, lender: Lender) -> str:
        """Until another model is to be served: all its swarm knows of it, and nobody is missed."""
        if len(self._config.models) < 2:
            await trio.sleep_forever()
        identity = started.serving.identity
        choice = ModelChoice(
            identity.name,
            settings=self._settings,
            now=trio.current_time(),
            rng=self._rng,
        )
        while True:
            await trio.sleep_until(choice.next_deadline())
            if not self._is_free(started, lender):
                choice.on_stayed(trio.current_time())
                continue
            now = trio.current_time()
            found = await self._read_candidates(started)
            offers = {name: candidate.offer for name, candidate in found.items()}
            if identity.name not in offers:
                choice.on_stayed(now)
                continue
            model = choice.on_look(self._span(started), offers, now)
            if model is None:
                continue
            if await self._announce_change(started, lender, found[model]):
                return model
            choice.on_stayed(trio.current_time())

    def _is_free(self, started: Started, lender: Lender) -> bool:
        """Whether nothing else is going on: no move, no pause, no end."""
        is_moving = started.mover is not None and started.mover.is_moving
        return not is_moving and lender.decision.lends and not self._is_stopping

    def _span(self, started: Started) -> tuple[int, int]:
        span = started.serving.hosting.span
        return span.start, span.end

    async def _announce_change(
        self, started: Started, lender: Lender, candidate: Candidate
    ) -> bool:
        """Tells both swarms of the change, and looks once more when all can know of it.

        Of several servers that would leave the same blocks all see that the others are about to,
        and stay. Sessions go on meanwhile; only new ones are refused.
        """
        server = started.serving.server
        offer = candidate.offer
        joining = Joining(candidate.loader.describe(VERSION, self._network.addresses[:16]))
        joining.claim_span(*choose_span(offer.load, offer.capacity, rng=self._rng))
        claimer = Announcer(self._directory, joining.make_announcement, rng=self._rng)
        log.info("about to change the model", model=candidate.identity.name)
        server.stop_accepting()
        await started.announcer.withdraw()
        with trio.move_on_after(self._settings.known_s):
            await claimer.run()
        found = await self._read_candidates(started)
        own = found.get(started.serving.identity.name)
        is_sure = not server.is_accepting and self._is_free(started, lender)
        if is_sure and own is not None and can_leave(own.offer, self._span(started)):
            return True
        log.info("the model is kept", reason="its blocks would have nobody, or the owner came")
        joining.give_up()
        await claimer.withdraw()
        if lender.decision.lends and not self._is_stopping:
            server.accept_again()
            await started.announcer.publish()
        return False

    async def _read_candidates(self, started: Started) -> dict[str, Candidate]:
        models = tuple(name for name in self._config.models if name not in self._broken)
        try:
            return await read_candidates(
                replace(self._config, models=models),
                peer=self._network.peer,
                router=self._router,
                executor=self._executor,
                speeds=self._speeds,
                freed_bytes=started.serving.memory_bytes,
            )
        except (P2PError, PetaldError, KernelError) as error:
            log.debug("the other models cannot be judged", reason=str(error))
            return {}
