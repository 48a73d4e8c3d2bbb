"""Carries out what `petald.lending` decides: the server makes way for its owner, or is back.

To make way is to leave the swarm as for good: no new sessions, others are told, and the sessions
move, with their caches where that is quicker. What has not moved when its time is over is ended;
its client has all that is needed to rebuild it, here too when this server comes back. Then the
memory is the owner's, too: whoever runs the server is told to free its blocks, at once where a
pause or the hours are the reason, and after a while where it is a load, which comes and goes. The
daemon goes on routing for its own apps. Invariant: a server that is attached takes sessions exactly
while the last decision was to lend.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import trio

from p2p.wire.control_messages import Pause as PauseRequest
from p2p.wire.control_messages import Paused, Resume, Resumed
from petald.announcer import Announcer
from petald.config import LendConfig
from petald.errors import BadRequest
from petald.lending import LEND, Decision, Lending, Pause, Why
from petald.log import get_logger
from petald.notify import notify_status
from petald.owner_load import Meter
from petald.serving import Serving

log = get_logger(__name__)

PAUSE_FILE = "pause.json"
"""In the state folder: the owner's pause outlives the daemon."""

LOOK_S = 0.05
"""Between two looks whether the last session is gone."""


@dataclass(eq=False, slots=True)
class _Leaving:
    """One time that the server makes way.

    Attributes:
        scope: round what moves the sessions.
        has_settled: when none is in use any more.
        left: how many did not move until then.
    """

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    has_settled: trio.Event = field(default_factory=trio.Event)
    left: int = 0


class Lender:
    """Makes servers come and go: the one that is attached, and none before and after.

    Args:
        config: when to lend.
        meter: what others use of the device; none where that is not to be looked at.
        state_dir: where the owner's pause is kept.
        wall_clock: seconds since the epoch.

    Attributes:
        decision: what is so now.
        times_left: how often it made way.
        times_returned: how often it came back.
    """

    def __init__(
        self,
        config: LendConfig,
        *,
        meter: Meter | None,
        state_dir: Path,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._meter = meter
        self._pause_file = state_dir / PAUSE_FILE
        self._wall_clock = wall_clock
        self._lending = Lending(config, load_pause(self._pause_file, wall_clock()))
        self._scope = trio.CancelScope()
        self._leaving = _Leaving()
        self._loading: set[trio.CancelScope] = set()
        self._changed = trio.Event()
        self._lends = trio.Event()
        self._yields = trio.Event()
        self._to_free = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._serving: Serving | None = None
        self._announcer: Announcer | None = None
        self.decision: Decision = LEND
        self.times_left = 0
        self.times_returned = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Decides until `end`; started once it is decided whether to begin with lending."""
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    self._lends.set()
                    self._follow(self._decide())
                    task_status.started()
                    await self._keep_deciding()
        finally:
            self.end()

    async def _keep_deciding(self) -> None:
        sampled_at = trio.current_time()
        while True:
            await self._wait(sampled_at)
            now = trio.current_time()
            if self._meter is not None and now >= sampled_at + self._lending.sample_s:
                load = await self._meter.read()
                # A GPU that is busy with what is loaded may look like one that others use.
                self._lending.on_sample(None if self._loading else load, now - sampled_at)
                sampled_at = now
            self._follow(self._decide())

    def end(self) -> None:
        """Leaves the server to whoever stops the daemon."""
        self._scope.cancel()

    def attach(self, serving: Serving, announcer: Announcer) -> None:
        """A server is there; it follows what is decided from now on.

        Args:
            serving: the server.
            announcer: says that it leaves, and that it is back.
        """
        self._serving, self._announcer = serving, announcer
        self._to_free = trio.Event()
        if not self.decision.lends:
            self._make_way()

    def detach(self) -> None:
        """The server is about to be gone."""
        self._leaving.scope.cancel()
        self._serving = self._announcer = None

    @contextmanager
    def while_lending(self) -> Iterator[trio.CancelScope]:
        """A scope that is cancelled as soon as nothing is to be lent."""
        with trio.CancelScope() as scope:
            self._loading.add(scope)
            try:
                if not self.decision.lends:
                    scope.cancel()
                yield scope
            finally:
                self._loading.discard(scope)

    async def wait_lends(self) -> None:
        """Until something is to be lent."""
        await self._lends.wait()

    async def wait_yields(self) -> None:
        """Until nothing is."""
        await self._yields.wait()

    async def wait_to_free(self) -> None:
        """Until the memory of the server that is attached is the owner's."""
        await self._to_free.wait()

    async def pause(self, request: PauseRequest) -> Paused:
        """The owner's pause; returns when no session is in use any more, or none is left.

        Raises:
            BadRequest: the daemon is stopping.
        """
        if self._scope.cancel_called:
            raise BadRequest("this daemon is stopping; its sessions move already")
        serving = self._serving
        before = 0 if serving is None else serving.server.sessions
        until = None if request.for_s is None else self._wall_clock() + request.for_s
        self._lending.on_pause(until)
        save_pause(self._pause_file, self._lending.pause)
        self._follow(self._decide())
        self._changed.set()
        if serving is None:
            await trio.lowlevel.checkpoint()
            return Paused(job=request.job, sessions=0, left=0)
        within_s = self._config.yield_within_s if request.within_s is None else request.within_s
        leaving = self._leave(within_s)
        await leaving.has_settled.wait()
        return Paused(job=request.job, sessions=max(before, leaving.left), left=leaving.left)

    async def resume(self, request: Resume) -> Resumed:
        """The end of the owner's pause."""
        await trio.lowlevel.checkpoint()
        self._lending.on_resume()
        save_pause(self._pause_file, None)
        if not self._scope.cancel_called:
            self._follow(self._decide())
            self._changed.set()
        return Resumed(
            job=request.job,
            paused_why=self.decision.text,
            is_loading=self._is_lost and self.decision.lends,
        )

    @property
    def _is_lost(self) -> bool:
        """Whether there is no server, or none any more in a moment."""
        serving = self._serving
        return serving is None or serving.server.is_leaving_for_good or self._to_free.is_set()

    def _decide(self) -> Decision:
        return self._lending.decide(datetime.fromtimestamp(self._wall_clock(), UTC).astimezone())

    async def _wait(self, sampled_at: float) -> None:
        """Until something may be otherwise."""
        wait_s = self.decision.check_in_s
        if self._meter is not None:
            next_at = sampled_at + self._lending.sample_s
            wait_s = min(wait_s, max(0.0, next_at - trio.current_time()))
        with trio.move_on_after(wait_s):
            await self._changed.wait()
        self._changed = trio.Event()

    def _follow(self, decision: Decision) -> None:
        """Makes a decision so."""
        before, self.decision = self.decision, decision
        if decision.text == before.text:
            return
        if decision.lends:
            self._lends.set()
            self._yields = trio.Event()
            self._leaving.scope.cancel()
            self.times_returned += 1
            log.info("lending again")
            if self._announcer is not None and self._serving is not None and not self._is_lost:
                self._serving.server.accept_again()
                self._announcer.announce_soon()
                notify_status(self._serving.description)
            return
        log.info("not lending", why=decision.why, reason=decision.text)
        notify_status(f"paused: {decision.text}")
        if before.lends:
            self._lends = trio.Event()
            self._yields.set()
            self.times_left += 1
            for scope in self._loading:
                scope.cancel()
        if before.why is not decision.why:
            self._make_way()

    def _make_way(self) -> None:
        if self._serving is not None:
            self._serving.server.stop_accepting()
            self._leave(self._config.yield_within_s)

    def _leave(self, within_s: float) -> _Leaving:
        """Begins to move the sessions; a move that was begun before has this time now."""
        assert self._nursery is not None
        assert self._serving is not None
        assert self._announcer is not None
        self._leaving.scope.cancel()
        self._leaving = leaving = _Leaving()
        self._nursery.start_soon(
            self._move_sessions, leaving, self._serving, self._announcer, within_s
        )
        return leaving

    async def _move_sessions(
        self, leaving: _Leaving, serving: Serving, announcer: Announcer, within_s: float
    ) -> None:
        """Moves what is in use; ends what is left when the time is over, idle or not."""
        ends_at = trio.current_time() + within_s
        with leaving.scope:
            try:
                await announcer.withdraw()
                if not leaving.scope.cancel_called:  # a drain refuses sessions, however short
                    await serving.drain(deadline_s=max(0.0, ends_at - trio.current_time()))
            finally:
                leaving.left = serving.server.sessions
                leaving.has_settled.set()
            log.info("sessions moved", left=leaving.left)
            with trio.move_on_at(ends_at):
                while serving.is_in_use:  # noqa: ASYNC110  # several tasks end, each by itself
                    await trio.sleep(LOOK_S)
            if leaving.scope.cancel_called:  # not all that was awaited tells of it
                return
            log.info("sessions ended", sessions=serving.end_all())
            if self.decision.why is Why.LOAD:
                await trio.sleep(self._config.free_after_s)
            if not leaving.scope.cancel_called:
                self._to_free.set()


def load_pause(path: Path, now: float) -> Pause | None:
    """The owner's pause as it was left; none where there is none, or it is over.

    What cannot be read counts as a pause without an end: `petalctl resume` ends it.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        log.warning("the owner's pause cannot be read", path=str(path), reason=str(error))
        return Pause()
    try:
        until = json.loads(text)["until"]
        pause = Pause(None if until is None else float(until))
    except (ValueError, TypeError, KeyError):
        log.warning("the owner's pause cannot be read", path=str(path), reason="it is no JSON")
        return Pause()
    return pause if pause.until is None or pause.until > now else None


def save_pause(path: Path, pause: Pause | None) -> None:
    """Keeps the owner's pause, or forgets it; where that fails, it does not outlive the daemon."""
    try:
        if pause is None:
            path.unlink(missing_ok=True)
            return
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.write_text(json.dumps({"until": pause.until}), "utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        log.warning("the owner's pause cannot be kept", path=str(path), reason=str(error))
