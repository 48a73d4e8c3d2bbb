"""The serving part of a daemon: from the choice of a model to its end, and to the next choice.

What it does for one model is one *tenure*: a span is loaded and served, moved by the swarm's need,
lent by its owner's, until the daemon stops, or another model of `[serve] models` needs the server
more, or its owner the memory. Then it leaves the swarm as for good, and joins the other one, or
waits until it may come back. Invariant: of two tenures the first has freed its blocks before the
next one loads any.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from kernels.errors import CorruptCheckpoint, KernelError, UnsupportedModel
from p2p.directory import Directory
from p2p.errors import P2PError
from p2p.network import Network
from petald.announcer import Announcer
from petald.config import LendConfig, ServeConfig
from petald.devices import give_memory_back, parse_device
from petald.errors import ConfigError, PetaldError, forget_frames
from petald.executor import Executor
from petald.joining import Joining
from petald.lender import Lender
from petald.lending import NEVER
from petald.log import get_logger
from petald.message_codecs import MessageCodecs
from petald.model_choice import ChoiceSettings, ModelChoice
from petald.owner_load import Meter, open_meter
from petald.router import MEASURE_PERIOD_S, Router
from petald.serving import VERSION, Serving
from petald.span_choice import ModelOffer, choose_span
from petald.speed_cache import SpeedCache
from petald.start_serving import (
    Candidate,
    Started,
    check_can_serve,
    choose_one,
    load_serving,
    read_candidates,
)
from petald.swarm import Claim

log = get_logger(__name__)

FIRST_MEASURE_S = 5.0
"""A server's first round, by chance within this: those that start together know each other then."""

BROKEN_S = 3600.0
"""A model that could not be loaded, though nothing is wrong with it, is not tried again before:
each try ends the sessions that there are."""

RETRY_S = 60.0
"""Where the model that was served cannot be loaded again either: memory may be short for a time."""

CHANGE_DEADLINE_S = 120.0
"""For sessions to move when the model is changed: see `petald.serving.MOVE_DEADLINE_S`."""


@dataclass(frozen=True, eq=False, slots=True)
class _Tenure:
    """What goes on while one model is served.

    Attributes:
        nursery: of all that ends with it.
        ended: when that has.
    """

    started: Started
    nursery: trio.Nursery
    ended: trio.Event

    @property
    def span(self) -> tuple[int, int]:
        """That is served now."""
        span = self.started.serving.hosting.span
        return span.start, span.end


class _Change:
    """Another model that is about to be served, as its swarm is told."""

    def __init__(self, joining: Joining, announcer: Announcer) -> None:
        self._joining = joining
        self._announcer = announcer
        self._scope = trio.CancelScope()

    async def tell(self) -> None:
        """Keeps the claim in the directory."""
        with self._scope:
            await self._announcer.run()

    def stop_telling(self) -> None:
        """What was told holds until it expires."""
        self._scope.cancel()

    async def give_up(self) -> None:
        """Takes the claim back."""
        self._scope.cancel()
        self._joining.give_up()
        await self._announcer.withdraw()


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
        lender: decides whether anything is served now.
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
        self._network = network
        self._directory = directory
        self._router = router
        self.codecs = codecs
        self._executor = executor
        self._speeds = speeds
        self._rng = rng
        self._settings = settings or ChoiceSettings()
        self._tenure: _Tenure | None = None
        self._change: _Change | None = None
        self._has_started = False
        self._is_stopping = False
        self._model = ""
        self._fall_back = ""
        self._broken_until: dict[str, float] = {}
        self._nursery: trio.Nursery
        self.lender = Lender(lend, meter=self._open_meter(lend), state_dir=state_dir)
        self.changes = 0

    @property
    def serving(self) -> Serving | None:
        """What is served now; none between two models, and while the memory is the owner's."""
        return None if self._tenure is None else self._tenure.started.serving

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves for ever; started when sessions are taken, or it is known that they can be later.

        Raises:
            ConfigError, KernelError: nothing can be served; see `load_serving`.
        """
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self.lender.run)
            model = ""
            while True:
                if not self.lender.decision.lends:
                    if not self._has_started:
                        await check_can_serve(self._config, self._executor, self._speeds)
                        self._has_started = True
                        task_status.started()
                    # Nobody knows what is needed when it comes back.
                    await self._give_up_change()
                    model = ""
                    await self.lender.wait_lends()
                tenure = await self._start(self._config_for(model), self._nursery)
                if tenure is None:  # and so nothing is served now
                    model = self._fall_back
                    continue
                if not self._has_started:
                    self._has_started = True
                    task_status.started()
                model = await self._serve(tenure)
                del tenure

    async def stop(self, *, deadline_s: float) -> None:
        """Leaves the swarm: refuses sessions, says so, and waits for those there are to move."""
        self._is_stopping = True
        self.lender.end()
        await self._give_up_change()
        if self._tenure is None:
            return
        serving = self._tenure.started.serving
        serving.server.stop_accepting()
        await self._tenure.started.announcer.withdraw()
        await serving.drain(deadline_s=deadline_s)

    async def _start(self, config: ServeConfig, nursery: trio.Nursery) -> _Tenure | None:
        """Loads one model, and serves it; none where that failed, or the owner wants the device."""
        tenure_nursery, ended = await nursery.start(_hold_nursery)
        started: Started | None = None
        failure: Exception | None = None
        self._fall_back = ""
        try:
            with self.lender.while_lending():
                config = await choose_one(
                    config,
                    peer=self._network.peer,
                    router=self._router,
                    executor=self._executor,
                    speeds=self._speeds,
                    rng=self._rng,
                )
                started = await load_serving(
                    config,
                    network=self._network,
                    directory=self._directory,
                    router=self._router,
                    codecs=self.codecs,
                    executor=self._executor,
                    speeds=self._speeds,
                    rng=self._rng,
                    nursery=tenure_nursery,
                )
        except (KernelError, P2PError, PetaldError) as error:
            failure = error
        if started is None:
            tenure_nursery.cancel_scope.cancel()
            await ended.wait()
            if failure is not None and not self._has_started:
                raise failure
            forget_frames(failure)  # they hold what was loaded
            await self._give_memory_back()
            if failure is None:
                await self._give_up_change()
            else:
                await self._note_failure(config.model, failure)
            return None
        self.lender.attach(started.serving, started.announcer)
        self._tenure = tenure = _Tenure(started, tenure_nursery, ended)
        # All that goes on in it is begun at once: it is closed soon when this is cancelled.
        tenure_nursery.start_soon(self._keep_measuring, started)
        await started.begin(tenure_nursery)
        self._change = None  # it is made
        self._broken_until.pop(config.model, None)
        name = started.serving.identity.name
        self.changes += self._model not in ("", name)
        self._model = name
        return tenure

    async def _note_failure(self, model: str, error: Exception) -> None:
        """A model could not be loaded: where there are others, it is not tried again soon."""
        is_broken = bool(model) and isinstance(error, KernelError | ConfigError)
        if is_broken:
            is_for_good = isinstance(error, CorruptCheckpoint | UnsupportedModel)
            now = trio.current_time()
            self._broken_until[model] = math.inf if is_for_good else now + BROKEN_S
        if self._change is not None:
            log.warning("model not changed", model=model, reason=str(error))
            await self._give_up_change()
            self._fall_back = self._model
            return
        log.error("nothing is served", model=model, reason=str(error))
        if not (is_broken and self._unbroken):
            with trio.move_on_after(RETRY_S):
                await self.lender.wait_yields()

    async def _serve(self, tenure: _Tenure) -> str:
        """Serves one model until it is left; gives the next one, or "" for the configured ones."""
        model = await self._wait_to_leave(tenure)
        tenure.started.serving.server.leave_for_good()
        if tenure.started.mover is not None:
            await tenure.started.mover.settle()
        await tenure.started.serving.end(deadline_s=CHANGE_DEADLINE_S if model else 0.0)
        if self._is_stopping:
            await trio.sleep_forever()
        self.lender.detach()
        self._tenure = None
        tenure.nursery.cancel_scope.cancel()
        await tenure.ended.wait()
        await self._give_memory_back()
        if model:
            log.info("changing the model", model=model)
            if self._change is not None:
                self._change.stop_telling()  # the loading tells of its own claim
        else:
            log.info("memory freed")
        return model

    async def _wait_to_leave(self, tenure: _Tenure) -> str:
        """Until another model is to be served, which it gives, or ``""`` when memory is wanted.

        The latter too where the blocks were lost in a move.
        """
        model = ""
        async with trio.open_nursery() as nursery:

            async def end_with(wait: Callable[[], Awaitable[None]]) -> None:
                await wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_with, self.lender.wait_to_free)
            nursery.start_soon(end_with, tenure.started.serving.lost.wait)
            model = await self._wait_for_change(tenure)
            nursery.cancel_scope.cancel()
        if not model:
            await self._give_up_change()
        return model

    async def _give_up_change(self) -> None:
        """Whoever is told of a claim on another model is told that it is off."""
        if self._change is not None:
            await self._change.give_up()
            self._change = None

    async def _give_memory_back(self) -> None:
        """To the system, whatever was loaded, once nothing holds on to it."""
        device = parse_device(self._config.device)
        await self._executor.run(give_memory_back, device)

    def _config_for(self, model: str) -> ServeConfig:
        """For one model, or else for all that are worth a try."""
        if model:
            return replace(self._config, model=model, models=())
        return replace(self._config, models=self._unbroken or self._config.models)

    @property
    def _unbroken(self) -> tuple[str, ...]:
        """Of several models, those that did not fail to load lately."""
        now = trio.current_time()
        return tuple(
            name for name in self._config.models if self._broken_until.get(name, 0.0) <= now
        )

    def _open_meter(self, lend: LendConfig) -> Meter | None:
        if lend.max_load >= NEVER:
            return None
        device = parse_device(self._config.device)
        return open_meter(device, read_own_s=lambda: self._executor.computed_s)

    async def _keep_measuring(self, started: Started) -> None:
        await trio.sleep(self._rng.uniform(0, FIRST_MEASURE_S))
        while True:
            started.serving.note_speed()
            try:
                await started.serving.measure_next_hops(self._router, self._rng)
            except (P2PError, PetaldError) as error:
                log.debug("next hops not measured", reason=str(error))
            started.announcer.announce_soon()
            await trio.sleep(MEASURE_PERIOD_S * self._rng.uniform(0.8, 1.2))

    # Another model.

    async def _wait_for_change(self, tenure: _Tenure) -> str:
        """Until another model is to be served: all its swarm knows of it, and nobody is missed."""
        if len(self._config.models) < 2:
            await trio.sleep_forever()
        name = tenure.started.serving.identity.name
        choice = ModelChoice(name, settings=self._settings, now=trio.current_time(), rng=self._rng)
        while True:
            await trio.sleep_until(choice.next_deadline())
            if not self._is_free(tenure):
                choice.on_stayed(trio.current_time())
                continue
            now = trio.current_time()
            found = await self._read_candidates(tenure)
            if name not in found:
                choice.on_stayed(now)
                continue
            model = choice.on_look(tenure.span, offers_of(found), now)
            if model is None:
                continue
            if not self._is_free(tenure):  # since the reading began
                choice.on_stayed(trio.current_time())
                continue
            if await self._tell_change(tenure, choice, found[model]):
                return model
            choice.on_stayed(trio.current_time())

    def _is_free(self, tenure: _Tenure) -> bool:
        """Whether nothing else is going on: no move, no pause, no end."""
        mover = tenure.started.mover
        is_moving = mover is not None and mover.is_moving
        return not is_moving and self.lender.decision.lends and not self._is_stopping

    async def _tell_change(
        self, tenure: _Tenure, choice: ModelChoice[str], candidate: Candidate
    ) -> bool:
        """Tells both swarms of the change, and looks once more when all can know of it.

        Of several servers that would leave the same blocks all see that the others are about to,
        and stay; of several that would come to one model the later ones do. Sessions go on
        meanwhile; only new ones are refused.
        """
        server = tenure.started.serving.server
        offer = candidate.offer
        joining = Joining(
            candidate.loader.describe(VERSION, self._network.addresses[:16], offer.capacity)
        )
        claim = joining.claim_span(*choose_span(offer.load, offer.capacity, rng=self._rng))
        announcer = Announcer(self._directory, joining.make_announcement, rng=self._rng)
        self._change = change = _Change(joining, announcer)
        log.info("about to change the model", model=candidate.identity.name)
        server.stop_accepting()
        is_told = await tenure.started.announcer.publish() > 0
        if is_told:
            self._nursery.start_soon(change.tell)
            await trio.sleep(self._settings.known_s)
            is_told = not server.is_accepting and self._is_free(tenure)
        if is_told and await self._is_still_better(tenure, choice, candidate, claim):
            return True
        log.info("the model is kept", model=tenure.started.serving.identity.name)
        await self._give_up_change()
        if self.lender.decision.lends and not self._is_stopping:
            server.accept_again()
            await tenure.started.announcer.publish()
        return False

    async def _is_still_better(
        self, tenure: _Tenure, choice: ModelChoice[str], candidate: Candidate, claim: Claim
    ) -> bool:
        """Whether a change is as good as it was, with all that others claimed before it."""
        now = trio.current_time()
        own, model = tenure.started.serving.identity.name, candidate.identity.name
        found = await self._read_candidates(tenure)
        if own not in found or model not in found:
            return False
        load = found[model].offer.load
        if not load.num_servers and candidate.offer.load.num_servers:
            return False  # nobody is there any more, or nobody could be asked
        load = load.without_claims_after(claim.made_at_ms, self._network.peer)
        offers = offers_of(found)
        offers = {own: offers[own], model: replace(offers[model], load=load)}
        if choice.find_better(tenure.span, offers, now) != model:
            return False
        return await self._are_alive(tenure)

    async def _are_alive(self, tenure: _Tenure) -> bool:
        """Whether those answer who will be alone on blocks: a view has the dead for a while."""
        start, end = tenure.span
        view = await self._router.read_view(tenure.started.serving.identity, max_age_s=0.0)
        staying = [
            one
            for one in view.servers
            if one.is_serving and one.peer != self._network.peer and one.announcement.claim is None
        ]
        alone = {
            holders[0].peer
            for block in range(start, end)
            if len(holders := [one for one in staying if one.start <= block < one.end]) == 1
        }
        return await self._router.ping_all(alone) == alone

    async def _read_candidates(self, tenure: _Tenure) -> dict[str, Candidate]:
        try:
            return await read_candidates(
                replace(
                    self._config,
                    models=tuple(
                        name
                        for name in self._config.models
                        if name == self._model or name in self._unbroken
                    ),
                ),
                peer=self._network.peer,
                router=self._router,
                executor=self._executor,
                speeds=self._speeds,
                freed_bytes=tenure.started.serving.memory_bytes,
            )
        except (P2PError, PetaldError, KernelError) as error:
            log.debug("the other models cannot be judged", reason=str(error))
            return {}


def offers_of(candidates: Mapping[str, Candidate]) -> dict[str, ModelOffer]:
    """What is weighed of each."""
    return {name: candidate.offer for name, candidate in candidates.items()}


async def _hold_nursery(
    *,
    task_status: trio.TaskStatus[tuple[trio.Nursery, trio.Event]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """A nursery of its own, until it is cancelled, and the event that it has ended."""
    ended = trio.Event()
    try:
        async with trio.open_nursery() as nursery:
            task_status.started((nursery, ended))
            await trio.sleep_forever()
    finally:
        ended.set()
