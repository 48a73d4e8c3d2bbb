"""A session from the client's side, as a state machine: what is sent, and how a hop is replaced.

Pure: events go in with the time, actions come out; `petald.chain_client` carries them out. The
opening of a session is the recovery of all its blocks with nothing cached. Its parts: the rows
(`session_flow`), the new hops (`session_build`), their links (`session_links`), who is silent
(`session_watch`), and what is held against whom (`session_blame`).

How recovery works. For every border between two hops the session keeps the rows that crossed it,
as the next hop decoded them (its *history*). When a hop is lost the session stands still. What
every border has seen is *committed*: those rows alone count, whatever else was under way. New hops
are opened for the lost blocks, the committed rows of the border before them are replayed to them,
they are linked with their neighbours, and the steps beyond the committed rows are sent again from
the first hop, under new numbers: each hop cuts its cache back to the position that they begin at.
Steps and outputs under old numbers are passed over, wherever they still wander.

Invariant: while steps flow, the hops cover all blocks in order and are linked; each hop has cached
at least the committed rows, and exactly those that the histories hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from p2p.wire.session_messages import HopTime
from p2p.wire.tensor import WireTensor
from petald.errors import BadRequest, HopFailed, MissingBlocks, PetaldError
from petald.routing import Hop
from petald.session_actions import (
    Action,
    CloseHop,
    Ended,
    Moved,
    NeedChain,
    OpenHop,
    Penalise,
    SendHandOver,
    StepDone,
    StepLost,
    StepResultRows,
    Waiting,
)
from petald.session_blame import (
    CODE_BAD_REQUEST,
    CODE_MISBEHAVED,
    CODE_MISLED,
    CODE_NEXT_HOP_LOST,
    CODE_NO_ANSWER,
    CODE_REFUSED,
    CODE_SESSION_IDLE,
    Blame,
)
from petald.session_build import Build, Stage
from petald.session_flow import MAX_IN_FLIGHT, Flow
from petald.session_hop import (
    HopRecord,
    HopState,
    Request,
    RequestKind,
)
from petald.session_links import Links, overdue_at
from petald.session_settings import Counts, SessionSettings
from petald.session_watch import Watch

OPEN_S = 5.0
"""For opening a hop: a dial, two handshakes and one round trip over a slow home link."""

SWITCH_TOKENS = 64
"""A build beside running hops takes over when so few tokens are left to replay: less than the
session decodes while they are."""

RETRY_S = 0.5
"""Between two choices where nobody can run some blocks."""

MAX_ATTEMPTS = 8
"""Choices that come to nothing before a session is given up whose user does not want to wait."""

LEAST_STEP_TOKENS = 16
"""A server that takes less at once would make every prefill of the session crawl."""

MAX_QUOTED = 512
"""Characters of what a hop says that are repeated."""

LAG_S = 1.0
"""A timer that comes so late tells of a pause of this process, not of the hops' silence."""

CODE_OPENED = "opened"
CODE_LEAVING = "leaving"
CODE_BETTER = "better"


class Session:
    """One session; see the module's account."""

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings
        self._end_block = settings.num_blocks
        self._chain: list[HopRecord] = []
        self._builds: list[Build] = []
        self._records: dict[int, HopRecord] = {}
        self._flow = Flow(settings.make_history, replay=settings.replay)
        self._is_running = False
        self._has_ended = False
        self._halted_at = 0.0
        self._last_id = 0
        self._blame = Blame(patience_s=settings.max_wait_s)
        self._links = Links(self._new_id)
        self._watch = Watch(self._flow, self._records, self._new_id)
        self._actions: list[Action] = []
        self.max_step_tokens = 0
        self._counts = Counts()

    @property
    def is_running(self) -> bool:
        """Whether steps flow."""
        return self._is_running

    @property
    def has_ended(self) -> bool:
        """Whether it is lost or closed."""
        return self._has_ended

    @property
    def chain(self) -> tuple[Hop, ...]:
        """The hops that are in their place, in order."""
        return tuple(hop.at for hop in self._chain)

    @property
    def is_moving(self) -> bool:
        """Whether some blocks are on their way to other servers."""
        return bool(self._builds)

    @property
    def counts(self) -> Counts:
        """What it has gone through."""
        return replace(self._counts, probes=self._watch.probes)

    @property
    def submitted_rows(self) -> int:
        """How many tokens were submitted, and not taken back."""
        return self._flow.rows

    # What the app wants.

    def start(self, now: float) -> list[Action]:
        """Begins to open the session."""
        self._halted_at = now
        self._add_build(0, self._end_block, code=CODE_OPENED, now=now, is_urgent=True)
        return self._take(now)

    def submit(
        self, position: int, hidden: WireTensor, wanted: str, now: float
    ) -> tuple[int, list[Action]]:
        """Takes a step; gives its ticket. It is done, or lost, later.

        Raises:
            BadRequest: it begins beyond the step before it, or ends beyond what was promised.
        """
        rows = self._flow.rows
        tokens = hidden.shape[0]
        if not tokens:
            raise BadRequest("a step without tokens came; at least one is needed")
        if not 0 <= position <= rows:
            raise BadRequest(f"a step at {position} does not follow the {rows} tokens before it")
        if position + tokens > self._settings.max_tokens:
            raise BadRequest(
                f"a step up to position {position + tokens} came; "
                f"the session was opened for {self._settings.max_tokens} tokens"
            )
        if position < rows:
            self._rewind(position)
        for build in self._builds:
            if build.stage is Stage.RESTING:
                self._choose(build)
                self._halted_at = build.noticed_at = now
        ticket = self._new_id()
        self._flow.submit(ticket, position, hidden, wanted)
        return ticket, self._take(now)

    def cancel(self, ticket: int, now: float) -> list[Action]:
        """Takes a step back, and those after it."""
        position = self._flow.withdraw(ticket)
        if position is not None:
            self._rewind(position)
        return self._take(now)

    def give_up(self, error: PetaldError) -> list[Action]:
        """Ends the session for a reason of the driver's."""
        self._end(error)
        return self.close()

    def close(self) -> list[Action]:
        """Ends the session."""
        if not self._has_ended:
            self._finish()
        actions, self._actions = self._actions, []
        return actions

    def propose(self, chain: Sequence[Hop], now: float) -> list[Action]:
        """Moves to a better chain, beside the one that runs; ignored while anything else moves."""
        old = list(self._chain)
        new = list(chain)
        if not self._is_running or self._builds or not _covers(new, 0, self._end_block):
            return []
        while old and new and _is_same(old[0].at, new[0]):
            old, new = old[1:], new[1:]
        while old and new and _is_same(old[-1].at, new[-1]):
            old, new = old[:-1], new[:-1]
        if old and new:
            start, end = old[0].at.start, old[-1].at.end
            build = self._add_build(start, end, code=CODE_BETTER, now=now, is_urgent=False)
            build.old_peers = tuple(hop.peer for hop in old)
            self._open_build(build, new, now)
        return self._take(now)

    # What the driver found.

    def on_chain(self, question: int, chain: Sequence[Hop], now: float) -> list[Action]:
        """Servers were chosen."""
        build = self._find_question(question)
        if build is not None:
            if not _covers(chain, build.start, build.end):
                raise ValueError(f"{chain} does not cover {build.start}:{build.end}")
            self._open_build(build, chain, now)
        return self._take(now)

    def on_no_chain(self, question: int, error: MissingBlocks, now: float) -> list[Action]:
        """Nobody can run the blocks now."""
        build = self._find_question(question)
        if build is not None:
            build.stage = Stage.WAITING
            build.retry_at = now + RETRY_S
            if build.waiting_since is None:
                build.waiting_since = now
            if build.is_urgent:
                limit_s = self._settings.max_wait_s
                if now >= self._halted_at + limit_s:
                    self._end(error)
                else:
                    waited_s = now - build.waiting_since
                    self._actions.append(Waiting(str(error), waited_s, limit_s))
        return self._take(now)

    def on_opened(self, hop_id: int, max_step_tokens: int, now: float) -> list[Action]:
        """A hop has room, and waits."""
        hop = self._records.get(hop_id)
        if hop is not None and hop.state is HopState.OPENING:
            hop.state = HopState.OPEN
            hop.max_step_tokens = max_step_tokens
            least = self.max_step_tokens or min(LEAST_STEP_TOKENS, self._settings.max_tokens)
            if max_step_tokens < least:
                text = f"takes steps of {max_step_tokens} tokens; {least} are sent"
                self._fail(hop, "step_too_long", text, now)
        return self._take(now)

    def on_opening_takes(self, hop_id: int, seconds: float, now: float) -> list[Action]:
        """A hop needs something first, which takes so long; only then does its time count."""
        hop = self._records.get(hop_id)
        if hop is not None and hop.state is HopState.OPENING:
            hop.due_at = max(hop.due_at, now + seconds + OPEN_S)
        return self._take(now)

    def on_hop_failed(
        self, hop_id: int, code: str, text: str, now: float, *, retry_after_s: float = 0.0
    ) -> list[Action]:
        """A hop refused, or its stream ended."""
        hop = self._records.get(hop_id)
        if hop is not None:
            self._fail(hop, code, text, now, retry_after_s=retry_after_s)
        return self._take(now)

    def on_link_done(self, hop_id: int, request: int, now: float) -> list[Action]:
        """A hop did what it was asked for."""
        hop = self._records.get(hop_id)
        asked = hop.requests.pop(request, None) if hop is not None else None
        if hop is not None and asked is not None:
            target = self._records.get(asked.target)
            if asked.kind is RequestKind.LINK_NEXT:
                hop.next = asked.target
            elif asked.kind is RequestKind.LINK_PREVIOUS:
                hop.previous = None if target is None else target.peer
            else:
                self._on_handed_over(request)
        return self._take(now)

    def on_link_failed(
        self, hop_id: int, request: int, code: str, text: str, now: float
    ) -> list[Action]:
        """A hop could not do what it was asked for."""
        hop = self._records.get(hop_id)
        asked = hop.requests.pop(request, None) if hop is not None else None
        if hop is not None and asked is not None:
            target = self._records.get(asked.target)
            if asked.kind is RequestKind.HAND_OVER:
                self._on_hand_over_failed(request)
            elif asked.kind is RequestKind.LINK_PREVIOUS:
                self._fail(hop, CODE_MISBEHAVED, f"{code}: {text}", now)
            elif target is not None:
                self._lose_link(hop, target, f"{code}: {text}", now)
        return self._take(now)

    def on_output(self, hop_id: int, number: int, hidden: WireTensor, now: float) -> list[Action]:
        """The copy of what a hop pushed to the next."""
        hop = self._records.get(hop_id)
        sent = self._flow.find(number, hop)
        if hop is None or sent is None:
            self._take_stray(hop, number, now)
            return self._take(now)
        if hop is sent.route[-1] or hidden.shape[0] != sent.tokens:
            self._fail(hop, CODE_MISBEHAVED, "sent an output that was not asked for", now)
        else:
            self._flow.take_output(hop, sent, hidden, now)
        return self._take(now)

    def on_result(
        self,
        hop_id: int,
        number: int,
        hidden: WireTensor | None,
        times: tuple[HopTime, ...],
        now: float,
    ) -> list[Action]:
        """What came out of the hop where a step ends."""
        hop = self._records.get(hop_id)
        sent = self._flow.find(number, hop)
        if hop is None or sent is None:
            self._take_stray(hop, number, now)
            return self._take(now)
        rows = 0 if hidden is None else hidden.shape[0]
        if hop is not sent.route[-1] or rows != sent.result_rows:
            self._fail(hop, CODE_MISBEHAVED, "sent a result that was not asked for", now)
            return self._take(now)
        ticket = self._flow.take_result(hop, sent, now)
        self._blame.on_step_done()
        if ticket is not None:
            self._actions.append(StepDone(ticket, StepResultRows(hidden, times)))
        return self._take(now)

    def on_step_failed(
        self, hop_id: int, number: int, code: str, text: str, culprit: str | None, now: float
    ) -> list[Action]:
        """A hop could not do a step, or cannot go on."""
        hop = self._records.get(hop_id)
        sent = self._flow.find(number, hop)
        if hop is None or (number and sent is None):
            self._take_stray(hop, number, now)
            return self._take(now)
        route = sent.route if sent is not None else tuple(self._route_of(hop))
        index = route.index(hop) if hop in route else -1
        if code == CODE_NEXT_HOP_LOST and 0 <= index < len(route) - 1:
            if route[index + 1].state is not HopState.GONE:
                self._lose_link(hop, route[index + 1], text, now)
        elif code == CODE_BAD_REQUEST and index > 0:  # what it misses was not pushed to it
            self._lose_link(route[index - 1], hop, text, now)
        elif culprit is None or code != CODE_MISBEHAVED or index < 0:
            self._fail(hop, code, text, now)
        elif index == 0:  # what it does not take came from here
            self._fail(hop, CODE_REFUSED, text, now)
        else:
            self._blame_before(hop, route, text, now)
        return self._take(now)

    def on_probe_reply(self, hop_id: int, request: int, received: int, now: float) -> list[Action]:
        """A hop lives; the newest step that reached it was ``received``."""
        hop = self._records.get(hop_id)
        if hop is not None and self._watch.on_reply(hop, request, received, now):
            route = self._route_of(hop)
            index = route.index(hop) if hop in route else 0
            if index:
                self._lose_link(route[index - 1], hop, "a step did not arrive", now)
        return self._take(now)

    def on_leaving(self, hop_id: int, now: float) -> list[Action]:
        """A hop asks to be replaced before it goes."""
        hop = self._records.get(hop_id)
        if hop is None or hop.is_leaving:
            return []
        hop.is_leaving = True
        self._blame.on_leaving(hop.peer, now)
        if self._find_build(hop) is not None:
            self._fail(hop, CODE_LEAVING, "it is leaving", now)
        self._replace_leaving(now)
        return self._take(now)

    # Time.

    def next_deadline(self) -> float:
        """When `on_timer` is wanted, unless something comes before."""
        due = [build.retry_at for build in self._builds if build.stage is Stage.WAITING]
        for hop in self._records.values():
            if hop.state is HopState.OPENING:
                due.append(hop.due_at)
            due += [overdue_at(hop, request) for request in hop.requests.values()]
        return min(self._watch.next_deadline(), *due, float("inf"))

    def on_timer(self, now: float) -> list[Action]:
        """Time has passed."""
        if self._has_ended:
            return []
        if now - self.next_deadline() > LAG_S:
            self._forgive(now)
        for build in list(self._builds):
            if build.stage is Stage.WAITING and now >= build.retry_at:
                self._choose(build)
        actions, silences = self._watch.on_timer(now)
        self._actions += actions
        for silence in silences:
            self._fail(silence.hop, CODE_NO_ANSWER, silence.text, now, silent_s=silence.silent_s)
        for hop in list(self._records.values()):
            self._check_hop(hop, now)
        return self._take(now)

    def _check_hop(self, hop: HopRecord, now: float) -> None:
        for number, request in list(hop.requests.items()):
            if now < overdue_at(hop, request):
                continue
            if request.kind is RequestKind.HAND_OVER:
                del hop.requests[number]
                self._on_hand_over_failed(number)
            else:
                self._fail(hop, CODE_NO_ANSWER, "did not answer to a link", now)
                return
        if hop.state is HopState.OPENING and now >= hop.due_at:
            self._fail(hop, CODE_NO_ANSWER, "did not open a session in time", now)

    def _forgive(self, now: float) -> None:
        """Gives every hop its time again: it was this process that stood still."""
        for hop in self._records.values():
            hop.due_at = max(hop.due_at, now + OPEN_S)
            for request in hop.requests.values():
                request.asked_at = now
            hop.probe = None
            hop.last_output_at = now

    # Failures.

    def _fail(
        self,
        hop: HopRecord,
        code: str,
        text: str,
        now: float,
        *,
        retry_after_s: float = 0.0,
        silent_s: float = 0.0,
    ) -> None:
        """Gives a hop up."""
        if self._has_ended or hop.state is HopState.GONE:
            return
        self._drop_hop(hop)
        if self._blame.on_failure(hop, code, now, retry_after_s=retry_after_s):
            self._actions.append(Penalise(hop.peer, code))
        at = hop.at
        text = text[:MAX_QUOTED]
        error = HopFailed(
            f"the hop {at.peer} for blocks {at.start}:{at.end} failed ({code}): {text!r}",
            peer=at.peer,
        )
        if code in (CODE_MISBEHAVED, CODE_REFUSED) and self._blame.is_hopeless(now):
            self._end(error)
            return
        for build in self._builds:
            if build.source == hop.id:
                self._give_up_hand_over(build)
        build_of_hop = self._find_build(hop)
        if build_of_hop is not None:
            self._start_again(build_of_hop, error, now)
            return
        if hop not in self._chain:  # it was retired
            return
        self._halt(now)
        covering = self._covering_builds(hop)
        for build in covering:
            build.code, build.silent_s, build.noticed_at = code, silent_s, now
            self._take_over(build)
        if not covering:
            self._chain.remove(hop)
            build = self._add_build(at.start, at.end, code=code, now=now, is_urgent=True)
            build.old_peers, build.silent_s = (at.peer,), silent_s
            if code == CODE_SESSION_IDLE and not self._flow.tickets:
                build.stage = Stage.RESTING

    def _start_again(self, build: Build, error: PetaldError, now: float) -> None:
        """Other servers must do what the build's could not."""
        self._drop_build_hops(build)
        build.attempts += 1
        gives_up_at = self._halted_at + self._settings.max_wait_s
        if not build.is_urgent:
            if build.code == CODE_LEAVING:
                build.stage, build.retry_at = Stage.WAITING, now + RETRY_S
            else:
                self._builds.remove(build)
                self._replace_leaving(now)
        elif build.attempts >= MAX_ATTEMPTS and now >= gives_up_at:
            self._end(error)
        else:
            if build.attempts > 1:
                waited_s = now - self._halted_at
                self._actions.append(Waiting(str(error), waited_s, self._settings.max_wait_s))
            self._choose(build)

    def _lose_link(self, hop: HopRecord, target: HopRecord, text: str, now: float) -> None:
        """The way from a hop to the next is gone: it is made anew, once; then one of them goes."""
        culprit, was_lost_before = self._links.on_lost(hop, target)
        if was_lost_before:
            self._fail(culprit, CODE_NEXT_HOP_LOST, text, now)
        elif self._find_build(hop) is None and self._find_build(target) is None:
            self._counts.relinks += 1
            self._halt(now)
        elif self._find_build(hop) is self._find_build(target):
            self._fail(culprit, CODE_NEXT_HOP_LOST, text, now)

    def _replace_leaving(self, now: float) -> None:
        """Makes others ready for the hops that said that they leave."""
        for hop in self._chain:
            if hop.is_leaving and not self._covering_builds(hop):
                start, end = hop.at.start, hop.at.end
                build = self._add_build(start, end, code=CODE_LEAVING, now=now, is_urgent=False)
                build.old_peers = (hop.peer,)

    def _take_stray(self, hop: HopRecord | None, number: int, now: float) -> None:
        """Something came of a step that nobody waits for, or of one that never was."""
        if hop is None:
            return
        route = self._route_of(hop)
        if number <= self._flow.last_number:
            self._flow.take_stale(hop, now)
        elif hop not in route[1:]:
            self._fail(hop, CODE_MISBEHAVED, f"speaks of a step {number} that never was", now)
        elif self._blame.is_new_stray(number):
            self._blame_before(hop, route, f"was sent a step {number} that never was", now)
        else:  # it was passed on from hop to hop, and none of them takes a lower number now
            self._fail(hop, CODE_MISLED, f"was sent a step {number} that never was", now)

    def _blame_before(
        self, hop: HopRecord, route: Sequence[HopRecord], text: str, now: float
    ) -> None:
        """Gives up the hop before one that complains; who complains again is it himself."""
        hop.blames += 1
        before = route[route.index(hop) - 1]
        self._fail(before if hop.blames == 1 else hop, CODE_MISBEHAVED, text, now)

    def _halt(self, now: float) -> None:
        """Stands still: only what is committed counts, and steps will be sent again."""
        if not self._is_running:
            return
        self._is_running = False
        self._halted_at = now
        self._flow.halt()
        for hop in self._chain:
            hop.probe = None

    def _end(self, error: PetaldError) -> None:
        if not self._has_ended:
            self._actions.append(Ended(error))
            self._finish()

    def _finish(self) -> None:
        self._has_ended, self._is_running = True, False
        self._actions += [StepLost(ticket) for ticket in self._flow.tickets]
        for hop in list(self._records.values()):
            self._drop_hop(hop)
        for build in self._builds:
            build.reset()
        self._builds.clear()
        self._flow.close()

    # Builds.

    def _add_build(self, start: int, end: int, *, code: str, now: float, is_urgent: bool) -> Build:
        build = Build(start, end, code, (), now, is_urgent)
        self._builds.append(build)
        return build

    def _choose(self, build: Build) -> None:
        build.stage, build.question = Stage.CHOOSING, 0

    def _ask_for_chain(self, build: Build, now: float) -> None:
        build.question = self._new_id()
        hops = self._placed()
        before = next((hop.peer for hop in hops if hop.at.end == build.start), None)
        after = next((hop.peer for hop in hops if hop.at.start == build.end), None)
        self._actions.append(
            NeedChain(
                build.question,
                build.start,
                build.end,
                before,
                after,
                self._blame.avoided(now),
                self._settings.max_tokens,
                build.attempts > 0 or build.waiting_since is not None,
            )
        )

    def _open_build(self, build: Build, chain: Sequence[Hop], now: float) -> None:
        build.stage, build.waiting_since = Stage.BUILDING, None
        before = next((hop.peer for hop in self._placed() if hop.at.end == build.start), None)
        source = self._choose_source(build, chain)
        for at in chain:
            hop = HopRecord(self._new_id(), at, now + OPEN_S, before)
            self._links.watch(hop)
            self._records[hop.id] = hop
            build.hops.append(hop)
            cache_from = None if source is None else source.peer
            self._actions.append(OpenHop(hop.id, at, before, cache_from))
            before = at.peer
        build.source = None if source is None else source.id
        for hop in build.hops[:-1]:
            build.histories[hop.at.end] = self._settings.make_history()

    def _choose_source(self, build: Build, chain: Sequence[Hop]) -> HopRecord | None:
        """The hop that may hand its cache over."""
        is_fit = build.code == CODE_LEAVING and not build.is_urgent and build.may_hand_over
        if not is_fit or len(chain) != 1:
            return None
        old = next((hop for hop in self._chain if hop.at.start == build.start), None)
        return None if old is None or old.at.end != build.end else old

    def _advance_build(self, build: Build, now: float) -> None:
        if not build.is_open or build.hand_over is not None:
            return
        self._actions += self._links.ask(build.hops, now)
        if not self._links.are_whole(build.hops):
            return
        committed = self._committed()
        if build.source is not None and not build.sent:
            source = self._records[build.source]
            if not self._settings.prefers_hand_over(source.at, build.hops[0].at, committed):
                build.source = None
        if build.source is not None and committed and not build.done:
            build.hand_over, build.sent = self._new_id(), committed
            target = build.hops[0].id
            source.requests[build.hand_over] = Request(RequestKind.HAND_OVER, target, now)
            self._actions.append(SendHandOver(source.id, build.hand_over, target, committed))
            return
        longest = min(hop.max_step_tokens for hop in build.hops)
        while build.sent < committed and build.in_flight < MAX_IN_FLIGHT:
            end = self._flow.piece_end(build.sent, committed, longest)
            hidden = self._flow.histories[build.start].read(build.sent, end)
            until = None if build.end == self._end_block else build.end
            self._actions.append(
                self._flow.send(build.hops, hidden, build.sent, now, build=build, until=until)
            )
            build.sent += hidden.shape[0]
            build.replayed_tokens += hidden.shape[0]
            self._counts.replayed_tokens += hidden.shape[0]

    def _on_handed_over(self, request: int) -> None:
        for build in self._builds:
            if build.hand_over == request:
                build.hand_over = build.source = None
                build.done = build.sent
                build.handed_over_tokens += build.done
                self._counts.handed_over_tokens += build.done

    def _on_hand_over_failed(self, request: int) -> None:
        for build in self._builds:
            if build.hand_over == request:
                self._give_up_hand_over(build)

    def _give_up_hand_over(self, build: Build) -> None:
        """Has the blocks built by replay.

        Where a hand-over began, by another hop: what this one was sent may still be on its way, or
        be taken back, and would fall into the midst of a replay.
        """
        has_begun = build.hand_over is not None
        build.source = build.hand_over = None
        build.may_hand_over = False
        if has_begun:
            self._drop_build_hops(build)
            self._choose(build)

    def _take_over(self, build: Build) -> None:
        """Puts a build in the place of the hops that it was made beside; the session stands."""
        build.is_urgent = True
        build.attempts, build.waiting_since = 0, None
        inside = [hop for hop in self._chain if build.start <= hop.at.start < build.end]
        build.retired = [hop for hop in inside if hop.state is not HopState.GONE]
        self._chain = [hop for hop in self._chain if hop not in inside]

    def _try_resume(self, now: float) -> None:
        """Lets steps flow again, if every block is in its place."""
        placed = self._placed()
        self._actions += self._links.ask(placed, now)
        committed = self._committed()
        urgent = [build for build in self._builds if build.is_urgent]
        if not all(build.has_cached(committed) for build in urgent):
            return
        is_covered = _covers([hop.at for hop in placed], 0, self._end_block)
        if not is_covered or not self._links.are_whole(placed):
            return
        self._chain = placed
        for build in urgent:
            self._install(build, now)
        if not self.max_step_tokens:
            self.max_step_tokens = min(hop.max_step_tokens for hop in placed)
        self._is_running = True
        self._flow.resume(self._committed())

    def _install(self, build: Build, now: float) -> None:
        self._builds.remove(build)
        histories = self._flow.histories
        for border in [b for b in histories if build.start < b < build.end]:
            histories.pop(border).close()
        histories.update(build.histories)
        for hop in build.retired:
            self._drop_hop(hop)
        self._counts.moves += 1
        self._actions.append(
            Moved(
                build.start,
                build.end,
                build.old_peers,
                tuple(hop.peer for hop in build.hops),
                build.code,
                build.silent_s,
                now - self._halted_at,
                build.replayed_tokens,
                build.handed_over_tokens,
            )
        )

    # Small parts.

    def _rewind(self, position: int) -> None:
        """Takes back the tokens from a position on, everywhere."""
        for build in self._builds:
            build.rewind(position)
        self._actions += [StepLost(ticket) for ticket in self._flow.rewind(position)]

    def _take(self, now: float) -> list[Action]:
        """Moves everything on as far as it goes, and gives what is to be done."""
        if not self._has_ended:
            self._advance(now)
            withholder = self._flow.drop_withheld()
            if withholder is not None:
                self._fail(withholder, CODE_MISBEHAVED, "keeps its outputs back", now)
            if withholder is not None and not self._has_ended:
                self._advance(now)
        actions, self._actions = self._actions, []
        return actions

    def _advance(self, now: float) -> None:
        if self._builds:
            if not self._is_running:  # before the replays, in whose order a hop takes them
                self._actions += self._links.ask(self._placed(), now)
            for build in self._builds:
                if build.stage is Stage.CHOOSING and not build.question:
                    self._ask_for_chain(build, now)
                self._advance_build(build, now)
            if self._is_running:
                self._switch(now)
        if not self._is_running:
            self._try_resume(now)
        if self._is_running:
            self._actions += self._flow.pump(self._chain, self.max_step_tokens, now)

    def _switch(self, now: float) -> None:
        """Stops for a build that has caught up with the hops that it was made beside."""
        caught_up = max(0, self._committed() - SWITCH_TOKENS)
        for build in self._builds:
            if build.is_open and build.source is None and build.done >= caught_up:
                build.noticed_at = now
                self._halt(now)
                self._take_over(build)
                self._advance_build(build, now)
                return

    def _committed(self) -> int:
        """How many rows every border has seen that does not lie within an urgent build."""
        urgent = [build for build in self._builds if build.is_urgent]
        borders = {hop.at.start for hop in self._chain}
        for build in urgent:
            borders |= {build.start, build.end}
        borders -= {self._end_block}
        return self._flow.committed(borders)

    def _placed(self) -> list[HopRecord]:
        """The hops in their place and those on the way to it, in order."""
        hops = list(self._chain)
        for build in self._builds:
            if build.is_urgent:
                hops += build.hops
        return sorted(hops, key=lambda hop: hop.at.start)

    def _route_of(self, hop: HopRecord) -> list[HopRecord]:
        build = self._find_build(hop)
        return self._chain if build is None else build.hops

    def _find_build(self, hop: HopRecord) -> Build | None:
        return next((build for build in self._builds if hop in build.hops), None)

    def _find_question(self, question: int) -> Build | None:
        for build in self._builds:
            if build.stage is Stage.CHOOSING and build.question == question:
                return build
        return None

    def _covering_builds(self, hop: HopRecord) -> list[Build]:
        """The builds beside running hops that will take this hop's place."""
        return [
            build
            for build in self._builds
            if not build.is_urgent and build.start <= hop.at.start < build.end
        ]

    def _drop_hop(self, hop: HopRecord) -> None:
        if hop.state is not HopState.GONE:
            hop.state = HopState.GONE
            del self._records[hop.id]
            self._actions.append(CloseHop(hop.id))

    def _drop_build_hops(self, build: Build) -> None:
        for hop in build.hops:
            self._drop_hop(hop)
        self._flow.forget(build)
        build.reset()

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id


def _covers(chain: Sequence[Hop], start: int, end: int) -> bool:
    """Whether hops follow each other from one block to another."""
    at = start
    for hop in chain:
        if hop.start != at or hop.end <= at:
            return False
        at = hop.end
    return at == end


def _is_same(one: Hop, other: Hop) -> bool:
    return (one.peer, one.start, one.end) == (other.peer, other.start, other.end)
